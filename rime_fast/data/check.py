"""The check of a whole source of rows: in several processes, once per node, and not again while nothing has changed.

A verdict (what is wrong with which rows, and the tokens of every row) is kept in the cache under what it depends on:
the files' sizes and times of change, the rules, the image root. It also notes when each folder and archive of images
last changed; where one has, the rows are looked at again. An image that is written over in place is not noticed.
"""

from __future__ import annotations

import json
import os
import pickle
import queue
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

import rime_fast
from rime_fast.data.cache import entry_path, locked, replacing
from rime_fast.data.formats import known_format
from rime_fast.data.images import ImageRoot
from rime_fast.data.records import DataError, Problem, pair_hash
from rime_fast.data.row_check import CheckReport, CheckRules, check_row, visited
from rime_fast.data.row_check import check_pair as check_pair
from rime_fast.data.rows import RowSource
from rime_fast.data.sampling import spread
from rime_fast.data.sources import open_rows, write_rows

Progress = Callable[[int, int], None]
_PARALLEL_FROM = 20_000  # rows; below, starting processes takes longer than looking
_PART = 2_000  # rows that a process looks at before it reports
_FOLDERS = 4096  # folders of images that a verdict remembers
_ARRAYS = ("bad", "tokens", "dataset", "hashes")  # of a Verdict


@dataclass
class Verdict:
    """What the check of a source found. report: for people. bad: places of the bad rows, ascending. tokens: [n] of
    every row, 0 where unknown. names: what the rows call their data sets ("" first); dataset: [n] int32, each row's
    place in it. hashes: [n] uint64, each row's ``pair_hash``, 0 where it is no pair or was not looked at."""

    report: CheckReport
    bad: np.ndarray
    tokens: np.ndarray
    names: list[str]
    dataset: np.ndarray
    hashes: np.ndarray


@dataclass
class _Part:
    """What one process found in rows start to stop."""

    start: int
    formats: Counter[str] = field(default_factory=Counter)
    problems: list[Problem] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    folders: set[str] = field(default_factory=set)


