"""The order of rows in a mixture: a function of (seed, step) alone, each permutation whole, shares as weighted."""

from __future__ import annotations

import json
import math
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from rime_fast.data.check import CheckRules
from rime_fast.data.datasets import open_pairs
from rime_fast.data.mixture import (
    GlobalBatches,
    MixtureDataset,
    MixtureSampler,
    MixtureSet,
    deal,
    mixture_sets,
    open_mixture,
)
from rime_fast.data.records import Pair, Side
from rime_fast.data.sampling import permuted, spread, stream_key, uniforms


class Numbers:
    """A set of rows without files; some are longer than others."""

    def __init__(self, name, size):
        self.name, self.size = name, size
        self.tokens = np.random.default_rng(size).integers(10, 500, size)

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return Pair(Side(f"{self.name} {index}"), Side("a"), positives=[Side("b")])


SIZES, LABELS = (50, 7, 300), ("a", "b", "c")


def mixture(weights=(1.0, 0.5, 2.0)):
    return MixtureDataset([Numbers(name, size) for name, size in zip(LABELS, SIZES, strict=True)], LABELS, weights)


# --- numbers without a state -----------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 500), st.integers(1, 60))
def test_a_stream_is_the_same_from_any_place(key, start, count):
    whole = uniforms(key, 0, start + count)
    assert (uniforms(key, start, count) == whole[start:]).all()
    assert ((whole >= 0) & (whole < 1)).all()


