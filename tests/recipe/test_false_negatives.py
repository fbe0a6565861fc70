"""Masks of false negatives keep what the docs promise; per-set scores are those of the contrastive loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rime_fast.ops.contrastive import contrastive_loss
from rime_fast.recipe.false_negatives import mask_ids
from rime_fast.recipe.set_scores import set_scores


def masked(keys, queries, others=None, others_of=None):
    """[n, n + h] True where a key is left out of a query's negatives."""
    queries = torch.tensor([query if isinstance(query, list) else [query, query] for query in queries])
    ids = mask_ids(torch.tensor(keys), queries, others, others_of)
    assert ids[0].shape[0] == len(queries)
    assert ids[1].shape[0] == len(keys)
    return ids[0][:, None] == ids[1][None]


def off_diagonal(mask):
    return {(i, j) for i, j in mask.nonzero().tolist() if i != j}


def test_equal_ids_or_equal_contents_are_the_same_item():
    # 0 and 1: equal ids; 2 and 3: equal contents, other ids; 4 alone
    keys = [[10, 100], [10, 101], [12, 102], [13, 102], [14, 104]]
    assert off_diagonal(masked(keys, [1, 2, 3, 4, 5])) == {(0, 1), (1, 0), (2, 3), (3, 2)}


def test_a_chain_of_equal_items_is_one():
    keys = [[1, 10], [1, 11], [2, 11], [2, 12], [3, 12], [9, 99]]
    mask = masked(keys, [1, 2, 3, 4, 5, 6])
    assert mask[:5, :5].all()
    assert not mask[5, :5].any()


def test_a_hard_negative_that_is_another_rows_positive_is_masked_for_that_row_only():
    keys = [[1, 1], [2, 2], [2, 2], [7, 7]]  # row 0's negatives: row 1's positive, and one of its own
    assert off_diagonal(masked(keys, [1, 2])) == {(1, 2)}


def test_a_picture_with_five_captions():
    keys = [[i, i] for i in range(7)]
    mask = masked(keys, [5, 5, 5, 5, 5, 6, 7])
    assert mask[:5, :5].all()
    assert off_diagonal(mask) == {(i, j) for i in range(5) for j in range(5) if i != j}


def test_queries_are_equal_by_id_or_by_content():
    keys = [[i, i] for i in range(4)]
    assert off_diagonal(masked(keys, [[1, 10], [1, 11], [3, 12], [4, 13]])) == {(0, 1), (1, 0)}
    assert off_diagonal(masked(keys, [[1, 10], [2, 10], [3, 12], [4, 13]])) == {(0, 1), (1, 0)}


def test_an_answer_that_many_queries_share_stays_a_negative_of_the_others():
    # one query was answered "yes" and "no"; two other queries have one of them each
    keys = [[1, 1], [2, 2], [1, 1], [2, 2]]
    mask = masked(keys, [5, 5, 6, 7])
    assert off_diagonal(mask) == {(0, 2), (2, 0), (1, 3), (3, 1)}


def test_further_right_answers_are_no_negatives():
    keys = [[1, 1], [2, 2], [3, 3]]
    others = torch.tensor([[3, 3], [8, 8]])
    mask = masked(keys, [1, 2, 3], others, torch.tensor([1, 1]))  # row 1's other answer is row 2's target
    assert off_diagonal(mask) == set()  # shared with another query: it stays
    mask = masked([[1, 1], [2, 2], [9, 9]], [1, 2], torch.tensor([[9, 9]]), torch.tensor([1]))
    assert off_diagonal(mask) == {(1, 2)}  # as a hard negative it goes


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_against_the_definition(data):
    n, hard = data.draw(st.integers(1, 7)), data.draw(st.integers(0, 3))
    small = st.integers(0, 5)
    keys = [[data.draw(small), 10 + data.draw(small)] for _ in range(n + hard)]
    queries = [data.draw(st.integers(0, 3)) for _ in range(n)]
    mask = masked(keys, queries)
    # the same item: connected by equal ids or contents
    item = list(range(n + hard))
    for _ in range(n + hard):
        for i in range(n + hard):
            for j in range(n + hard):
                if keys[i][0] == keys[j][0] or keys[i][1] == keys[j][1]:
                    item[i] = item[j] = min(item[i], item[j])
    askers = {x: {queries[i] for i in range(n) if item[i] == x} for x in item}
    for i in range(n):
        for j in range(n + hard):
            same = item[i] == item[j]
            answers = {item[r] for r in range(n) if queries[r] == queries[i]}
            joined = item[j] in answers and all(askers[x] == {queries[i]} for x in (item[i], item[j]))
            assert bool(mask[i, j]) == (same or joined), (keys, queries, i, j)


@pytest.mark.parametrize("hard", [0, 5])
def test_set_scores_are_those_of_the_loss(hard):
    torch.manual_seed(0)
    n = 24
    rows = torch.nn.functional.normalize(torch.randn(2 * n + hard, 8), dim=1)
    queries, keys = rows[:n], rows[n:]
    ids = torch.randint(0, 12, (n + hard,))
    out = contrastive_loss(
        {"d": queries},
        {"d": keys},
        terms=[("d", "d", 1.0)],
        temperature=0.1,
        query_ids=ids[:n],
        key_ids=ids,
        symmetric=False,
    )
    sets = torch.arange(n) % 3
    found = set_scores(queries, keys, sets, 4, temperature=0.1, query_ids=ids[:n], key_ids=ids)
    assert found[:, 2].tolist() == [8, 8, 8, 0]
    torch.testing.assert_close(found[:, 0].sum() / n, out.loss)
    torch.testing.assert_close(found[:, 1].sum() / n, out.accuracy["d-d"])
    one = set_scores(queries[:8], torch.cat([keys[:8], keys[n:]]), sets[:8] * 0, 1, temperature=0.1)
    blocks = torch.cat([torch.arange(n) // 8, torch.zeros(hard, dtype=torch.int64)])
    by_block = set_scores(queries, keys, torch.arange(n) // 8, 3, temperature=0.1, blocks=blocks)
    torch.testing.assert_close(by_block[0], one[0])
