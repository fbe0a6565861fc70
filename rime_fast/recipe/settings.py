"""Settings with their help texts: how a field is written and checked; those of the contrast, of teachers, of latents.

In the help texts [known] marks what is published (the source is named) and [ours] what the RIME paper does not publish.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

OBJECTIVES = ("joint", "sft", "contrastive")


def option(default: Any, text: str) -> Any:
    """Declare a dataclass field with its help text."""
    return field(default=default, metadata={"help": text})


def one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(map(repr, allowed))}")


def in_range(
    name: str,
    value: Any,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    endless: bool = False,
) -> None:
    """Raise ValueError for what is no number of the range. endless: infinity is one."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
    inside = number and low <= value <= high and not (open_low and value == low) and not (open_high and value == high)
    if not inside or (value == math.inf and not endless):
        bounds = f"{'>' if open_low else '>='} {low:g}"
        bounds += "" if high == math.inf else f" and {'<' if open_high else '<='} {high:.10g}"
        raise ValueError(f"{name} is {value!r}; expected a {'finite ' if inside else ''}number {bounds}")


def whole_numbers(settings: Any) -> None:
    """Raise ValueError for a value of a dataclass that is no int where its field is one."""
    for one in fields(settings):
        value = getattr(settings, one.name)
        whole = one.type in (int, "int", int | None, "int | None")  # HfArgumentParser takes the None out of some
        if whole and type(value) is not int and not (value is None and one.default is None):
            raise ValueError(f"{one.name} is {value!r}; expected a whole number")


# TrainingArguments' own that are at least this, or None where that is their default
STOCK_AT_LEAST = dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), 1)
STOCK_AT_LEAST |= dict.fromkeys(("gradient_accumulation_steps", "save_total_limit"), 1)
STOCK_AT_LEAST |= dict.fromkeys(("learning_rate", "weight_decay", "max_grad_norm", "warmup_steps"), 0)
STOCK_AT_LEAST |= dict.fromkeys(("eval_accumulation_steps", "dataloader_prefetch_factor"), 1)
STOCK_AT_LEAST |= dict.fromkeys(("adam_epsilon", "dataloader_num_workers", "eval_delay"), 0)


def check_stock(args: Any) -> None:
    """Raise ValueError naming the first of transformers' own settings that no run can have."""
    whole_numbers(args)
    empty = {one.name for one in fields(args) if one.default is None}
    for name, low in STOCK_AT_LEAST.items():
        if getattr(args, name) is not None or name not in empty:
            in_range(name, getattr(args, name), low, endless=name == "max_grad_norm")
    for name in ("adam_beta1", "adam_beta2"):
        in_range(name, getattr(args, name), 0, 1, open_high=True)
    for name in ("seed", "data_seed"):
        if getattr(args, name) is not None:
            in_range(name, getattr(args, name), 0, 2**32 - 1)  # what numpy takes
    for event in ("logging", "eval", "save"):  # below 1, a share of the run's steps
        name = f"{event}_steps"
        if getattr(args, f"{event}_strategy") == "steps" and (getattr(args, name) is not None or name not in empty):
            in_range(name, getattr(args, name), 0, open_low=True)
    in_range("num_train_epochs", args.num_train_epochs, 0, open_low=True)
    if args.max_steps == 0 or args.max_steps < -1:
        raise ValueError(f"max_steps is {args.max_steps}; expected a positive number, or -1 for num_train_epochs")


