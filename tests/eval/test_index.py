from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from rime_fast.cli.search import _results
from rime_fast.data.records import Side
from rime_fast.eval import index as module
from rime_fast.eval.embedder import Encoded
from rime_fast.eval.index import EmbeddingIndex, truncated


def rows(count, width=8, seed=0):
    return normalize(torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.mark.parametrize("chunk", [7, 1 << 16])
def test_plain_search_is_the_sorted_product(chunk, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", chunk)
    base, queries = rows(50), rows(6, seed=1)
    base[31] = base[4]  # equal candidates: the lower row first
    queries[0] = base[4]
    scores, found = EmbeddingIndex(base).search(queries, 5)
    want = (queries @ base.T).sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(scores, want.values[:, :5])
    assert torch.equal(found, want.indices[:, :5])
    assert found[0, :2].tolist() == [4, 31]


def test_margins():
    index = EmbeddingIndex(torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]))
    margins = index.margins(torch.tensor([[1.0, 0.0], [0.6, 0.8]]))
    torch.testing.assert_close(margins, torch.tensor([0.4, 0.2]))
    assert EmbeddingIndex(rows(1)).margins(rows(2)).tolist() == [torch.inf] * 2


@pytest.mark.parametrize("faiss", [None, "Flat", "HNSW16"])
def test_a_saved_index_answers_the_same(faiss, tmp_path):
    if faiss:
        pytest.importorskip("faiss")
    base, queries = rows(40), rows(5, width=12, seed=1)
    made = EmbeddingIndex(base, items=[{"id": str(i)} for i in range(40)], facts={"mode": "disc"}, faiss=faiss)
    made.save(tmp_path)
    again = EmbeddingIndex.load(tmp_path)
    assert again.items[39] == {"id": "39"}
    assert again.facts == {"mode": "disc", "rows": 40, "dims": 8}
    assert again.faiss == faiss
    for one, other in zip(made.search(queries, 3), again.search(queries, 3), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(made.search(queries, 3)[1], EmbeddingIndex(base).search(queries, 3)[1])


def test_truncated_rows_are_unit_rows():
    part = truncated(rows(3), 4)
    torch.testing.assert_close(part.norm(dim=1), torch.ones(3))
    assert truncated(rows(3), None).shape == (3, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: EmbeddingIndex(torch.zeros(0, 4)), r"rows is .* expected floating \[N, D\]"),
        (lambda: EmbeddingIndex(torch.full((2, 4), torch.nan)), "rows holds values that are not finite"),
        (lambda: EmbeddingIndex(rows(3), items=[{}]), "items has 1 entries"),
        (lambda: EmbeddingIndex(rows(3)).search(rows(1, width=4)), r"queries is \(1, 4\); expected \[n, 8\]"),
        (lambda: EmbeddingIndex(rows(3)).search(rows(1), 0), "k is 0"),
        (lambda: truncated(rows(3), 9), "dims is 9; expected 1 to 8"),
        (lambda: EmbeddingIndex.load("/nowhere"), "holds no index.json"),
    ],
)
def test_wrong_use_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_unknown_faiss_factory_is_named():
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="faiss is 'NoSuch'"):
        EmbeddingIndex(rows(3), faiss="NoSuch")


def test_what_faiss_did_not_look_at_is_no_hit():
    pytest.importorskip("faiss")
    base = rows(400)
    made = EmbeddingIndex(base, items=[{"text": str(i)} for i in range(400)], faiss="IVF8,Flat")
    scores, places = made.search(base[:2], k=400)
    assert 0 < int((places[0] >= 0).sum()) < 400
    assert bool((scores[places < 0] == -torch.inf).all())
    one = Encoded(base[:2], None, [0, 0], [True, True], [True, True], 0.0)
    found = _results(made, [Side("a"), Side("b")], one, 400)
    assert [hit["text"] for hit in found[0]["retrieved"]] == [str(i) for i in places[0].tolist() if i >= 0]
    assert EmbeddingIndex(base, faiss="IVF400,Flat").margins(base[:1]).tolist() == [torch.inf]
