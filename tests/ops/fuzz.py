"""`make fuzz`: random small calls of the three operators against fp64 truth by the rule of error_rule.py.

A case is a seed: it names an operator and, for every option of its table, the place of the value taken, so that case
17 is the same call today and tomorrow. Tables begin with the simplest value, and a failing case is shrunk by moving
each option towards it for as long as the call still fails. A range of seeds is a part of a run:

    python -m tests.ops.fuzz --start 40000 --count 1000          goes on at 40000
    python -m tests.ops.fuzz --start 40017 --count 1             one case again, shrunk if it fails
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton

import pytest

from tests.ops import fuzz_contrastive, fuzz_logprob, fuzz_reward

Table = dict[str, tuple[Any, ...]]
Places = dict[str, int]
OPERATORS: dict[str, tuple[Table, Callable[[dict[str, Any]], str]]] = {
    "logprob": (fuzz_logprob.TABLE, fuzz_logprob.check),
    "contrastive": (fuzz_contrastive.TABLE, fuzz_contrastive.check),
    "reward": (fuzz_reward.TABLE, fuzz_reward.check),
}
FAULTS = (Exception, pytest.fail.Exception)  # what pytest.raises raises is no Exception
TRITON_SHARE = 0.0005  # its interpreter takes seconds a call


def draw(seed: int) -> tuple[str, Places]:
    """The operator of case ``seed`` and the place of each option's value; half of the options stay simple."""
    rng = random.Random(seed)
    name = rng.choice(list(OPERATORS))
    table, _ = OPERATORS[name]
    places = {option: rng.randrange(len(values)) if rng.random() < 0.5 else 0 for option, values in table.items()}
    places["seed"] = seed
    if rng.random() < TRITON_SHARE:
        places["backend"] = table["backend"].index("triton")
    elif table["backend"][places["backend"]] == "triton":
        places["backend"] = 0
    return name, places


def values(name: str, places: Places) -> dict[str, Any]:
    table, _ = OPERATORS[name]
    return {option: table[option][place] if option in table else place for option, place in places.items()}


def failure(name: str, places: Places) -> BaseException | None:
    """What is wrong with a case; None for a good one."""
    try:
        OPERATORS[name][1](values(name, places))
    except FAULTS as error:
        return error
    return None


def shrink(name: str, places: Places) -> Places:
    """The simplest places that still fail, one option at a time until none can move."""
    moved = True
    while moved:
        moved = False
        for option in OPERATORS[name][0]:
            for place in range(places[option]):
                simpler = places | {option: place}
                if failure(name, simpler) is not None:
                    places, moved = simpler, True
                    break
    return places


def run(seeds: range, report: Callable[[str], None] = print) -> tuple[Counter[str], list[int]]:
    """(how many calls ended how, seeds that failed); each failing one is reported shrunk."""
    counts: Counter[str] = Counter()
    failed = []
    for seed in seeds:
        name, places = draw(seed)
        try:
            counts[f"{name} {OPERATORS[name][1](values(name, places))}"] += 1
        except FAULTS:
            counts[f"{name} failed"] += 1
            failed.append(seed)
            small = shrink(name, places)
            report(f"seed {seed}: {name}({_differences(name, small)})\n    {failure(name, small)!r}")
    return counts, failed


def _differences(name: str, places: Places) -> str:
    """The options that are not the simplest, as written in a test."""
    found = values(name, places)
    return ", ".join(
        f"{option}={found[option]!r}" for option in places if option not in OPERATORS[name][0] or places[option]
    )


def _parts(seeds: range, size: int = 1000) -> Iterator[range]:
    for first in range(seeds.start, seeds.stop, size):
        yield range(first, min(first + size, seeds.stop))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--start", type=int, default=0, help="first seed")
    parser.add_argument("--count", type=int, default=100_000, help="number of seeds")
    args = parser.parse_args()
    total: Counter[str] = Counter()
    failed: list[int] = []
    begin = time.perf_counter()
    for part in _parts(range(args.start, args.start + args.count)):
        counts, bad = run(part)
        total.update(counts)
        failed += bad
        print(
            f"seeds {args.start} to {part.stop - 1}: {len(failed)} failed, {time.perf_counter() - begin:.0f} s",
            flush=True,
        )
    print("; ".join(f"{what}: {count}" for what, count in sorted(total.items())))
    if failed:
        print(f"failed seeds: {failed}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
