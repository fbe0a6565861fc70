"""The contrastive loss alone, against the number of pairs: time should grow as N^2, memory as N."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from rime_fast.bench.contrastive import TERMS, Shape, make, ours
from rime_fast.bench.harness import Results, Row, compare, dtype_name, peak_memory

ONCE = 8e11  # FLOP of a case from which a CPU runs it once, after a small one to warm up


def measure_growth(
    shape: Shape,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    results: Results | None = None,
    rounds: int = 3,
) -> dict[str, Row]:
    """Ours alone: against N, time should grow as N^2 and memory as N."""
    flops = 8.0 * shape.pairs**2 * shape.width * shape.terms
    call = ours(make(shape, device, dtype), TERMS[: shape.terms])
    case = f"{shape.pairs}x{shape.width}"
    facts = {"pairs": shape.pairs, "width": shape.width, "terms": shape.terms, "dtype": dtype_name(dtype)}
    if device == "cpu" and flops > ONCE:
        return {"ours": _once(call, case, facts, flops, results)}
    return compare(
        "contrastive_growth",
        case,
        {"ours": call},
        device=device,
        results=results,
        rounds=rounds,
        flops=flops,
        shape=facts,
    )


def _once(call: Callable[[], Any], case: str, shape: dict[str, Any], flops: float, results: Results | None) -> Row:
    """One call, timed and its memory watched at once: at this size it takes most of a minute on two cores."""
    ours(make(Shape(512, shape["width"]), "cpu", torch.float32), TERMS[:1])()
    seconds: list[float] = []

    def timed() -> None:
        start = perf_counter()
        call()
        seconds.append(perf_counter() - start)

    peak = peak_memory(timed)
    time = seconds[0]
    row = Row(
        bench="contrastive_growth",
        case=case,
        impl="ours",
        shape=shape,
        median_ms=time * 1e3,
        p20_ms=time * 1e3,
        p80_ms=time * 1e3,
        tflops=flops / time / 1e12,
        peak_mib=None if peak < 0 else peak / 2**20,
        first_call_s=time,
    )
    if results is not None:
        results.rows.append(row)
    return row
