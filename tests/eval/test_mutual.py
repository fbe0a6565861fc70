"""The 2 x 2 table against metrics computed cell by cell, and evaluate_mutual with an embedder of known answers."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

from rime_fast.data.records import Side
from rime_fast.data.retrieval import RetrievalSet
from rime_fast.eval.mutual import evaluate_mutual, mutual_table
from rime_fast.eval.ranking import rank_candidates


@dataclass
class Result:
    embeddings: torch.Tensor
    rewrites: list[str] | None
    mean_tokens: float
    seconds: float
    tokens: list[int]
    disc: torch.Tensor | None = None
    missing_gen: int = 0
    format_errors: int = 0


class Oracle:
    """gen knows each item's number exactly; disc knows only its parity."""

    modes = ("disc", "gen")

    def __init__(self, size: int) -> None:
        self.size = size
        self.calls: list[tuple[str, int]] = []

    def check_widths(self, widths):
        if max(widths) > self.size:
            raise ValueError(f"dims is {max(widths)}")

    def encode_items(self, items, mode, progress=None):
        self.calls.append((mode, len(items)))
        if progress is not None:
            progress(len(items), len(items))
        numbers = torch.tensor([int(item.text.split()[-1]) for item in items])
        rows = torch.nn.functional.one_hot(numbers, self.size).float()
        if mode == "disc":
            rows = torch.stack([(numbers % 2 == p).float() for p in (0, 1)], 1).repeat_interleave(self.size // 2, 1)
            rows = torch.nn.functional.normalize(rows, dim=1)
            return Result(rows, None, 0.0, 2.0, [0] * len(items))
        return Result(
            rows, [f"r{n}" for n in numbers.tolist()], 7.5, 4.0, [7] * len(items), missing_gen=1, format_errors=2
        )

    def encode_rewritten(self, items, rewrites):
        """gen reads the number in the rewrite; without one it knows nothing."""
        numbers = torch.tensor([int(text[1:] or self.size - 1) for text in rewrites])
        return torch.nn.functional.one_hot(numbers, self.size).float()


@pytest.fixture
def data() -> RetrievalSet:
    queries = [Side(text=f"query {i}") for i in range(10)]
    return RetrievalSet(queries, [Side(text=f"target {i}") for i in range(10)], [[i] for i in range(10)])


def test_table_is_the_metric_of_each_cell():
    generator = torch.Generator().manual_seed(0)
    queries = {mode: torch.randn(9, 6, generator=generator) for mode in ("disc", "gen")}
    candidates = {mode: torch.randn(31, 6, generator=generator) for mode in ("disc", "gen")}
    relevant = torch.arange(9)
    table = mutual_table(queries, candidates, relevant)
    assert list(table) == ["disc-disc", "disc-gen", "gen-disc", "gen-gen"]
    for name, cell in table.items():
        q, c = name.split("-")
        ranks = rank_candidates(queries[q], candidates[c], relevant).ranks.double().flatten()
        assert cell.metrics["hit@1"] == pytest.approx((ranks == 1).double().mean().item())
        assert cell.metrics["mrr"] == pytest.approx((1 / ranks).mean().item())
        expected = torch.where(ranks <= 10, 1 / torch.log2(1 + ranks), 0.0).mean().item()
        assert cell.metrics["ndcg@10"] == pytest.approx(expected)


def test_evaluate_counts_costs_and_keeps_examples(data):
    seen = []
    oracle = Oracle(10)
    result = evaluate_mutual(oracle, data, top_k=3, n_examples=4, progress=lambda *event: seen.append(event))
    assert oracle.calls == [("disc", 10), ("disc", 10), ("gen", 10), ("gen", 10)]
    assert seen[-1] == ("gen target", 10, 10)
    assert result.hit_at_1()["gen-gen"] == 1.0
    assert result.sensitivity.rewrites["own"]["score"] == 0.0  # against the index of disc rows, which tie
    assert result.budget.scores == [0.0] * len(result.budget.scores)
    assert json.loads(json.dumps(result.to_dict()))["budget"]["shares"][0] == 0
    assert result.hit_at_1()["disc-disc"] == 0.0  # five ties each, and a tie is a miss
    assert result.cost["gen"] == {
        "query_tokens": 7.5,
        "target_tokens": 7.5,
        "query_seconds": 0.4,
        "target_seconds": 0.4,
    }
    plain = result.to_dict()
    assert plain["cells"]["gen-disc"]["query_tokens"] == 7.5
    assert plain["cells"]["gen-disc"]["target_tokens"] == 0.0
    assert plain["missing_gen"] == {"query": 1, "target": 1}
    assert plain["format_errors"] == {"query": 2, "target": 2}
    assert (plain["n_queries"], plain["n_candidates"], plain["mean_pool"]) == (10, 10, 10.0)
    assert [example["query"]["row"] for example in plain["examples"]] == [0, 2, 5, 7]
    example = plain["examples"][1]
    assert example["query"]["rewrite"] == "r2"
    assert example["ranks"]["gen-gen"] == 1
    assert [one["correct"] for one in example["retrieved"]] == [True, False, False]


def test_lists_of_candidates_per_query(data):
    data.pools = [[i, (i + 1) % 10, (i + 3) % 10] for i in range(10)]  # odd distances: parity is enough here
    result = evaluate_mutual(Oracle(10), data)
    assert result.hit_at_1()["disc-disc"] == 1.0
    assert result.mean_pool == 3.0
    assert len(result.examples[0]["retrieved"]) == 3


def test_one_mode_alone(data):
    result = evaluate_mutual(Oracle(10), data, modes=["disc"])
    assert list(result.cells) == ["disc-disc"]
    assert result.missing_gen == {}
    assert result.examples[0]["query"]["rewrite"] is None


@pytest.mark.parametrize("modes", [[], ["gen", "fast"]])
def test_unknown_mode(data, modes):
    with pytest.raises(ValueError, match="expected a choice of"):
        evaluate_mutual(Oracle(10), data, modes=modes)


def test_equal_candidates_in_a_shared_pool_are_both_right():
    """The same text twice: a tie between twins is no miss, whichever of the two is marked."""
    candidates = [Side(text=f"target {i}", id=str(k)) for k, i in enumerate([0, 1, 1, 2, 0])]
    queries = [Side(text=f"query {i}") for i in range(3)]
    data = RetrievalSet(queries, candidates, [[4, 0], [2], [3]], gains=[[1.0, 2.0], [1.0], [1.0]])
    result = evaluate_mutual(Oracle(10), data)
    assert result.hit_at_1()["gen-gen"] == 1.0
    assert result.n_candidates == 3
    assert [one["row"] for one in result.examples[1]["answers"]] == [1]
    pools = RetrievalSet(queries, candidates, [[4], [2], [3]], pools=[[0, 1, 4], [1, 2], [3, 4]])
    assert evaluate_mutual(Oracle(10), pools).mean_pool == pytest.approx(5 / 3)
    kept = data.merged()
    assert (kept.correct, kept.gains) == ([[0], [1], [2]], [[2.0], [1.0], [1.0]])
    assert kept.merged() is kept


def test_widths_come_from_the_same_embeddings(data):
    oracle = Oracle(10)
    result = evaluate_mutual(oracle, data, dims=[4, 10])
    assert len(oracle.calls) == 4
    assert list(result.to_dict()["dims"]) == [4, 10]
    assert result.dims[10]["gen-gen"] == result.cells["gen-gen"].metrics
    assert result.dims[4]["gen-gen"]["hit@1"] < 1.0  # the rows' other six are zeros there
    with pytest.raises(ValueError, match="dims is 11"):
        evaluate_mutual(oracle, data, dims=[11])