def check_source(
    rows: RowSource,
    rules: CheckRules,
    root: ImageRoot,
    *,
    file_format: str | None = None,
    sample: int | None = None,
    workers: int | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> Verdict:
    """Look at every row, or at ``sample`` of them evenly spread; nothing is raised for bad data.

    workers: processes (None: as many as this process has processors, for 20,000 rows or more). fresh: look again even
    where a verdict is kept. progress: called with rows done and rows to do.
    """
    keys = (rows.key(), rules.key())
    if None in keys or rows.problem is not None:
        return _look(rows, rules, root, file_format, sample, workers, progress)[0]
    place = [os.path.abspath(root.path), root.outside, root.urls]
    key = ["verdict", 2, rime_fast.__version__, *keys, place, file_format, sample]
    path = entry_path(key, ".npz")
    if not fresh and (known := _load(path, rows.name)):
        return known
    with locked(path):
        if not fresh and (known := _load(path, rows.name)):
            return known
        verdict, folders = _look(rows, rules, root, file_format, sample, workers, progress)
        _save(path, verdict, folders)
    return verdict


def check_file(
    path: str | Path,
    rules: CheckRules | None = None,
    *,
    image_root: str | Path | None = None,
    file_format: str | None = None,
    allow_outside: bool = False,
    allow_urls: bool = False,
    write_good: str | Path | None = None,
    sample: int | None = None,
    workers: int | None = None,
    fresh: bool = False,
    progress: Progress | None = None,
) -> CheckReport:
    """Check a training file of any format of formats.py and return the report; nothing is raised for bad data.

    write_good: also write the good rows there, unchanged (JSONL; a list where the name ends in ".json", Parquet for
    ".parquet"). Relative image paths then still count from ``image_root``, by default the folder of ``path``.
    sample, workers, fresh, progress: as ``check_source`` takes them; allow_outside, allow_urls: see ImageRoot.
    """
    known_format(file_format)
    if write_good is not None and Path(write_good).resolve() == Path(path).resolve():
        raise ValueError(f"write_good is {write_good}, the file being checked; expected another name")
    if write_good is not None and sample is not None:
        raise ValueError("write_good and sample exclude each other: rows that were not looked at may be bad")
    try:
        rows = open_rows(path)
    except DataError as error:
        return CheckReport(str(path), problems=error.problems)
    root = ImageRoot(rows.folder if image_root is None else os.fspath(image_root), allow_outside, allow_urls)
    verdict = check_source(
        rows,
        rules or CheckRules(),
        root,
        file_format=file_format,
        sample=sample,
        workers=workers,
        fresh=fresh,
        progress=progress,
    )
    if write_good is not None:
        bad = set(verdict.bad.tolist())
        write_rows(write_good, (row.value for i, row in enumerate(rows.between(0, len(rows))) if i not in bad))
    return verdict.report


def _look(
    rows: RowSource,
    rules: CheckRules,
    root: ImageRoot,
    file_format: str | None,
    sample: int | None,
    workers: int | None,
    progress: Progress | None,
) -> tuple[Verdict, set[str]]:
    n = len(rows)
    if sample is not None and sample < n:
        chosen = spread(n, sample)
        spans = [(int(i), int(i) + 1) for i in chosen]
    else:
        sample, spans = None, [(i, min(i + _PART, n)) for i in range(0, n, _PART)]
    total = sum(stop - start for start, stop in spans)
    tokens, hashes = np.zeros(n, dtype=np.uint32), np.zeros(n, dtype=np.uint64)
    names, dataset = {"": 0}, np.zeros(n, dtype=np.int32)
    report = CheckReport(rows.name, rows=total, of=None if sample is None else n)
    bad: list[int] = []
    folders: set[str] = set()
    done = 0
    job = (rows, rules, root, file_format)
    found = []
    for part in _parts(job, spans, _processes(rows, total, workers)):
        found.append(part)
        rows_of = slice(part.start, part.start + len(part.tokens))
        tokens[rows_of], hashes[rows_of] = part.tokens, part.hashes
        dataset[rows_of] = [names.setdefault(name, len(names)) for name in part.datasets]
        done += len(part.tokens)
        if progress is not None:
            progress(done, total)
    for part in sorted(found, key=lambda part: part.start):
        report.formats += part.formats
        report.problems += part.problems
        bad += part.bad
        folders |= part.folders
    if rows.problem is not None:
        report.problems.append(rows.problem)
    return Verdict(report, np.array(bad, dtype=np.int64), tokens, list(names), dataset, hashes), folders


def check_part(job: tuple[Any, ...], start: int, stop: int) -> _Part:
    """Check rows ``start`` to ``stop`` in this process; what a worker does."""
    rows, rules, root, file_format = job
    part = _Part(start)
    for i, row in enumerate(rows.between(start, stop), start):
        name, problems, tokens, pair = check_row(row, rules, root, file_format)
        if name is not None:
            part.formats[name] += 1
        if problems:
            part.bad.append(i)
            part.problems += [Problem(rows.name, row.number, where, problem) for where, problem in problems]
        part.tokens.append(tokens)
        part.datasets.append("" if pair is None else pair.dataset or "")
        part.hashes.append(0 if pair is None or problems else pair_hash(pair))
        if pair is not None and len(part.folders) < _FOLDERS:
            part.folders |= visited(pair)
    return part


# --- processes -------------------------------------------------------------------------------------------------------


def _processes(rows: RowSource, total: int, workers: int | None) -> int:
    if workers is not None:
        return workers
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(own, 16) if total >= _PARALLEL_FROM and rows.key() is not None else 1


def _parts(job: tuple[Any, ...], spans: list[tuple[int, int]], workers: int) -> Any:
    """Each span's _Part, in any order. Processes of their own interpreter: a fork would copy threads' locks and a
    spawn would run the user's script again."""
    pickled = None
    if min(workers, len(spans)) > 1:
        with suppress(Exception):  # a filler made on the spot, say, does not pickle: then one process does it
            pickled = pickle.dumps(job)
    if pickled is None:
        yield from (check_part(job, start, stop) for start, stop in spans)
        return
    waiting: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
    results: queue.SimpleQueue[_Part | BaseException] = queue.SimpleQueue()
    for span in spans:
        waiting.put(span)
    for _ in range(workers):
        waiting.put(None)
    with _Workers(pickled, workers, waiting, results):
        for _ in spans:
            part = results.get()
            if isinstance(part, BaseException):
                raise part
            yield part


class _Workers:
    """Interpreters that take spans from one queue and put parts into another; all ended when the block is left."""

    def __init__(self, job: bytes, count: int, waiting: Any, results: Any) -> None:
        package = str(Path(rime_fast.__file__).parents[1])
        paths = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        quiet = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-c", "from rime_fast.data.check import serve; serve()"]
        pipe = subprocess.PIPE
        self.processes = [
            subprocess.Popen(command, stdin=pipe, stdout=pipe, env={**os.environ, **quiet}) for _ in range(count)
        ]
        for process in self.processes:
            threading.Thread(target=_drive, args=(process, job, waiting, results), daemon=True).start()

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: Any) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.wait()


