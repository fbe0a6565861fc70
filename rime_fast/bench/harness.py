"""How every figure here is taken: interleaved, against the floor of the same run, with its error and its memory.

A benchmark hands ``compare`` a dict of callables that do the same work (ours, the peers, and the bare library GEMMs as
``floor``) and gets one ``Row`` per callable. Rounds go A B C A B C, so that a change of clock or load hits all of them;
on a GPU a buffer larger than the L2 cache is written before each timed call, so that no call finds its inputs there.
An operator is called in the middle of a training step, where the host has run ahead and the card is hot. A call that
meets an idle card is timed by how fast Python launches, and by a clock that holds for some ms only: on an H200 the same
products ran at 800 TFLOP/s after a slow peer and at 650 within a long call. So products keep the card busy before each
timed call, for as long as the host takes to issue it (``host_ms``) and ``BUSY`` at least. Whole steps are timed as they
come (``step=True``).

A callable returns the tensor that its error is taken of (a gradient, the advantages); a peer that cannot run here
raises RuntimeError or ImportError with the reason, which becomes a ``Skipped`` entry.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import platform
import statistics
import subprocess
import sys
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from rime_fast.ops.cpu_products import fast_product, has_onednn

FLOOR = "floor"
PARTS = "_parts"  # how the bench of a breakdown's rows ends
SCHEMA = 1
LEAST_ROUNDS = 3  # of the floor and of ours, where time is short
BUSY, MOST_AHEAD = 20.0, 50.0  # ms of products before a timed call; what takes the host longer waits for the device
PACKAGES = (
    "rime-fast",
    "triton",
    "transformers",
    "liger-kernel",
    "cut-cross-entropy",
    "trl",
    "sentence-transformers",
)


@dataclass
class Row:
    """One implementation at one shape. Times in milliseconds, memory in MiB above what was allocated before.

    host_ms: on a GPU, until a call returns to the host; longer than ``median_ms`` where launches are what a call takes,
    or where it waits for the device.
    """

    bench: str
    case: str
    impl: str
    shape: dict[str, Any]
    median_ms: float
    p20_ms: float
    p80_ms: float
    ratio_to_floor: float | None = None
    tflops: float | None = None
    gbytes_s: float | None = None
    peak_mib: float | None = None
    error_fp64: float | None = None
    first_call_s: float | None = None
    note: str = ""
    host_ms: float | None = None


@dataclass
class Skipped:
    """A peer that could not run, and why (printed, and kept in the JSON)."""

    bench: str
    case: str
    impl: str
    reason: str


@dataclass
class Results:
    """Everything one run produced; ``write`` makes the JSON that plots and comparisons read.

    seconds: time limit of one comparison: rounds are left out where the first calls show that they would take longer,
    down to one, that of the memory reading, and to three of an operator's floor and of ours.
    """

    device: str = "cpu"
    rows: list[Row] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    seconds: float = math.inf

    def write(self, path: Path) -> None:
        """Write the JSON (schema 1): environment, rows, skipped."""
        path.parent.mkdir(parents=True, exist_ok=True)
        body = {
            "schema": SCHEMA,
            "environment": environment(self.device),
            "rows": [asdict(row) for row in self.rows],
            "skipped": [asdict(row) for row in self.skipped],
        }
        path.write_text(json.dumps(body, indent=1) + "\n")


# layouts and threads of a product -> the library whose product is the fastest
_FASTEST: dict[tuple[Any, ...], str] = {}


def library_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """Multiply a [M, K] b [K, N] by whichever library does it fastest here: on a CPU in fp32 ``torch.mm``'s BLAS or
    oneDNN, timed when a layout is first met. What floors and the roofline are made of."""
    if a.device.type != "cpu" or a.dtype != torch.float32 or not has_onednn():
        return torch.mm(a, b, out=out)
    made = torch.empty(a.shape[0], b.shape[1]) if out is None else out
    calls = {"blas": lambda: torch.mm(a, b, out=made), "onednn": lambda: fast_product(a, b)}
    key = (a.shape, a.stride(), b.shape, b.stride(), torch.get_num_threads())
    if key not in _FASTEST:
        seconds = {name: min(timeit.repeat(call, number=1, repeat=3)) for name, call in calls.items()}
        _FASTEST[key] = min(seconds, key=lambda name: seconds[name])
    return calls[_FASTEST[key]]()


def compare(
    bench: str,
    case: str,
    impls: Mapping[str, Callable[[], Any]],
    *,
    shape: Mapping[str, Any],
    device: str = "cpu",
    rounds: int = 7,
    flops: float | None = None,
    nbytes: float | None = None,
    truth: torch.Tensor | Mapping[str, torch.Tensor] | None = None,
    error: Callable[[torch.Tensor, torch.Tensor], float] | None = None,
    errors: Mapping[str, float] | None = None,
    results: Results | None = None,
    step: bool = False,
) -> dict[str, Row]:
    """Time ``impls`` interleaved and return a Row for each; they are also appended to ``results``.

    The callable named "floor" is the bare library work; every other row gets its ratio to it. flops and nbytes are
    what the task needs (not what an implementation does), for TFLOP/s and GB/s. A callable that raises on its first
    call becomes a Skipped entry with the message (a peer's other version may raise anything), except the floor and our
    own ("ours*"), which must run. step: a whole step, where what the host takes counts.

    truth: what the callables should return, in fp64 (one for all, or by name); ``error(value, truth)`` of the first
    call (relative_error unless given) goes into the rows. errors: such figures by name, taken elsewhere.
    """
    gc.collect()  # the case before may have left cycles that hold memory
    begin = time.perf_counter()
    first, alive, known = {}, {}, dict(errors or {})
    for name, call in impls.items():
        try:
            start = time.perf_counter()
            value = call()
            _sync(device)
            first[name], alive[name] = time.perf_counter() - start, call
        except Exception as reason:
            if _is_own(name):
                raise
            if device == "cuda":
                torch.cuda.empty_cache()  # it may have run out of memory
            _skip(results, bench, case, name, _one_line(reason))
            continue
        wanted = truth.get(name) if isinstance(truth, Mapping) else truth
        if wanted is not None and name != FLOOR:
            known[name] = (error or relative_error)(value, wanted)
        del value
    times: dict[str, list[float]] = {name: [] for name in alive}
    host: dict[str, list[float]] = {name: [] for name in alive}

    def timed(name: str) -> None:
        ahead = 0.0 if step else max([BUSY, *host[name][-1:]])
        taken, issued = _time_once(alive[name], device, ahead)
        times[name].append(taken)
        host[name].append(issued)

    if device == "cuda":  # what these need is allocated before memory is read
        _occupy(0.0 if step else BUSY)
        _flush()
    warm = time.perf_counter()
    memory = {name: _mib(peak_memory(partial(timed, name), device)) for name in alive}
    now = time.perf_counter()
    limit = results.seconds if results is not None else math.inf
    affordable = min(rounds, int(min((limit - now + begin) / (now - warm), 1e9)))
    # The calls whose memory was taken were a warm-up. Where time is short they are a peer's only round, but not ours.
    own = {name: affordable if step else max(affordable, min(rounds, LEAST_ROUNDS)) for name in alive if _is_own(name)}
    counts = dict.fromkeys(alive, affordable) | own
    times = {name: [] if counts[name] > 0 else taken for name, taken in times.items()}
    for number in range(max(counts.values(), default=0)):
        for name, count in counts.items():
            if number < count:
                timed(name)
    floor = statistics.median(times[FLOOR]) if FLOOR in times else None
    rows = {}
    for name in alive:
        median = statistics.median(times[name])
        rows[name] = Row(
            bench=bench,
            case=case,
            impl=name,
            shape=dict(shape),
            median_ms=median,
            p20_ms=_quantile(times[name], 0.2),
            p80_ms=_quantile(times[name], 0.8),
            ratio_to_floor=median / floor if floor else None,
            tflops=flops / median / 1e9 if flops else None,
            gbytes_s=nbytes / median / 1e6 if nbytes else None,
            peak_mib=memory[name],
            error_fp64=known.get(name),
            first_call_s=first[name],
            host_ms=statistics.median(host[name]) if device == "cuda" else None,
        )
    if results is not None:
        results.rows += rows.values()
    return rows


def _is_own(name: str) -> bool:
    """Whether a callable is the floor or our code."""
    return name == FLOOR or name.startswith("ours")


def _one_line(reason: Exception) -> str:
    """The message of what a peer says about itself; with its type where it is a surprise."""
    text = (str(reason).splitlines() or [""])[0][:200]
    return text if text and isinstance(reason, (RuntimeError, ImportError)) else f"{type(reason).__name__}: {text}"


def _mib(count: int) -> float | None:
    return None if count < 0 else count / 2**20


def _skip(results: Results | None, bench: str, case: str, impl: str, reason: str) -> None:
    if results is not None:
        results.skipped.append(Skipped(bench, case, impl, reason))


def _sync(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _time_once(call: Callable[[], Any], device: str, ahead: float = 0.0) -> tuple[float, float]:
    """Milliseconds of one call, and until it returned: CUDA events on a GPU, which is kept busy for the first ``ahead``
    of the host's; the host clock on a CPU."""
    if device != "cuda":
        start = time.perf_counter()
        call()
        taken = (time.perf_counter() - start) * 1e3
        return taken, taken
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    _occupy(ahead)
    _flush()
    start = time.perf_counter()
    begin.record()
    call()
    end.record()
    issued = (time.perf_counter() - start) * 1e3
    end.synchronize()
    return begin.elapsed_time(end), issued


def _occupy(ms: float) -> None:
    """Keep the device busy with products for a little longer than ``ms``."""
    if ms > 0:
        matrix, out, each = _filler()
        for _ in range(1 + int(1.2 * min(ms, MOST_AHEAD) / each)):
            torch.mm(matrix, matrix, out=out)


@lru_cache(maxsize=1)
def _filler() -> tuple[torch.Tensor, torch.Tensor, float]:
    """A matrix, room for its square, and the milliseconds that its square takes."""
    matrix = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(matrix)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.mm(matrix, matrix, out=out)  # picks its kernel
    begin.record()
    for _ in range(10):
        torch.mm(matrix, matrix, out=out)
    end.record()
    end.synchronize()
    return matrix, out, begin.elapsed_time(end) / 10


@lru_cache(maxsize=1)
def _beyond_cache() -> torch.Tensor:
    size = getattr(torch.cuda.get_device_properties(), "L2_cache_size", 64 << 20)
    return torch.empty(2 * size, dtype=torch.int8, device="cuda")


def _flush() -> None:
    """Push everything out of the L2 cache."""
    _beyond_cache().zero_()


def _quantile(values: Sequence[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(q * (len(ordered) - 1)))]


def peak_memory(call: Callable[[], Any], device: str = "cpu") -> int:
    """Bytes the call needed at its peak beyond what was there before it (outputs included).

    CUDA: the allocator's own peak. CPU: the process's high-water mark, reset through /proc/self/clear_refs (Linux), so
    it also counts what libraries allocate outside torch. Resolution is a page; -1 where the kernel offers neither.
    """
    gc.collect(1)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with suppress(OSError, AttributeError):  # glibc: freed heap that the process keeps would hide what a call takes
        ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return -1
    before = _proc_bytes("/proc/self/status", "VmRSS")
    call()
    return max(0, _proc_bytes("/proc/self/status", "VmHWM") - before)


def _proc_bytes(file: str, key: str) -> int:
    try:
        lines = Path(file).read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":")), 0)


