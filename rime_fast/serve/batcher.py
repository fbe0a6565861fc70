"""Items of many requests through one model: batches by token budget, a bounded queue, a stop that drains."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from rime_fast.data.records import Side


class QueueFull(Exception):
    """The error of more items than the queue may hold."""


class Stopped(Exception):
    """The error of items that come after the batcher's end."""


@dataclass
class Job:
    """One item in the queue: its mode, its tokens (what it will decode included), and where its result goes."""

    side: Side
    mode: str
    tokens: int
    result: Future = field(default_factory=Future)


class Batcher:
    """Runs jobs on a thread of its own, which is the only user of the model.

    run: (mode, sides) -> a result for each, in order. token_budget: (items of a batch) x (its longest) stays within
    it. A batch is whatever waits when the model is free, the oldest item first and others of its mode with it: alone
    under no load, large under much. max_queue: items that may wait. on_batch: called with (mode, items, seconds).
    """

    def __init__(
        self,
        run: Callable[[str, list[Side]], Sequence[Any]],
        token_budget: int,
        max_queue: int,
        on_batch: Callable[[str, int, float], None] = lambda mode, items, seconds: None,
    ) -> None:
        self.run, self.token_budget, self.max_queue, self.on_batch = run, token_budget, max_queue, on_batch
        self._waiting: deque[Job] = deque()
        self._change = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._loop, name="rime-fast-batcher", daemon=True)
        self._thread.start()

    def __len__(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    def submit(self, jobs: Sequence[Job]) -> list[Future]:
        """Queue all of them or none. Raises QueueFull, or Stopped after ``close``."""
        with self._change:
            if self._stopped:
                raise Stopped
            if len(self._waiting) + len(jobs) > self.max_queue:
                raise QueueFull
            self._waiting.extend(jobs)
            self._change.notify()
        return [job.result for job in jobs]

    def close(self) -> None:
        """Take nothing more, finish what waits, end the thread."""
        with self._change:
            self._stopped = True
            self._change.notify()
        self._thread.join()

    def _loop(self) -> None:
        while True:
            with self._change:
                self._change.wait_for(lambda: self._waiting or self._stopped)
                if not self._waiting:
                    return
                batch = self._take()
            if not batch:  # all of them were given up
                continue
            begin = time.perf_counter()
            self._answer(batch)
            self.on_batch(batch[0].mode, len(batch), time.perf_counter() - begin)

    def _take(self) -> list[Job]:
        """The oldest job and, in order of arrival, others of its mode that fit beside it."""
        mode, longest = self._waiting[0].mode, 0
        batch: list[Job] = []
        left: deque[Job] = deque()
        for job in self._waiting:
            wide = max(longest, job.tokens)
            if job.mode != mode or (batch and wide * (len(batch) + 1) > self.token_budget):
                left.append(job)
                continue
            longest = wide
            if job.result.set_running_or_notify_cancel():
                batch.append(job)
        self._waiting = left
        return batch

    def _answer(self, batch: list[Job]) -> None:
        try:
            for job, result in zip(batch, self.run(batch[0].mode, [job.side for job in batch]), strict=True):
                job.result.set_result(result)
        except Exception as error:
            if len(batch) == 1:
                batch[0].result.set_exception(error)
                return
            for job in batch:  # one bad item must not take the others with it
                if not job.result.done():
                    self._answer([job])
