"""The contrastive loss over a process group: equal to one process, and the same named error on every rank.

The scenarios are in contrastive_worker.py; a rank that waits in a collective for another one that
raised would hit the time limit here.
"""

from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.ops.contrastive_worker import run_scenarios
from tests.ranks import run_ranks

no_distributed = pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
pytestmark = [pytest.mark.dist, no_distributed]


def test_two_ranks() -> None:
    run_ranks(run_scenarios, 2, "equality", "default_labels", "ddp_scaling", "partly_frozen", "errors", "collectives")


def test_four_ranks_hold_what_one_holds() -> None:
    run_ranks(run_scenarios, 4, "thousand_pairs")


@pytest.mark.slow
def test_four_ranks() -> None:
    run_ranks(run_scenarios, 4, "equality", "default_labels", "ddp_scaling", "partly_frozen", "errors", "collectives")


def test_three_ranks_agree_on_errors() -> None:
    run_ranks(run_scenarios, 3, "errors", "partly_frozen", "words_only_where_records_differ")