def environment(device: str = "cpu") -> dict[str, Any]:
    """Record where a figure comes from: device, driver, versions, commit, command."""
    info: dict[str, Any] = {
        "device": _cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
    }
    for package in PACKAGES:
        try:
            info[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            info[package] = None
    if device == "cuda":
        info["device"] = torch.cuda.get_device_name()
        info["driver"] = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        info["cuda"] = torch.version.cuda
    return info


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _commit() -> str | None:
    """The checkout's commit; None for an installed package, even inside somebody else's repository."""
    tracked = _run("git", "ls-files", Path(__file__).name)
    return _run("git", "rev-parse", "--short", "HEAD") if tracked else None


def _run(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def fast_fp64(device: str) -> bool:
    """Whether fp64 products run at a good part of fp32's speed: on data-centre GPUs, so large truths are affordable."""
    return device == "cuda" and torch.cuda.get_device_capability() in ((7, 0), (8, 0), (9, 0), (10, 0))


def dtype_name(dtype: torch.dtype) -> str:
    """The short name of a dtype as rows and options spell it: "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def max_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """The largest absolute difference from the truth, in fp64."""
    return float((value.detach().double().cpu() - truth.detach().double().cpu()).abs().max())


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """The norm of the difference from the truth over the norm of the truth, in fp64; a NaN never
    passes a comparison."""
    value, truth = value.detach(), truth.detach().to(value.device)  # a head's gradient is gigabytes: it stays there
    squares = torch.zeros(2, dtype=torch.float64, device=value.device)
    for a, b in zip(value.split(4096), truth.split(4096), strict=True):
        b = b.double()
        squares += torch.stack([(a.double() - b).square().sum(), b.square().sum()])
    error, norm = squares.sqrt().tolist()
    return float(error / max(norm, 1e-300))


def require_memory(nbytes: float, device: str | torch.device) -> None:
    """Raise RuntimeError when ``nbytes`` more do not fit: a CPU that runs out kills the process instead of raising."""
    if torch.device(device).type == "cuda":
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    else:
        free = _proc_bytes("/proc/meminfo", "MemAvailable") or sys.maxsize
    if nbytes > free:
        raise RuntimeError(f"needs {nbytes / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")


def add_parts(
    results: Results, bench: str, case: str, impl: str, parts: Mapping[str, float], shape: Mapping[str, Any]
) -> None:
    """Add the time of each part of a step to the results, as a row of "BENCH_parts" with impl "ours/head"
    (docs/benchmarks.md)."""
    results.rows += [
        Row(f"{bench}{PARTS}", case, f"{impl}/{part}", dict(shape), ms, ms, ms) for part, ms in parts.items()
    ]
