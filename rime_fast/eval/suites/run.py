"""Evaluating a suite: embed what is missing, in chunks that any number of processes share; then score."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rime_fast import __version__
from rime_fast.engine.fingerprint import fingerprint
from rime_fast.eval.budget import budget_points
from rime_fast.eval.index import truncated
from rime_fast.eval.metrics import mean_cosine
from rime_fast.eval.ranking import TIES
from rime_fast.eval.suites.cache import CHUNK, SideCache, Stored, check_meta, data_hash
from rime_fast.eval.suites.check import gaps
from rime_fast.eval.suites.result import SuiteResult, TaskResult, write_scores
from rime_fast.eval.suites.score import CellScore, score_cell
from rime_fast.eval.suites.tasks import Suite, Task, TaskData, mean
from rime_fast.model.token_names import MODES

SIDES = {"qry": "query", "tgt": "target"}
TABLES = 1  # raised when a table or a parser changes what is embedded
Progress = Callable[[str, int, int], None]  # (what, items done, items in all)


def evaluate_suite(
    embedder: Any,
    suite: Suite,
    *,
    modes: Sequence[str] | None = None,
    output_dir: str | Path | None = None,
    limit: int | None = None,
    shard: tuple[int, int] = (0, 1),
    ties: str = "pessimistic",
    dims: Sequence[int] = (),
    overwrite: bool = False,
    model_name: str = "",
    progress: Progress | None = None,
) -> SuiteResult:
    """Embed and score every task of ``suite``; returns what was measured.

    embedder: a RimeEmbedder; it is not changed (the protocol's limits hold for a copy). modes: some of the model's,
    None all of them; disc and gen come from one prefill. output_dir: where embeddings and results are kept, so that an
    interrupted run goes on where it was; None keeps nothing. limit: the first so many queries against all candidates;
    the result is marked partial. shard: (this process, processes): each takes its chunks, then what is left; process 0
    waits for the others and all is scored there (and wherever all chunks are found). ties: "pessimistic" or "official"
    (ranking.py). dims: further widths to which the embeddings are cut, normalised again and scored. overwrite: make
    embeddings again that were made otherwise. progress: called with what, items done, items in all.

    Raises ValueError for files that are missing (all tasks are looked at before anything is embedded), for embeddings
    in output_dir that were made with another model, template, protocol or data, and for wrong arguments.
    """
    known = getattr(embedder, "modes", MODES[:2])
    modes, rank, world = _checked(known if modes is None else modes, known, limit, shard, ties, dims, overwrite)
    if output_dir is None:
        with tempfile.TemporaryDirectory() as folder:
            return evaluate_suite(
                *(embedder, suite),
                modes=modes,
                output_dir=folder,
                limit=limit,
                shard=shard,
                ties=ties,
                dims=dims,
                model_name=model_name,
                progress=progress,
            )
    found = [f"{task.name}: {gap}" for task in suite.tasks.values() for gap in gaps(task)]
    if found:
        raise ValueError("files are missing; eval --check lists them all:\n" + "\n".join(found[:20]))
    home = Path(output_dir, suite.name)
    runner = _Runner(_under(embedder, suite), suite, home, modes, limit, progress or _silent)
    for task in suite.tasks.values():
        runner.embed(task, rank, world, overwrite)
    for task in suite.tasks.values():
        while rank == 0 and not runner.embed(task, rank, world, False):
            time.sleep(0.2)  # another process is at work on the last chunks
    result = SuiteResult(
        suite=suite.name,
        protocol=suite.protocol.settings(),
        model=model_name or str(getattr(getattr(embedder, "model", None), "name_or_path", "")),
        modes=list(modes),
        ties=ties,
        partial=limit is not None or bool(suite.whole),
        limit=limit,
        version=__version__,
        device=_device(embedder),
        fingerprint=runner.prints[0] | (runner.prints[1] if "gen" in runner.made else {}),
        known={name: (t.modality, t.exported or name) for name, t in (suite.whole or suite.tasks).items()},
    )
    if all(runner.complete(task) for task in suite.tasks.values()):
        for task in suite.tasks.values():
            result.tasks[task.name] = runner.score(task, ties, dims)
        result.aggregate(suite)
        write_scores(result, home)
    return result


def _checked(
    modes: Any, known: Sequence[str], limit: Any, shard: Any, ties: str, dims: Sequence[int], overwrite: bool
) -> tuple:
    unknown = [mode for mode in modes if mode not in known]
    if unknown or not modes or isinstance(modes, str):
        raise ValueError(f"modes is {modes!r}; expected a choice of {known}")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; expected at least 1")
    if ties not in TIES:
        raise ValueError(f"ties is {ties!r}; expected one of {', '.join(TIES)}")
    if any(dim < 1 for dim in dims):
        raise ValueError(f"dims is {list(dims)}; expected positive numbers")
    rank, world = shard
    if not 0 <= rank < world:
        raise ValueError(f"shard is {rank}/{world}; expected 0 <= i < n")
    if overwrite and world > 1:
        raise ValueError("overwrite needs one process (another one's chunks would be removed); use a new output_dir")
    return tuple(mode for mode in MODES if mode in modes), rank, world


def _silent(*_: Any) -> None:
    """Progress that nobody watches."""


def _under(embedder: Any, suite: Suite) -> Any:
    """A copy of the embedder with the protocol's limits and texts."""
    if not hasattr(embedder, "collator"):
        return embedder
    adapted = copy.copy(embedder)
    adapted.collator = suite.protocol.collator(embedder.collator)
    return adapted


def _device(embedder: Any) -> str:
    device = getattr(embedder, "device", None)
    if device is not None and device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device or 'unknown'}, {torch.get_num_threads()} threads"


