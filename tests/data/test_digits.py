"""The demo data: the arithmetic, the disjoint scans, determinism, and what a model gets to see."""

from __future__ import annotations

import numpy as np
import pytest

from rime_fast.data import digits
from rime_fast.data.digits import DigitChains, make_chain, retrieval_set, running_values, scan_indices


def test_running_values_by_hand() -> None:
    assert running_values((7, 5, 8, 1, 3), "+-×-") == (7, 2, 4, 4, 1)
    assert running_values((0, 9), "-") == (0, 1)


def test_running_values_names_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="operators has 1 entries; expected 2"):
        running_values((1, 2, 3), "+")
    with pytest.raises(ValueError, match="operators holds '/'"):
        running_values((1, 2), "/")


def test_splits_share_no_scan_and_lose_none() -> None:
    parts = [set(scan_indices(split).tolist()) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [1197, 240, 360]
    assert set.union(*parts) == set(range(1797))
    with pytest.raises(ValueError, match="split is 'dev'"):
        scan_indices("dev")  # type: ignore[arg-type]


def test_an_image_holds_the_scans_of_its_split_only() -> None:
    """Every scan of an image is found, pixel for pixel, among the scans of the split, under the chain's digit."""
    scans, labels = digits._scans()
    for split in ("train", "val", "test"):
        known: dict[bytes, set[int]] = {}
        for i in scan_indices(split):
            known.setdefault(np.rint(scans[i] * 255).astype(np.uint8).tobytes(), set()).add(int(labels[i]))
        for index in range(20):
            chain = make_chain(split, 3, index)
            assert chain.image.shape == (8, 40, 3)
            assert chain.image.dtype == np.uint8
            for k, digit in enumerate(chain.digits):
                assert digit in known[chain.image[:, 8 * k : 8 * k + 8, 0].tobytes()]


def test_chains_depend_on_split_seed_and_index_alone() -> None:
    first = make_chain("train", 5, 17, augment=True)
    again = make_chain("train", 5, 17, augment=True)
    assert first[:3] == again[:3]
    assert np.array_equal(first.image, again.image)
    others = [make_chain("train", 5, 18), make_chain("train", 6, 17), make_chain("val", 5, 17)]
    assert all(other[:2] != first[:2] for other in others)


def test_augmentation_changes_pixels_but_not_the_chain() -> None:
    plain, changed = make_chain("train", 0, 4), make_chain("train", 0, 4, augment=True)
    assert plain[:3] == changed[:3]
    assert not np.array_equal(plain.image, changed.image)
    assert DigitChains("train", 1).augment
    assert not DigitChains("test", 1).augment


def test_all_targets_occur() -> None:
    answers = {make_chain("train", 0, i).answer for i in range(2000)}
    assert answers == {f"{i:02d}" for i in range(100)}


def test_sides_of_each_style() -> None:
    chain = make_chain("train", 0, 0)._replace(digits=(7, 5, 8, 1, 3), operators="+-×-", values=(7, 2, 4, 4, 1))
    query = digits.query_side(chain)
    assert (query.text, query.rewrite) == ("+-×-", "72441")
    assert digits.query_side(chain, "cot").rewrite == "<think>7;7+5=2;2-8=4;4×1=4;4-3=1</think><answer>41</answer>"
    assert digits.target_side("41").rewrite == "41"
    assert digits.target_side("41", "cot").rewrite == "<think>41</think><answer>41</answer>"
    assert digits.query_side(chain, kind="wordy").rewrite == "72441 and so 41"
    assert digits.query_side(chain, kind="vague").rewrite == "72 and so"
    assert digits.query_side(chain, "control").rewrite == digits.CONTROL_TEXTS[0]
    assert digits.target_side("41", "control").rewrite == digits.CONTROL_TEXTS[1]
    with pytest.raises(ValueError, match="style is 'poem'"):
        DigitChains("train", 1, style="poem")  # type: ignore[arg-type]


def test_pairs_agree_with_their_chain() -> None:
    pairs = DigitChains("train", 3, seed=9)
    assert len(list(pairs)) == 3
    for i, pair in enumerate(pairs):
        chain = make_chain("train", 9, i)
        assert pair.query.text == chain.operators
        assert pair.target.text == chain.answer == pair.query.rewrite[-2:]  # type: ignore[index]
    with pytest.raises(IndexError, match="index is 3"):
        pairs[3]


def test_the_share_of_wordy_rewrites() -> None:
    pairs = DigitChains("train", 400, wordy=0.7)
    wordy = [(pair.query.rewrite or "").endswith(f" and so {pair.target.text}") for pair in pairs]
    assert 240 < sum(wordy) < 320


def test_a_noisy_teacher_mixes_three_kinds() -> None:
    """The wordy rows are the same ones whatever the share of vague ones; the rest are whole."""
    pairs = DigitChains("train", 400, wordy=0.15, vague=0.7)
    wordy = [(pair.query.rewrite or "").endswith(f" and so {pair.target.text}") for pair in pairs]
    vague = [(pair.query.rewrite or "").endswith(" and so") for pair in pairs]
    assert 240 < sum(vague) < 320
    assert 30 < sum(wordy) < 90
    alone = DigitChains("train", 400, wordy=0.15)
    assert wordy == [(pair.query.rewrite or "").endswith(f" and so {pair.target.text}") for pair in alone]
    for pair, a, b in zip(pairs, wordy, vague, strict=True):
        rewrite = pair.query.rewrite or ""
        assert (len(rewrite) == 5 and rewrite.endswith(pair.target.text or "")) == (not a and not b)


@pytest.mark.parametrize("shares", [{"wordy": -0.1}, {"wordy": 0.6, "vague": 0.5}])
def test_shares_outside_their_range_are_refused(shares: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected shares from 0 to 1"):
        DigitChains("train", 4, **shares)
    assert not any(" " in (pair.query.rewrite or "") for pair in DigitChains("train", 20))


def test_retrieval_set_points_at_the_answer() -> None:
    found = retrieval_set("test", 30, seed=2)
    assert len(found.candidates) == 100
    for query, correct in zip(found.queries, found.correct, strict=True):
        assert query.rewrite is not None
        assert found.candidates[correct[0]].text == query.rewrite[-2:]
    assert len({query.id for query in found.queries}) == 30
