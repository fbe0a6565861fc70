"""Progress for people: a rich bar with loss terms, samples/s, tokens/s and ETA; and what Ctrl-C does."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

# Shown first, in this order; a bar has room for about eight numbers. A trailing * stands for any ending.
SHOWN = (
    "loss",
    "ce/*",
    "contrast/*",
    "hit@1/gen-gen",
    "reward/total",
    "reward/hit",
    "rewrite_tokens",
    "kl",
    "clip_fraction",
    "group_std",
)
RATES = ("samples_per_second", "tokens_per_second")


def summary(logs: Mapping[str, Any], limit: int = 8) -> str:
    """The log as one short line: loss terms, then rates."""
    names = []
    for pattern in SHOWN:
        prefix = pattern.removesuffix("*")
        names += [n for n in logs if (n.startswith(prefix) if pattern.endswith("*") else n == pattern)]
    parts = [f"{name} {logs[name]:.3g}" for name in names[:limit]]
    parts += [f"{logs[name]:,.0f} {name.split('_')[0]}/s" for name in RATES if name in logs]
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """12:34, or 1:23:45."""
    whole = int(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"


class ProgressCallback(TrainerCallback):
    """A live bar on a terminal, one line per log elsewhere (files, CI); silent on other ranks.

    style: "rich" or "plain" (never a bar). title: what is running, e.g. "joint training".
    """

    def __init__(self, title: str, style: str = "rich", console: Console | None = None) -> None:
        self.title = title
        self.console = console or Console(stderr=True)
        self.live = style == "rich" and self.console.is_terminal
        self.bar: Progress | None = None
        self.begin, self.first_step = time.perf_counter(), 0
        self.shown = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.begin, self.first_step = time.perf_counter(), state.global_step
        if not (state.is_world_process_zero and self.live):
            return
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[line]}"),
            console=self.console,
            refresh_per_second=2,
        )
        self.task = self.bar.add_task(self.title, total=state.max_steps, completed=state.global_step, line="")
        self.bar.start()
        self.shown = state.global_step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.advance(self.task, state.global_step - self.shown)
            self.shown = state.global_step

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if any(name.startswith("eval_") for name in logs):
            numbers = [f"{n} {v:.4g}" for n, v in logs.items() if n.startswith("eval_") and isinstance(v, float)]
            self.console.print(f"{self.title}: step {state.global_step}  " + "  ".join(numbers), markup=False)
        elif "loss" in logs and self.bar is not None:
            self.bar.update(self.task, line=summary(logs))
        elif "loss" in logs:
            spent = time.perf_counter() - self.begin
            done = max(state.global_step - self.first_step, 1)
            left = spent / done * (state.max_steps - state.global_step)
            at = f"{self.title}: {state.global_step}/{state.max_steps}  {clock(spent)}  ETA {clock(left)}"
            self.console.print(f"{at}  {summary(logs)}", markup=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal (also after an error)."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class InterruptCallback(TrainerCallback):
    """Ctrl-C ends training after the current step, with a checkpoint; a second Ctrl-C ends it at once.

    Several ranks agree at the logging steps (the signal may reach them in different steps, and saving is collective).
    """

    def __init__(self) -> None:
        self.requested = False
        self.stopped = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGINT and SIGTERM in this block; does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: Any) -> None:
            if self.requested:
                raise KeyboardInterrupt
            self.requested = True
            print("\nstopping after this step, with a checkpoint (again to stop at once)", file=sys.stderr, flush=True)

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        requested = self.requested
        if args.world_size > 1:
            if not control.should_log:
                return control
            flag = torch.tensor([float(requested)], device=args.device)
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
            requested = bool(flag.item())
        if requested:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
        return control
