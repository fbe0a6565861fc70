"""What a run tells and hears: metrics without host synchronisation, progress for people, Ctrl-C, other events."""

from __future__ import annotations

import atexit
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import get_annotations
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from transformers import TrainerCallback, TrainerState, TrainingArguments

from rime_fast.model.flops import recomputed
from rime_fast.trainers.config import CommonConfig

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
    "format_failed",
    "unfinished",
    "skipped_steps",
    "left_out_rows",
)
RATES = ("samples_per_second", "tokens_per_second")
SHARES = ("mfu", "data_wait")


def summary(logs: Mapping[str, Any], limit: int = 11) -> str:
    """Write the log as one short line: loss terms, then rates."""
    names = []
    for pattern in SHOWN:
        prefix = pattern.removesuffix("*")
        names += [n for n in logs if (n.startswith(prefix) if pattern.endswith("*") else n == pattern)]
    parts = [f"{name} {logs[name]:.3g}" for name in names[:limit]]
    parts += [f"{logs[name]:,.0f} {name.split('_')[0]}/s" for name in RATES if name in logs]
    parts += [f"{name} {logs[name]:.1%}" for name in SHARES if logs.get(name, 0.0) >= 0.005]
    return "  ".join(parts)


def tell(text: str) -> None:
    """Print a line for people, whatever the level of transformers' logger."""
    if text:
        print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Write seconds as 12:34, or 1:23:45."""
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
        self.warning = ""  # printed with the next log
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
        if self.warning:
            self._print(f"step {state.global_step}  warning: {self.warning}")
            self.warning = ""
        if any(name.startswith("eval_") for name in logs):
            numbers = [f"{n} {v:.4g}" for n, v in logs.items() if n.startswith("eval_") and isinstance(v, float)]
            self._print(f"step {state.global_step}  " + "  ".join(numbers))
        elif "loss" in logs and self.bar is not None:
            self.bar.update(self.task, line=summary(logs))
        elif "loss" in logs:
            spent = time.perf_counter() - self.begin
            done = max(state.global_step - self.first_step, 1)
            left = spent / done * (state.max_steps - state.global_step)
            at = f"{state.global_step}/{state.max_steps}  {clock(spent)}  ETA {clock(left)}"
            self._print(f"{at}  {summary(logs)}")

    def _print(self, text: str) -> None:
        """One line, however wide the console is."""
        self.console.print(f"{self.title}: {text}", markup=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the terminal (also after an error)."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


class InterruptCallback(TrainerCallback):
    """Ctrl-C (SIGINT) and SIGTERM end training after the current step, with a checkpoint.

    Further signals within ``PATIENCE`` seconds count as the same one (srun and torchrun both send one; so does a
    scheduler to the whole group), also where they come after the run's end: the process keeps its exit code. While a
    checkpoint is written (``saving``, ``writing()``) none ends the run; later ones do at once. Several ranks agree at
    every step, over the host: the signal may reach them in different steps.
    """

    PATIENCE = 10.0

    def __init__(self, writing: Callable[[], bool]) -> None:
        self.requested = self.stopped = self.saving = False
        self.since, self.writing = 0.0, writing
        self.hosts: dist.ProcessGroup | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGINT and SIGTERM in this block; does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

        def ask(number: int, frame: Any) -> None:
            if self.requested:
                if self.saving or self.writing() or self._same():
                    return
                raise KeyboardInterrupt
            self.requested, self.since = True, time.monotonic()
            text = f"stopping after this step, with a checkpoint (again after {self.PATIENCE:.0f} s to stop at once)"
            print(f"\n{text}", file=sys.stderr, flush=True)

        for number in before:
            signal.signal(number, ask)
        try:
            yield
        finally:
            self._give_back(before)

    def _same(self) -> bool:
        """Whether a signal that comes now counts as the one that was heard."""
        return time.monotonic() - self.since < self.PATIENCE

    def _give_back(self, before: Mapping[int, Any]) -> None:
        """Let signals go where they went; after a request only from when another one is meant."""

        def late(number: int, frame: Any) -> None:
            if not self._same():
                signal.signal(number, before[number])
                os.kill(os.getpid(), number)

        def shut() -> None:  # a Python handler does not live through the interpreter's end, this does
            for number in before:
                if signal.getsignal(number) is late and self._same():
                    signal.signal(number, signal.SIG_IGN)

        for number, handler in before.items():
            signal.signal(number, late if self.requested else handler)
        if self.requested:
            atexit.register(shut)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1 and self.hosts is None:
            gloo = dist.get_backend() == "gloo"
            self.hosts = dist.group.WORLD if gloo else dist.new_group(backend="gloo")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        requested = self.requested
        if args.world_size > 1:
            flag = torch.tensor(float(requested))
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.hosts)
            requested = bool(flag)
        if requested:
            self.stopped = True
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.stopped:  # transformers ends an epoch wherever it is left; a whole one's figures are saved as well
            whole = float(state.epoch).is_integer()
            control.should_log = control.should_log and whole
            control.should_evaluate = control.should_evaluate and whole
            control.should_save = control.should_log or control.should_evaluate
        return control


class EndsCallback(TrainerCallback):
    """Has every run tell of its last step, and one shorter than ``logging_steps`` of its first; no run begins later."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (at := state.global_step) > state.max_steps:
            raise ValueError(f"checkpoint-{at} is after the last of {state.max_steps} steps; expected an older one")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if args.logging_strategy == "steps":
            first = state.global_step == 1 and state.max_steps < state.logging_steps
            control.should_log |= first or state.global_step == state.max_steps
        return control


