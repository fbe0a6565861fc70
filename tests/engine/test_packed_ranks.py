"""The gradient cache on vision-language models over ranks: every gradient is the single full batch's.

fp64 to 1e-10 (ZeRO: fp32 to 1e-5); images of mixed size, videos, text alone; checkpointing, LoRA, dropout to the bit.
"""

from __future__ import annotations

import pytest

from tests.engine.packed_ranks_worker import SCENARIOS, run_packed
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist


def test_two_ranks():
    run_ranks(run_packed, 2, "ddp", "lora", "fsdp2")


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_family_wrapper_and_number_of_ranks(world):
    pytest.importorskip("deepspeed")
    run_ranks(run_packed, world, *SCENARIOS)