@dataclass
class ContrastSettings:
    """What the contrast of joint training compares, and how: a part of ``RimeConfig``."""

    temperature: float = option(0.02, "Contrast temperature tau; scale 1/tau = 50. [known]")
    learnable_temperature: bool = option(
        False, "Learn log tau (tau kept in [0.005, 1]); it follows the LR schedule. [ours]"
    )
    temperature_learning_rate: float = option(1e-3, "Peak learning rate of log tau when it is learnable. [ours]")
    symmetric: bool = option(
        True, "Both directions [known, UME-R1]; False: query to target only [known, Think-Then-Embed]."
    )
    detach_disc_in_cross: bool = option(
        False, "Stop-gradient on d in the cross terms: only g moves towards d. [ours, off]"
    )
    mask_false_negatives: bool = option(
        True, "A target with the positive's id or text is not a negative (equal 63-bit hashes). [ours]"
    )
    false_negative_margin: float | None = option(
        None, "Also mask keys more similar than positive + margin (cosine). None: off. [ours, off]"
    )
    hard_negatives: int | None = option(
        None, "A pair's first listed negatives that join the keys: None all of them, 0 none. [ours]"
    )
    matryoshka_dims: list[int] | None = option(  # noqa: RUF009
        None,
        "Widths that are trained beside the whole embedding (Matryoshka): the contrast is the sum over them, at the "
        "products of the whole alone. Saved in the model's config. [known: Qwen3-VL-Embedding, WeMM; off in RIME]",
    )
    matryoshka_weights: list[float] | None = option(  # noqa: RUF009
        None, "A weight for each of matryoshka_dims, then the whole embedding's. None: 1 each. [known: 1]"
    )
    int8_weight: float = option(
        0.0,
        "Above 0: the contrast once more, by this weight, of the embeddings rounded to int8 by one learned step (LSQ), "
        "saved in the model's config for `embed --precision int8`. [known, Qwen3-VL-Embedding: loss on full and "
        "on quantised vectors; ours: weight, one step for all modes; off in RIME]",
    )

    def check_contrast(self) -> None:
        """Raise ValueError for a value out of its range, naming the field."""
        in_range("temperature", self.temperature, 0, open_low=True)
        in_range("temperature_learning_rate", self.temperature_learning_rate, 0)
        in_range("int8_weight", self.int8_weight, 0)
        if self.hard_negatives is not None:
            in_range("hard_negatives", self.hard_negatives, 0)
        if self.false_negative_margin is not None:
            in_range("false_negative_margin", self.false_negative_margin, -2, 2)
        for name in ("matryoshka_dims", "matryoshka_weights"):
            if not isinstance(getattr(self, name), (list, tuple, type(None))):
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected a list of numbers")
        widths, weights = list(self.matryoshka_dims or []), self.matryoshka_weights
        if any(type(width) is not int or width < 1 for width in widths) or widths != sorted(set(widths)):
            raise ValueError(f"matryoshka_dims is {widths}; expected ascending widths from 1")
        for weight in weights or []:
            in_range("matryoshka_weights", weight, 0)
        if weights is not None and len(weights) not in (len(widths), len(widths) + 1):
            raise ValueError(
                f"matryoshka_weights has {len(weights)} numbers; expected one for each of matryoshka_dims "
                f"({len(widths)}), then one for the whole embedding"
            )

    def contrast_widths(self, whole: int) -> tuple[list[int], list[float]] | None:
        """The widths to compare and their weights, for embeddings of ``whole`` numbers, which are always the last; None
        where only these are compared. Raises ValueError for a width beyond them."""
        if not self.matryoshka_dims:
            return None
        if self.matryoshka_dims[-1] > whole:
            raise ValueError(f"matryoshka_dims has {self.matryoshka_dims[-1]}; the model's embeddings have {whole}")
        widths = sorted({*self.matryoshka_dims, whole})
        weights = [1.0] * len(widths) if self.matryoshka_weights is None else self.matryoshka_weights
        if len(weights) != len(widths):
            raise ValueError(
                f"matryoshka_weights has {len(weights)} numbers; expected {len(widths)}, one for each of {widths}"
            )
        return widths, list(weights)


