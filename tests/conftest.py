"""Before anything imports triton: without a GPU its kernels run through the interpreter. Every test starts seeded."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is kept about files (rime_fast/data/cache.py) is kept for one run of the tests."""
    os.environ["RIME_FAST_CACHE"] = str(tmp_path_factory.mktemp("rime-fast-cache"))


@pytest.fixture(autouse=True, scope="module")
def _quick_collections() -> Iterator[None]:
    """Each run of a trainer ends with a full garbage collection (accelerate frees its memory so), which would go over
    the millions of objects that torch and transformers brought: those are set aside once a file."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(0)
    torch.manual_seed(0)