class On(TrainerCallback):
    """Calls functions at a trainer's events: ``On(on_train_begin=f)`` calls ``f()``."""

    def __init__(self, **actions: Callable[[], Any]) -> None:
        for event, action in actions.items():
            setattr(self, event, self._handler(action))

    @staticmethod
    def _handler(action: Callable[[], Any]) -> Callable[..., None]:
        def handle(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            action()

        return handle


# --- metrics: summed on the device in the step, read once per logging step -------------------------------------------


class MetricSums:
    """Running means of 0-d tensors, and running totals of host numbers.

    ``add`` costs two small kernels, ``drain`` one transfer (and one all-reduce between ranks). Ranks must add the
    same names; a name's mean is over every value added on any rank, by weight.

    finite: values that are not finite do not count; the mean of a name without any other is NaN.
    """

    def __init__(self, finite: bool = False) -> None:
        self.finite = finite
        self._sums: dict[tuple[str, ...], Tensor] = {}
        self._adds: dict[tuple[str, ...], float | Tensor] = {}
        self._totals: dict[str, float] = {}

    def add(self, values: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Add one observation of each name; tensors 0-d, on one device. Gradients are not followed.

        weight: of what each value is a mean over (tokens), where observations differ in it.
        """
        if not values:
            return
        names = tuple(values)
        stacked = torch.stack([value.detach().float() for value in values.values()])
        if weight != 1.0:
            stacked = stacked * weight
        adds: float | Tensor = weight
        if self.finite:
            good = stacked.isfinite()
            stacked, adds = torch.where(good, stacked, 0.0), good * weight
        if names in self._sums:
            self._sums[names] += stacked
            self._adds[names] += adds
        else:
            self._sums[names], self._adds[names] = stacked, adds

    def count(self, **amounts: float) -> None:
        """Add host numbers to totals (tokens, samples)."""
        for name, amount in amounts.items():
            self._totals[name] = self._totals.get(name, 0.0) + amount

    def drain(self, device: torch.device, group: dist.ProcessGroup | None = None) -> dict[str, float]:
        """Give the mean of every name and total of every count since the last call, over the ranks of ``group``;
        empties them."""
        layout = sorted(self._sums)
        parts = []
        for names in layout:
            adds = torch.as_tensor(self._adds[names], dtype=torch.float64).expand(len(names))
            parts += [self._sums[names].to(torch.float64), adds]
        totals = sorted(self._totals)
        parts.append(torch.tensor([self._totals[name] for name in totals], dtype=torch.float64))
        packed = torch.cat([part.to(device, torch.float64) for part in parts])
        if group is not None:
            dist.all_reduce(packed, group=group)
        numbers = packed.tolist()
        values: dict[str, list[float]] = {}
        at = 0
        for names in layout:
            for i, name in enumerate(names):
                pair = values.setdefault(name, [0.0, 0.0])
                pair[0] += numbers[at + i]
                pair[1] += numbers[at + len(names) + i]
            at += 2 * len(names)
        result = {name: total / weight if weight else math.nan for name, (total, weight) in values.items()}
        result |= dict(zip(totals, numbers[at:], strict=True))
        self._sums, self._adds, self._totals = {}, {}, {}
        return result


def tokens_of(inputs: dict[str, Any]) -> int:
    """Count the tokens of a packed batch, known on the host."""
    ids = inputs.get("input_ids")
    return 0 if ids is None else ids.shape[0]


class StepClock:
    """Seconds of training between two readings; evaluation and saving are left out (``paused``)."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    def restart(self) -> None:
        self._start = time.perf_counter()

    def lap(self) -> float:
        """Give the seconds since the last lap, pauses not counted; at least 1e-9."""
        now = time.perf_counter()
        seconds, self._start = now - self._start, now
        return max(seconds, 1e-9)

    @contextmanager
    def paused(self) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._start += time.perf_counter() - begin


def rates(gathered: dict[str, float], seconds: float, world: int, peak: float | None) -> dict[str, float]:
    """Compute what a log says of speed, from totals over all ranks, which it takes out of ``gathered``.

    data_wait: share of the time that ranks waited for batches. mfu, hfu: of ``peak``, FLOP/s of one device, what the
    model needed and what was run (recomputation counts); left out where either is not known.
    """
    found = {f"{name}_per_second": gathered.pop(name, 0.0) / seconds for name in ("samples", "tokens")}
    found["data_wait"] = gathered.pop("data_wait", 0.0) / (seconds * world)
    needed, executed = gathered.pop("flop", 0.0), gathered.pop("executed_flop", 0.0)
    if peak is not None and needed:
        found |= {"mfu": needed / (seconds * world * peak), "hfu": executed / (seconds * world * peak)}
    return found


# --- what a model card says of a run, as plain values -----------------------------------------------------------------

# transformers' own settings that decide what was learnt; ours are all told
_STOCK = (
    *("num_train_epochs", "max_steps", "gradient_accumulation_steps", "weight_decay", "max_grad_norm", "optim"),
    *("bf16", "fp16", "seed", "world_size"),
)
_LEFT_OUT = ("progress", "report_to", "logging_steps", "logging_nan_inf_filter", "remove_unused_columns", "image_root")


def settings_of(args: CommonConfig) -> dict[str, Any]:
    """The recipe's fields and the deciding ones of transformers, by name."""
    classes = [cls for cls in reversed(type(args).__mro__) if not issubclass(TrainingArguments, cls)]
    own = [name for cls in classes for name in get_annotations(cls) if hasattr(args, name)]
    chosen = {name: getattr(args, name) for name in (*own, *_STOCK) if name not in _LEFT_OUT}
    plain = (int, float, str, type(None))
    return {name: value if isinstance(value, plain) else str(value) for name, value in chosen.items()}


# settings that change how a run is computed or told, not what it learns; and those that may change while resuming
_FREE = {"micro_batch_tokens", "kept_graphs_gib", "vision_features_on_host", "bank_storage", "anchor_bank"}
_FREE |= {"rollout_batch", "check_data", "on_bad_row", "attn_implementation", "model_dtype", "on_nonfinite"}
_FREE |= {"peak_tflops", "overwrite_output_dir", "accept_changes", "trust_checkpoint", "learning_rate", "async_save"}
_FREE |= {"temperature_learning_rate", "num_train_epochs", "max_steps", "negatives", "negative", *_LEFT_OUT}
_COUNTS: tuple[str, ...] = (
    "seed",
    "data_seed",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "bf16",
)
_COUNTS += ("fp16", "weight_decay", "max_grad_norm", "optim", "train_sampling_strategy", "dataloader_drop_last")
_COUNTS += ("adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "optim_target_modules", "lr_scheduler_kwargs")
_COUNTS += ("ignore_data_skip",)


def settings_that_count(args: CommonConfig) -> dict[str, Any]:
    """The settings that a resumed run must share with its checkpoint's."""
    found = {name: value for name, value in settings_of(args).items() if name not in _FREE}
    return found | {name: str(getattr(args, name)) for name in _COUNTS}


def card_facts(model: Any, args: CommonConfig, state: TrainerState, dataset: Any) -> dict[str, Any]:
    """What the model card says of a run, by name."""
    config = (model.get_base_model() if hasattr(model, "get_base_model") else model).config
    return {
        "base_model": getattr(config, "_name_or_path", "") or None,
        "template": args.template,
        **{name: getattr(config, name, None) for name in ("matryoshka_dimensions", "int8_step")},
        "step": state.global_step,
        "epoch": state.epoch,
        "settings": settings_of(args) | {"recomputed towers": recomputed(model)},
        "data": data_of(dataset),
        "results": results_of(state.log_history),
    }


def data_of(dataset: Any) -> dict[str, int]:
    """Count the rows of each file (or other source) of a training set."""
    parts: Sequence[Any] = getattr(dataset, "datasets", None) or [dataset]
    named = {}
    for part in parts:
        if part is not None and hasattr(part, "__len__"):
            named[str(getattr(part, "name", type(part).__name__))] = len(part)
    return named


def results_of(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The last value of every number that was logged."""
    found: dict[str, float] = {}
    for entry in history:
        found |= {name: value for name, value in entry.items() if isinstance(value, (int, float))}
    return {name: value for name, value in found.items() if name not in ("step", "epoch", "total_flos")}