@dataclass
class DistillSettings:
    """What a teacher adds to the loss (``rime_fast/recipe/distill.py``): a part of ``RimeConfig``."""

    distill_weight: float = option(
        0.0,
        "KL to a teacher, of each mode: to the rows' `scores` over the positive and its hard negatives, or to the "
        "cosines of teacher_bank. [known: Qwen3-VL-Embedding, WeMM; ours: weight, one term a mode; off]",
    )
    distill_temperature: float | None = option(
        None, "The teacher's; the student's is temperature. None: 1 for scores, 0.02 for a bank. [ours]"
    )
    teacher_bank: str | None = option(
        None,
        "Folder made by `rime-fast embed --anchors both` with a larger model (of any size) of this training set: its "
        "cosines between the batch's queries and targets are the teacher. None: the rows' scores. [known, WeMM: idea]",
    )

    def check_distillation(self) -> None:
        """Raise ValueError for a value out of its range, naming the field."""
        in_range("distill_weight", self.distill_weight, 0)
        if self.distill_temperature is not None:
            in_range("distill_temperature", self.distill_temperature, 0, open_low=True)
        if self.teacher_bank is not None and self.distill_weight == 0:
            raise ValueError("teacher_bank is set and distill_weight is 0; expected a weight above 0")


@dataclass
class ObjectiveSettings:
    """What is trained of the recipe, and Think-Then-Embed's head on a frozen backbone
    (``rime_fast/model/embedding_head.py``): a part of ``RimeConfig``."""

    objective: str = option(
        "joint",
        "'joint': cross-entropy and contrast, by the weights below; 'sft': cross-entropy alone (a reasoner); "
        "'contrastive': contrast alone (an embedder). Template 'tte' contrasts g-g alone. [known, Think-Then-Embed]",
    )
    head: str | None = option(
        None,
        "Train a head on the states of a frozen backbone: 'self:8' (copies of its last 8 layers), 'qformer:64x8', "
        "'attention:4' or 'latent:512'. Needs freeze_backbone and objective 'contrastive'. [known, Think-Then-Embed]",
    )
    freeze_backbone: bool = option(False, "Train the head alone. [known, Think-Then-Embed]")
    head_lr: float | None = option(None, "Peak learning rate of the head; None: learning_rate. [ours]")
    state_cache: str | None = option(
        None,
        "Folder where the states that the head reads are kept, one file a sequence; None: made anew each time. [ours]",
    )

    def check_objective(self) -> None:
        """Raise ValueError for an unknown objective, or a head that cannot be trained so, naming the field."""
        one_of("objective", self.objective, OBJECTIVES)
        if self.head is None:
            for name in ("freeze_backbone", "head_lr", "state_cache"):
                if getattr(self, name):
                    raise ValueError(f"{name} is {getattr(self, name)!r}, but there is no head; set head")
            return
        if not self.freeze_backbone:
            raise ValueError(f"head is {self.head!r}, which reads a frozen backbone; set freeze_backbone")
        if self.objective != "contrastive":
            raise ValueError(f"objective is {self.objective!r}; a head ({self.head!r}) is trained by 'contrastive'")
        if self.head_lr is not None:
            in_range("head_lr", self.head_lr, 0)


@dataclass
class LatentSettings:
    """A third embedding, without decoding (``rime_fast/model/latent.py``): a part of ``RimeConfig``."""

    latent_tokens: int = option(
        0,
        "K learnable tokens behind the prompt, whose mean state is the embedding of mode 'latent'; 0: none. [known, "
        "BToks: the tokens and their mask; LaME: 8]",
    )
    latent_weight: float = option(
        1.0, "Contrast l-l of the latent embeddings, which then join Cross-Mode Alignment. [ours]"
    )
    latent_ce_weight: float = option(
        1.0, "Next-token loss of the rewrite that sees the latent tokens in place of the prompt. [known, BToks: idea]"
    )

    def check_latents(self) -> None:
        """Raise ValueError for a value out of its range, naming the field."""
        in_range("latent_tokens", self.latent_tokens, 0)
        in_range("latent_weight", self.latent_weight, 0)
        in_range("latent_ce_weight", self.latent_ce_weight, 0)
