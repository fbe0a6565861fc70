"""Going on from a checkpoint: what of the model it must share with this run, and weights and states that do not fit.

Settings, data and what is found here make up a run's facts (``checkpoint.compare``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

from rime_fast.data.collate import Collator
from rime_fast.engine import checkpoint
from rime_fast.engine.anchor_bank import model_fingerprint
from rime_fast.engine.background_save import ShardedCheckpoints
from rime_fast.engine.wrappers import whole_parameters

OPTIMIZER = ("betas", "eps", "weight_decay")  # of a parameter group: the settings', not the checkpoint's
# of an adapter's config: where it came from and how it is run, not what it computes
_ADAPTER_FREE = {"auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision"}
_ADAPTER_FREE |= {"runtime_config", "task_type"}


class ResumedRuns(ShardedCheckpoints):
    """Resumes transformers' Trainer from a checkpoint of a run that is the same, or whose differences are named."""

    args: Any
    collator: Collator
    interrupt: Any
    _differs = ""  # how this run differs from the one that it goes on with

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share a global batch; None for one process."""
        return dist.group.WORLD if self.args.world_size > 1 else None

    def frozen_part(self) -> nn.Module | None:
        """The part of the model that a checkpoint lacks, or that is not trained: what lies below an adapter or a head.
        Subclasses extend."""
        below = adapter_of(self.model) is not None or getattr(self.args, "head", None) is not None
        return self.model if below else None

    def model_facts(self) -> dict[str, Any]:
        """Collect the facts of model and prompts. Every rank calls it, before a checkpoint is loaded."""
        found: dict[str, Any] = {"adapter": adapter_of(self.model), "prompts": prompts_of(self.collator)}
        part = self.frozen_part()
        if part is not None:
            with whole_parameters(part):
                found["base model"] = model_fingerprint(part, frozen=True)
        return found

    def compared(self, folder: str, facts: dict[str, Any]) -> str:
        """Compare a checkpoint with this run's facts (those of the first rank, which writes them): what to tell. Every
        rank calls it. Raises ValueError for a run that differs and ``accept_changes=False``."""
        given = [facts]
        if self.group is not None:
            dist.broadcast_object_list(given, src=0, group=self.group)
        accept = self.args.accept_changes
        told = self._differs = checkpoint.compare(folder, given[0], accept)
        if not checkpoint.has_optimizer(folder):
            text = f"{folder} holds no optimizer's state (save_only_model=True?)"
            if not accept:
                raise ValueError(f"{text}; set accept_changes to go on with a fresh optimizer and schedule")
            told = f"{told}\n{text}: going on with a fresh optimizer and schedule"
        return told

    def rate_change(self, folder: str | None, name: str) -> float:
        """Compute the factor by which a learning rate differs from the checkpoint's (1 where that is not known, or was
        0)."""
        before = (checkpoint.facts_of(folder) or {}).get(checkpoint.MAY_CHANGE, {}).get(name)
        return getattr(self.args, name) / before if before else 1.0

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """As transformers'. Raises ValueError for weights that do not fit, or are an adapter's and this model has
        none."""
        with self._fitting(resume_from_checkpoint, "weights"):
            adapter = bool([*Path(resume_from_checkpoint).glob("**/adapter_model.*")])
            if adapter != (adapter_of(self.model) is not None) and not self.is_fsdp_enabled:
                raise ValueError(f"they are {'an adapter' if adapter else 'a whole model'}'s")
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, folder: str | None) -> None:
        """As transformers'; a learning rate or a schedule that changed takes effect from the first step on, where the
        checkpoint's would be restored, and so do the optimizer's other settings. Raises ValueError for the state of
        another optimizer or of other weights."""
        if folder is None:
            return
        optimizer: Any = self.optimizer
        before = [dict(group) for group in optimizer.param_groups]
        with self._fitting(folder, "optimizer's states"):
            super()._load_optimizer_and_scheduler(folder)
            for own, group in zip(before, optimizer.param_groups, strict=True):
                if missing := sorted(own.keys() - group.keys() - {"initial_lr"}):
                    raise ValueError(f"another optimizer's, without {', '.join(missing)}")
                group.update({name: own[name] for name in OPTIMIZER if name in own})
        factor = self.rate_change(folder, "learning_rate")
        scheduler: Any = self.lr_scheduler
        if hasattr(scheduler, "base_lrs") and checkpoint.has_optimizer(folder):
            scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
            for place, (group, rate) in enumerate(zip(optimizer.param_groups, scheduler.base_lrs, strict=True)):
                group["lr"], group["initial_lr"] = group["lr"] * factor, rate
                if hasattr(scheduler, "lr_lambdas"):  # this run's: it may be longer, or of another form
                    group["lr"] = rate * scheduler.lr_lambdas[place](scheduler.last_epoch)
            scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]

    def _determine_best_metric(self, *args: Any, **kwargs: Any) -> bool:
        """As transformers', which with ``save_strategy="best"`` saves by it: also where a run stops."""
        return super()._determine_best_metric(*args, **kwargs) or self.interrupt.stopped

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers'. A run that was stopped is not at its end: transformers would load the best model, and with
        ``save_total_limit=1`` remove every other checkpoint, the one that the run goes on from among them."""
        best = self.state.best_model_checkpoint
        if self.interrupt.stopped:
            self.state.best_model_checkpoint = None
        try:
            return super()._finalize_training(*args, **kwargs)
        finally:
            self.state.best_model_checkpoint = best

    @contextmanager
    def _fitting(self, folder: str, what: str) -> Iterator[None]:
        """Name what changed where a checkpoint cannot be loaded in this block."""
        try:
            yield
        except (ValueError, KeyError, RuntimeError) as error:
            found = " ".join(f"{type(error).__name__}: {error}".split()).removeprefix("ValueError: ")
            changes = "".join(f"; {line}" for line in self._differs.splitlines())
            raise ValueError(f"the {what} of {folder} do not fit this run: {found[:300]}{changes}") from error


def adapter_of(model: Any) -> dict[str, Any] | None:
    """The config of a model's adapter as plain values, without what is off; None where there is no adapter."""
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    config = configs.get(getattr(model, "active_adapter", None)) or next(iter(configs.values()))
    plain = {name: sorted(map(str, x)) if isinstance(x, set) else x for name, x in config.to_dict().items()}
    return {name: value for name, value in plain.items() if value and name not in _ADAPTER_FREE}


def prompts_of(collator: Collator) -> dict[str, Any]:
    """What makes prompt and response of a side: the template's texts, and how large images may be."""
    template, vision = collator.template, collator.vision
    found: dict[str, Any] = {"image pixels": [vision.min_pixels, vision.max_pixels]}
    for field in fields(template):
        value = getattr(template, field.name)
        plain = isinstance(value, (str, bool, type(None)))
        found[field.name] = value if plain else getattr(value, "__qualname__", type(value).__qualname__)
    return found
