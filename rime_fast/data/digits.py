"""The demo's data: chains of arithmetic over real handwritten digits, made on the fly from a seed and an index.

A query is an image of five of scikit-learn's 1,797 digit scans in a row, d1 .. d5, and four operators as text. The
running value

    v1 = d1,   v_k = (v_{k-1} op_k d_k) mod 10,   op in {+, -, x}

is followed step by step, and the target is the text of the last two values: "41". A small model cannot compute that
in one pass, but it can write the five values one after the other. Rewrite: the five values. Chain of thought: the same
as equations. Control: as many tokens as the longest rewrite, which say nothing. One sign is one token everywhere.

A teacher's rewrites are not all equally good. Three kinds of a query's rewrite, drawn row by row:

    whole   72441               what the target needs
    wordy   72441 and so 41     the same with the answer again
    vague   72 and so           it stops after two values, which do not give the answer away

Train, validation and test use disjoint SCANS, so that a test image never holds a digit the model has seen.
Needs scikit-learn (the ``demo`` extra); nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import numpy as np

from rime_fast.data.records import Pair, Side
from rime_fast.data.retrieval import RetrievalSet

Split = Literal["train", "val", "test"]
Style = Literal["rewrite", "cot", "trace", "control"]
Kind = Literal["whole", "wordy", "vague"]

SIDE = 8  # pixels of a scan
CHAIN = 5  # scans of an image
OPERATORS = "+-×"
_SPLIT_SEED = 1234
_TEST, _VAL = 360, 240  # scans; the other 1,197 are for training
_STREAM = {"train": 1, "val": 2, "test": 3}
_KINDS = 4  # the stream that decides the kind of each rewrite
# As many words as a wordy rewrite, and as a target's, has tokens between its tags: ten and two.
CONTROL_TEXTS = ("here are five small digits in a row of scans", "two digits")


class Chain(NamedTuple):
    """One chain of digits and operators. digits, values: CHAIN of 0..9; operators: CHAIN - 1 of OPERATORS; image: uint8
    [SIDE, CHAIN * SIDE, 3]."""

    digits: tuple[int, ...]
    operators: str
    values: tuple[int, ...]
    image: np.ndarray

    @property
    def answer(self) -> str:
        """The target's text: the last two values."""
        return f"{self.values[-2]}{self.values[-1]}"


def running_values(digits: Sequence[int], operators: Sequence[str]) -> tuple[int, ...]:
    """The running results v1 .. vn of n digits and n - 1 operators. Raises ValueError for another count or an unknown
    operator."""
    if len(operators) != len(digits) - 1:
        raise ValueError(f"operators has {len(operators)} entries; expected {len(digits) - 1} for {len(digits)} digits")
    values = [int(digits[0])]
    for operator, digit in zip(operators, digits[1:], strict=True):
        if operator not in OPERATORS:
            raise ValueError(f"operators holds {operator!r}; expected one of {', '.join(OPERATORS)}")
        value = values[-1]
        found = {"+": value + digit, "-": value - digit, "×": value * digit}[operator]
        values.append(int(found) % 10)
    return tuple(values)