@settings(deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_a_keyed_permutation_takes_every_number_once(n, key):
    whole = permuted(key, n, np.arange(n))
    assert sorted(whole.tolist()) == list(range(n))
    at = n // 2
    assert permuted(key, n, np.array([at]))[0] == whole[at]  # any place alone


def test_permutations_look_random():
    n = 1000
    tables = np.stack([permuted(stream_key("t", i), n, np.arange(n)) for i in range(300)])
    # where number 0 lands, and what stands beside it, are spread evenly: chi square over ten cells, 9 degrees
    for values in (tables[:, 0], tables[:, 1], (tables[:, 1] - tables[:, 0]) % n):
        counts = np.histogram(values, bins=10, range=(0, n))[0]
        assert ((counts - 30) ** 2 / 30).sum() < 33.7  # p = 1e-4
    assert abs(np.corrcoef(tables[0], np.arange(n))[0, 1]) < 0.13  # four standard errors
    assert permuted(5, 1_500_000, np.arange(10)).max() < 1_500_000


def test_a_spread_is_different_numbers_ascending():
    chosen = spread(1000, 100)
    assert len(set(chosen.tolist())) == 100
    assert (np.diff(chosen) > 0).all()
    assert spread(5, 100).tolist() == list(range(5))


# --- global batches --------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(st.sampled_from([0, 1, 4, 8]), st.integers(0, 99), st.integers(0, 60))
def test_a_batch_is_a_function_of_seed_and_step(block, seed, step):
    def made():
        return GlobalBatches(SIZES, [1, 0.5, 2], 32, block=block, seed=seed)

    one, other = made(), made()
    for earlier in (3, 1, 40):
        other.batch(earlier)
    assert (one.batch(step) == other.batch(step)).all()
    rows = one.batch(step)
    for start in range(0, 32, max(block, 1)):
        assert len(set(rows[start : start + max(block, 1), 0].tolist())) == 1


@pytest.mark.parametrize("block", [0, 8])
def test_every_pass_takes_every_row_once(block):
    batches = GlobalBatches(SIZES, [1, 0.5, 2], 32, block=block, seed=3)
    rows = np.concatenate([batches.batch(step) for step in range(60)])
    for at, size in enumerate(SIZES):
        mine = rows[rows[:, 0] == at]
        passes = mine[:, 2].max()
        assert passes >= 1
        orders = []
        for number in range(passes):
            taken = mine[mine[:, 2] == number, 1]
            assert sorted(taken.tolist()) == list(range(size))
            orders.append(taken.tolist())
        assert len({tuple(order) for order in orders}) == len(orders)
        last = mine[mine[:, 2] == passes, 1]
        assert len(set(last.tolist())) == len(last)


@pytest.mark.parametrize("seed", range(3))
def test_shares_are_within_binomial_bounds(seed):
    weights = np.array([1, 0.5, 2, 10, 12.0])
    batches = GlobalBatches([1000] * 5, weights, 1024, block=64, seed=seed)
    steps = 400
    blocks = steps * 16
    counts = np.bincount(np.concatenate([batches.draws(s) for s in range(steps)]), minlength=5)
    assert (counts == batches.before(steps)).all()
    share = weights / weights.sum()
    assert (np.abs(counts - blocks * share) < 4.9 * np.sqrt(blocks * share * (1 - share))).all()  # p = 1e-6 a set


# --- ranks, micro-steps, workers -------------------------------------------------------------------------------------


def rows_of(dataset, steps, ranks=1, accumulation=1, start=0, block=8, seed=5, size=32):
    """[(sorted rows of each contrast of a step)] for each step, put together from all ranks."""
    samplers = [
        MixtureSampler(
            dataset, size, block=block, seed=seed, rank=r, ranks=ranks, accumulation=accumulation, start=start
        )
        for r in range(ranks)
    ]
    whole = []
    for step in steps:
        parts = [sampler.step(step) for sampler in samplers]
        assert {len(part) for own in parts for part in own} == {size // accumulation // ranks}
        whole.append([sorted(place for own in parts for place in own[i]) for i in range(accumulation)])
    return whole


@settings(deadline=None, max_examples=12)
@given(st.sampled_from([0, 2, 8]), st.integers(0, 50), st.integers(0, 20))
def test_ranks_and_accumulation_change_no_global_batch(block, seed, step):
    dataset = mixture()
    expected = sorted(chain.from_iterable(rows_of(dataset, [step], block=block, seed=seed)[0]))
    for ranks in (1, 2, 4, 8):
        for accumulation in (1, 2, 4):
            (parts,) = rows_of(dataset, [step], ranks, accumulation, block=block, seed=seed)
            assert sorted(chain.from_iterable(parts)) == expected
    # three micro-steps, of another batch size
    one, three = (rows_of(dataset, [step], 2, n, block=4, seed=seed, size=24) for n in (1, 3))
    assert sorted(chain.from_iterable(one[0])) == sorted(chain.from_iterable(three[0]))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_workers_and_a_resume_neither_repeat_nor_drop_a_row(workers, accumulation):
    dataset = mixture()
    options = {"block": 8, "seed": 1, "ranks": 2, "accumulation": accumulation, "steps": 9}
    expected = [
        place for step in range(9) for part in MixtureSampler(dataset, 32, **options).step(step) for place in part
    ]

    def read(start):
        sampler = MixtureSampler(dataset, 32, start=start, **options)
        loader = DataLoader(dataset, batch_sampler=sampler, num_workers=workers, collate_fn=list)
        return [pair for batch in loader for pair in batch]

    whole = read(0)
    assert [pair.query.text for pair in whole] == [f"{LABELS[place.set]} {place.row}" for place in expected]
    assert [pair.drawn for pair in whole] == [(place.set, place.block) for place in expected]
    assert [pair.target.text for pair in whole] == ["ab"[place.visit % 2] for place in expected]
    for stopped in (1, 4, 8):
        rest = read(stopped)
        assert [pair.query.text for pair in rest] == [pair.query.text for pair in whole[stopped * 16 :]]


def test_epochs_go_on_where_the_last_one_ended():
    dataset = mixture()
    sampler = MixtureSampler(dataset, 32, block=8, steps=3)
    batches = []
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches += list(sampler)
    assert batches == list(MixtureSampler(dataset, 32, block=8, steps=6))
    assert len(sampler) == 3
    assert len(MixtureSampler(dataset, 32, accumulation=2)) == 2 * math.ceil(357 / 32)


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([1, 2, 3, 4, 8]), st.sampled_from([1, 2, 4, 8, 24]), st.integers(1, 4), st.integers(0, 99))
def test_rows_are_dealt_out_evenly(ranks, block, blocks, seed):
    n = ranks * block * blocks
    tokens = np.random.default_rng(seed).integers(1, 1000, n)
    hands = deal(tokens, ranks, block)
    assert sorted(np.concatenate(hands).tolist()) == list(range(n))
    assert {len(hand) for hand in hands} == {n // ranks}
    for start in range(0, n, block):
        shares = [int(((hand >= start) & (hand < start + block)).sum()) for hand in hands]
        assert block < ranks or max(shares) - min(shares) <= 1 + (block % ranks > 0)
    loads = [tokens[hand].sum() for hand in hands]
    assert max(loads) - min(loads) <= 2 * tokens.max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 30, "ranks": 4}, "batch_size is 30; expected a multiple of 1 x 4"),
        ({"batch_size": 32, "accumulation": 3}, "batch_size is 32; expected a multiple of 3 x 1"),
        ({"batch_size": 32, "accumulation": 4, "block": 16}, "block is 16; expected a divisor of the 8 rows"),
        ({"batch_size": 32, "rank": 2, "ranks": 2}, "rank is 2; expected 0 to 1"),
        ({"batch_size": 32, "block": -1}, "block is -1"),
    ],
)
def test_impossible_batches_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixtureSampler(mixture(), **options)