def _drive(process: subprocess.Popen[bytes], job: bytes, waiting: Any, results: Any) -> None:
    try:
        assert process.stdin is not None
        assert process.stdout is not None
        _send(process.stdin, job)
        while (span := waiting.get()) is not None:
            _send(process.stdin, pickle.dumps(span))
            results.put(pickle.loads(_receive(process.stdout)))
        process.stdin.close()
    except BaseException as error:
        results.put(RuntimeError(f"a process of the data check ended early ({error}); see above"))


def serve() -> None:
    """The other end of _drive: stdin and stdout carry pickles, what else is printed goes to stderr."""
    read, write = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    job = pickle.loads(_receive(read))
    with suppress(EOFError):
        while True:
            _send(write, pickle.dumps(check_part(job, *pickle.loads(_receive(read)))))


def _send(stream: Any, data: bytes) -> None:
    stream.write(len(data).to_bytes(8, "little") + data)
    stream.flush()


def _receive(stream: BinaryIO | Any) -> bytes:
    size = stream.read(8)
    if len(size) < 8:
        raise EOFError("nothing more to read")
    return stream.read(int.from_bytes(size, "little"))


# --- kept verdicts ---------------------------------------------------------------------------------------------------


def _load(path: Path, name: str) -> Verdict | None:
    try:
        with np.load(path, allow_pickle=False) as stored:
            found = json.loads(bytes(stored["report"]).decode())
            arrays = {name: stored[name] for name in _ARRAYS}
    except (OSError, ValueError, KeyError, EOFError):
        return None
    if any(_changed(folder) != when for folder, when in found["folders"].items()):
        return None
    os.utime(path)
    report = CheckReport(name, found["rows"], formats=Counter(found["formats"]), of=found["of"])
    report.problems = [Problem(name, row, where, problem) for row, where, problem in found["problems"]]
    return Verdict(report, names=found["names"], **arrays)


def _save(path: Path, verdict: Verdict, folders: set[str]) -> None:
    report = verdict.report
    found = {
        "rows": report.rows,
        "of": report.of,
        "formats": report.formats,
        "names": verdict.names,
        "problems": [(problem.row, problem.field, problem.problem) for problem in report.problems],
        "folders": {folder: _changed(folder) for folder in sorted(folders)},
    }
    text = np.frombuffer(json.dumps(found).encode(), dtype=np.uint8)
    with replacing(path, "wb") as stream:
        np.savez(stream, report=text, **{name: getattr(verdict, name) for name in _ARRAYS})


def _changed(path: str) -> int:
    """When the folder or archive last changed, in ns; 0 where there is none, or no file system has its name."""
    try:
        return os.stat(path or os.curdir).st_mtime_ns
    except (OSError, ValueError):
        return 0