@lru_cache(maxsize=1)
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Grey levels 0..1 fp32 [1797, SIDE, SIDE] and labels [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError("the digits demo needs scikit-learn: pip install 'rime-fast[demo]'") from None
    bundle = load_digits()
    return bundle.images.astype(np.float32) / 16, bundle.target.astype(np.int64)


@lru_cache(maxsize=3)
def scan_indices(split: Split) -> np.ndarray:
    """The scans (indices into scikit-learn's set) of a split; the three are disjoint and make up the whole set."""
    if split not in get_args(Split):
        raise ValueError(f"split is {split!r}; expected 'train', 'val' or 'test'")
    order = np.random.RandomState(_SPLIT_SEED).permutation(len(_scans()[1]))
    parts = {"test": order[:_TEST], "val": order[_TEST : _TEST + _VAL], "train": order[_TEST + _VAL :]}
    return parts[split]


def make_chain(split: Split, seed: int, index: int, *, augment: bool = False) -> Chain:
    """Chain number ``index`` of a stream; a pure function of its arguments.

    augment: half of the scans are moved by up to a pixel each way, all get another brightness and a little noise.
    """
    rng = np.random.default_rng((_STREAM[split], seed, index))
    scans, labels = _scans()
    chosen = rng.choice(scan_indices(split), CHAIN)
    digits = tuple(labels[chosen].tolist())
    operators = "".join(OPERATORS[i] for i in rng.integers(0, len(OPERATORS), CHAIN - 1))
    pixels = scans[chosen]
    if augment:
        pixels = _disturb(pixels, rng)
    row = np.rint(pixels * 255).astype(np.uint8).transpose(1, 0, 2).reshape(SIDE, CHAIN * SIDE)
    return Chain(digits, operators, running_values(digits, operators), np.repeat(row[:, :, None], 3, axis=2))


def _disturb(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shifted, brightened and noised copies of [CHAIN, SIDE, SIDE] grey levels, within 0..1."""
    shifts = np.where(rng.random((CHAIN, 1)) < 0.5, 1, rng.integers(0, 3, (CHAIN, 2)))
    padded = np.pad(pixels, ((0, 0), (1, 1), (1, 1)))
    moved = [scan[y : y + SIDE, x : x + SIDE] for scan, (y, x) in zip(padded, shifts.tolist(), strict=True)]
    bright = np.stack(moved) * rng.uniform(0.8, 1.1, (CHAIN, 1, 1))
    return (bright + 0.1 * rng.standard_normal(pixels.shape)).clip(0, 1)


def query_side(chain: Chain, style: Style = "rewrite", *, kind: Kind = "whole", id: str | None = None) -> Side:
    """The image and the operators, with the response of that style; ``kind`` is the rewrite's."""
    values = "".join(map(str, chain.values))
    if style == "rewrite":
        response = {"whole": values, "wordy": f"{values} and so {chain.answer}", "vague": f"{values[:2]} and so"}[kind]
    elif style == "control":
        response = CONTROL_TEXTS[0]
    elif style == "trace":
        response = f"<think>{values}</think>{chain.answer}"
    else:
        steps = zip(values, chain.operators, chain.digits[1:], values[1:], strict=False)
        equations = "".join(f";{before}{op}{digit}={after}" for before, op, digit, after in steps)
        response = f"<think>{values[0]}{equations}</think><answer>{chain.answer}</answer>"
    return Side(text=chain.operators, images=[chain.image], rewrite=response, id=id)


def target_side(answer: str, style: Style = "rewrite") -> Side:
    """One of the 100 targets, "00" .. "99"; its rewrite is its own text."""
    responses = {
        "rewrite": answer,
        "control": CONTROL_TEXTS[1],
        "cot": f"<think>{answer}</think><answer>{answer}</answer>",
        "trace": f"<think>{answer}</think>{answer}",
    }
    return Side(text=answer, rewrite=responses[style])


class DigitChains(Sequence[Pair]):
    """A data set of ``size`` training pairs, each made when it is asked for; the same ones for the same arguments.

    style: what the responses are. wordy, vague: shares of the queries' rewrites of these kinds; the rest are whole.
    augment: see ``make_chain`` (default: only in training).
    """

    def __init__(
        self,
        split: Split,
        size: int,
        *,
        seed: int = 0,
        style: Style = "rewrite",
        wordy: float = 0.0,
        vague: float = 0.0,
        augment: bool | None = None,
    ) -> None:
        if min(wordy, vague) < 0 or wordy + vague > 1:
            raise ValueError(f"wordy is {wordy} and vague {vague}; expected shares from 0 to 1, together at most 1")
        if style not in get_args(Style):
            raise ValueError(f"style is {style!r}; expected one of {', '.join(map(repr, get_args(Style)))}")
        scan_indices(split)
        self.split, self.size, self.seed, self.style = split, size, seed, style
        self.wordy, self.vague = wordy, vague
        self.augment = split == "train" if augment is None else augment

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Pair:  # type: ignore[override]
        if not 0 <= index < self.size:
            raise IndexError(f"index is {index}; expected 0 to {self.size - 1}")
        chain = make_chain(self.split, self.seed, index, augment=self.augment)
        name = f"{self.split}-{self.seed}-{index}"
        drawn = np.random.default_rng((_KINDS, self.seed, index)).random()
        kind: Kind = "wordy" if drawn < self.wordy else "vague" if drawn < self.wordy + self.vague else "whole"
        return Pair(query_side(chain, self.style, kind=kind, id=name), target_side(chain.answer, self.style), id=name)


def retrieval_set(split: Split, size: int, *, seed: int = 0, style: Style = "rewrite") -> RetrievalSet:
    """Make ``size`` queries against all 100 targets. The sides carry the right rewrites, which no evaluation may show
    to the model: it writes its own."""
    pairs = DigitChains(split, size, seed=seed, style=style, augment=False)
    candidates = [target_side(f"{i:02d}", style) for i in range(100)]
    queries = [pair.query for pair in pairs]
    return RetrievalSet(queries, candidates, [[int(pair.target.text)] for pair in pairs], name=f"digits-{split}")
