"""Think-Then-Embed on the demo: real cells in their smallest form, and the table."""

from __future__ import annotations

from pathlib import Path

from rime_fast.demo import ablation
from rime_fast.demo.phases import Sizes
from rime_fast.demo.think import CELLS, summarise, table

TINY = Sizes(sft_steps=2, sft_batch=4, refine_steps=1, refine_batch=2, n_test=4, more_steps=1, measurements=1)


def test_an_embedder_and_a_head_begin_with_the_reasoner(tmp_path: Path) -> None:
    (tmp_path / "cells").mkdir()
    found = {name: ablation.run_cell(name, 0, tmp_path, TINY) for name in ("reasoner", "embedder", "attention")}
    assert (tmp_path / "starts" / "reasoner-0" / "config.json").exists()
    assert set(found["reasoner"]["log"][0]) >= {"ce/query"}
    assert not any(key.startswith("contrast") for key in found["reasoner"]["log"][0])
    assert set(found["embedder"]["hit@1"]) == {"gen-gen", "given"}
    assert set(found["attention"]["hit@1"]) == {"gen-gen"}
    # the head is all that was trained: its cell and the embedder's decode the reasoner's own traces
    assert found["attention"]["query_tokens"] == found["embedder"]["query_tokens"] == found["reasoner"]["query_tokens"]


def test_the_table_is_the_mean_over_seeds() -> None:
    def cell(hit: float, **more: float) -> dict:
        return {"hit@1": {"gen-gen": hit} | more, "query_tokens": 10.0, "seconds": {"train": 60.0}}

    cells = {(name, seed): cell(0.5 + 0.2 * seed) for name in CELLS for seed in (0, 1)}
    cells |= {("embedder", seed): cell(0.5, given=1.0) for seed in (0, 1)}
    lines = table({"cells": summarise(cells, (0, 1))}).splitlines()
    assert len(lines) == 2 + len(CELLS)
    assert "| embedder | 0.500 ± 0.000 | 1.000 ± 0.000 | 10.0 | 60 |" in lines
    assert "| self:2 | 0.600 ± 0.141 |  | 10.0 | 60 |" in lines