class _Runner:
    """Embeds and scores the tasks of one run."""

    def __init__(
        self, embedder: Any, suite: Suite, home: Path, modes: Sequence[str], limit: Any, progress: Any
    ) -> None:
        self.embedder, self.suite, self.home, self.modes = embedder, suite, home, modes
        self.limit, self.progress = limit, progress
        # one prefill makes disc and gen
        self.made = tuple(mode for mode in modes if mode != "disc" or "gen" not in modes)
        self.prints = fingerprint(embedder)
        self._sizes: dict[str, tuple[int, int]] = {}
        self._loaded: tuple[str, TaskData] | None = None

    def data(self, task: Task) -> TaskData:
        """The task's data; the last one used stays in memory."""
        if self._loaded is None or self._loaded[0] != task.name:
            data = task.load()
            self._loaded = (task.name, data if self.limit is None else data.first(self.limit))
            data = self._loaded[1]
            self._sizes[task.name] = (len(data.queries), len(data.candidates))
        return self._loaded[1]

    def caches(self, task: Task, mode: str) -> list[SideCache]:
        """Of queries and of candidates."""
        if task.name not in self._sizes:
            self.data(task)
        folder = self.home / task.name
        return [SideCache(folder, side, mode, n) for side, n in zip(SIDES, self._sizes[task.name], strict=True)]

    def complete(self, task: Task) -> bool:
        return not any(cache.missing() for mode in self.made for cache in self.caches(task, mode))

    def embed(self, task: Task, rank: int, world: int, overwrite: bool) -> bool:
        """Make the chunks that nobody has made or is making; whether all are there now."""
        folder = self.home / task.name
        if task.name in self._sizes and self.complete(task):
            return True
        data = self.data(task)
        if overwrite and folder.exists():
            for file in folder.iterdir():
                file.unlink()
        common, gen = self.prints
        meta = {
            "suite": self.suite.name,
            "task": task.name,
            "tables": TABLES,
            "protocol": self.suite.protocol.settings(),
            "limit": self.limit,
            "chunk": CHUNK,
            "data": data_hash([*data.queries, *data.candidates]),
            **common,
        }
        check_meta(folder, meta, gen if "gen" in self.made else None)
        for mode in self.made:
            for cache, items in zip(self.caches(task, mode), (data.queries, data.candidates), strict=True):
                names = [str(i) for i in range(len(items))] if cache.side == "qry" else data.names
                self._side(cache, items, names, f"{task.name} {SIDES[cache.side]}", rank, world)
        return self.complete(task)

    def _side(self, cache: SideCache, items: list, names: list[str], label: str, rank: int, world: int) -> None:
        todo = sorted(cache.missing(), key=lambda chunk: (chunk % world != rank, chunk))
        if not todo:
            return
        order = self._order(items)
        done = len(items) - CHUNK * len(todo)
        for chunk in todo:
            with cache.taken(chunk) as lock:
                if lock is None:
                    continue
                index = order[chunk * CHUNK : (chunk + 1) * CHUNK]

                def report(n: int, _: int, lock: Any = lock, before: int = done) -> None:
                    lock.alive()
                    self.progress(label, max(0, before) + n, len(items))

                chosen = [items[i] for i in index]
                memory = _watch_memory(self.embedder)
                mode = "both" if cache.mode == "gen" else cache.mode
                made = self.embedder.encode_items(chosen, mode, progress=report)
                cache.write(chunk, index, [names[i] for i in index], made, memory())
            done += len(index)

    def _order(self, items: list) -> list[int]:
        """The items' order: the longest first, so that a chunk's items are alike; equal ones by place."""
        collator = getattr(self.embedder, "collator", None)
        lengths = [len(one.text) for one in items] if collator is None else collator.measure(items, "gen")
        return sorted(range(len(items)), key=lambda i: (-lengths[i], i))

    # --- scoring -----------------------------------------------------------------------------------------------------

    def score(self, task: Task, ties: str, dims: Sequence[int]) -> TaskResult:
        """Every pairing of the run's modes, and what they cost."""
        data, metric = self.data(task), task.metric
        stored = {side: self._read(task, side) for side in SIDES}
        rows = {(side, mode): _embedding(stored[side], mode) for side in SIDES for mode in self.modes}

        def cell(query: str, target: str, dim: int | None) -> CellScore:
            sides = truncated(rows["qry", query], dim), truncated(rows["tgt", target], dim)
            return score_cell(data, metric, *sides, ties)

        cells = {f"{q}-{t}": cell(q, t, None) for q in self.modes for t in self.modes}
        budget = None
        if "gen-disc" in cells and "disc-disc" in cells:
            disc, tokens = cells["disc-disc"], stored["qry"]["gen"].tokens
            budget = budget_points(disc.main, cells["gen-disc"].main, disc.margins, tokens, metric)
        same = [cells[f"{mode}-{mode}"].main for mode in self.modes]
        width = rows["qry", self.modes[0]].shape[1]
        return TaskResult(
            name=task.name,
            modality=task.modality,
            group=task.group,
            metric=metric,
            cells=cells,
            oracle=torch.stack(same).amax(dim=0).mean().item() if len(same) > 1 else None,
            dims={
                dim: {f"{q}-{t}": cell(q, t, dim).main.mean().item() for q in self.modes for t in self.modes}
                for dim in dims
                if dim < width
            },
            cost={mode: self._cost(stored, mode) for mode in self.modes},
            cosine={mode: {SIDES[side]: mean_cosine(rows[side, mode]) for side in SIDES} for mode in self.modes},
            notes=self._notes(task, data),
            n_queries=len(data.queries),
            n_candidates=len(data.candidates),
            labels=_labels(data),
            width=width,
            budget=budget,
        )

    def _read(self, task: Task, side: str) -> dict[str, Stored]:
        """The chunks of a side by the mode that made them: disc embeddings of their own where all are there."""
        found = {}
        for mode in dict.fromkeys((*self.made, *self.modes)):
            cache = self.caches(task, mode)[list(SIDES).index(side)]
            if not cache.missing():
                found[mode] = cache.read()
        return found

    def _cost(self, stored: dict[str, dict[str, Stored]], mode: str) -> dict[str, float]:
        """Per item: decoded tokens and seconds; counts of generations without <gen_emb> and without the form."""
        cost: dict[str, float] = {"missing_gen": 0, "format_errors": 0}
        for side, name in SIDES.items():
            alone = mode in stored[side]
            one = stored[side][mode if alone else "gen"]
            n = len(one.tokens)
            cost[f"{name}_seconds"] = (one.seconds if alone else one.disc_seconds) / n
            cost[f"{name}_tokens"] = mean(one.tokens) if mode == "gen" else 0.0
            if mode == "gen":
                cost["missing_gen"] += one.reached.count(False)
                cost["format_errors"] += one.well_formed.count(False)
        return cost

    def _notes(self, task: Task, data: TaskData) -> dict[str, Any]:
        notes = dict(data.notes)
        if self.limit is None and task.expected_queries not in (None, len(data.queries)):
            notes["queries_expected"] = task.expected_queries
        return notes


def _watch_memory(embedder: Any) -> Callable[[], int]:
    """Starts counting; called, it gives the peak of allocated bytes on the embedder's device since (0 on the CPU)."""
    device = getattr(embedder, "device", None)
    if device is None or device.type != "cuda":
        return lambda: 0
    torch.cuda.reset_peak_memory_stats(device)
    return partial(torch.cuda.max_memory_allocated, device)


def _embedding(stored: dict[str, Stored], mode: str) -> torch.Tensor:
    if mode in stored:
        return stored[mode].embedding
    disc = stored["gen"].disc
    assert disc is not None
    return disc


def _labels(data: TaskData) -> list[tuple[list[str], list[float] | None]]:
    """Names of what is right and its relevance, of each query, for the files of predictions."""
    gains = data.gains or [None] * len(data.queries)  # type: ignore[list-item]
    return [([data.names[row] for row in own], gain) for own, gain in zip(data.correct, gains, strict=True)]