# --- the list of sets ------------------------------------------------------------------------------------------------


def test_sets_as_yaml_or_python_gives_them():
    sets = mixture_sets([{"path": "a.jsonl", "weight": 2}, MixtureSet("b/c.parquet", name="see", weight=1.5)])
    assert [(entry.label, entry.weight) for entry in sets] == [("a", 2), ("see", 1.5)]
    assert mixture_sets(["a.jsonl", "b.jsonl"]) is None
    assert mixture_sets([{"query": {}, "target": {}}]) is None
    assert mixture_sets("a.jsonl") is None


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        ([{"path": "a", "wieght": 1}], r"train_dataset\[0\] has 'wieght'; expected path, format"),
        ([{"path": "a"}, {"name": "b"}], r"train_dataset\[1\] has no path"),
        ([{"path": "a"}, "b.jsonl"], r"train_dataset\[1\] is str"),
        ([{"path": "a/x.jsonl"}, {"path": "b/x.jsonl"}], "two sets called 'x'"),
        ([{"path": "a", "weight": 1}, {"path": "b"}], "'b' has no weight"),
        ([{"path": "a", "weight": 0}], "a: weight is 0; expected a number > 0"),
        ([{"path": "a", "max_rows": 1.5}], "a: max_rows is 1.5"),
    ],
)
def test_bad_sets_are_named(sets, message):
    with pytest.raises(ValueError, match=message):
        mixture_sets(sets)


def test_an_empty_set_is_named():
    with pytest.raises(ValueError, match="set 'none' has no rows"):
        MixtureDataset([Numbers("none", 0)], ["none"])


def test_places_are_plain_data():
    dataset = mixture()
    assert json.dumps(MixtureSampler(dataset, 8).step(0)[0][0])
    assert dataset[60].query.text == "c 3"
    assert dataset[-1].query.text == "c 299"


def test_sets_open_as_one_dataset_with_their_caps(tmp_path):
    for name, count in (("a", 30), ("b", 5)):
        rows = [
            {"query": {"text": f"{name} {i} " * 9, "rewrite": "r"}, "target": {"text": "t", "rewrite": "s"}}
            for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sets = mixture_sets([{"path": str(tmp_path / "a.jsonl"), "max_rows": 10}, {"path": str(tmp_path / "b.jsonl")}])
    found, again = (open_mixture(sets, lambda entry: open_pairs(entry.path)[0]) for _ in range(2))
    assert found.sizes.tolist() == [10, 5]
    assert found.weights.tolist() == [10, 5]
    texts = [pair.query.text for pair in found]
    assert texts == [pair.query.text for pair in again]
    assert len(set(texts[:10])) == 10
    assert {pair.dataset for pair in found} == {"a", "b"}
    assert (found.tokens(np.array([[0, 3], [1, 4]])) > 1).all()


def test_one_file_whose_rows_name_their_sets(tmp_path):
    def row(i):
        return {"query": {"text": str(i)}, "target": {"text": "t"}, "dataset": "odd" if i % 3 else "third"}

    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps(row(i)) + "\n" for i in range(30)))
    for _ in range(2):  # also from a kept verdict
        sets = [MixtureSet(str(file), name="*", weight=2.0, max_rows=15)]
        found = open_mixture(sets, lambda entry: open_pairs(entry.path, rules=CheckRules(rewrites=False))[0])
        assert found.labels == ["third", "odd"]
        assert found.sizes.tolist() == [10, 15]
        assert found.weights.tolist() == pytest.approx([2 / 3, 4 / 3])
        assert all(int(pair.query.text) % 3 == 0 for pair in found.sets[0])
    with file.open("a") as stream:
        stream.write(json.dumps({**row(1), "dataset": None}) + "\n")
    with pytest.raises(ValueError, match=r"a.jsonl, row 31 names no data set"):
        open_mixture(sets, lambda entry: open_pairs(entry.path, rules=CheckRules(rewrites=False))[0])
