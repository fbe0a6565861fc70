"""What the public functions of the log-prob operator accept: checks, autocast, and the packed form of a call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rime_fast.ops import checks as check
from rime_fast.ops.dispatch import BackendTable
from rime_fast.ops.logprob_pool import vocab_parallel
from rime_fast.ops.logprob_pool.problem import Needs, Options

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Pool = Tensor | tuple[Tensor, Tensor]


class Call(NamedTuple):
    """One checked call. K = all read-outs of all pools together, in the order of ``names``."""

    hidden: Tensor  # [T, H]
    lm_head: Tensor  # [V, H]
    targets: Tensor  # [T] int64, in the whole vocabulary
    starts: Tensor  # [K] int64
    ends: Tensor  # [K] int64
    bias: Tensor | None  # [V]
    temperature: Tensor  # 0-d, fp32 or fp64
    softcap: Tensor | None  # 0-d, the same; None = no cap
    options: Options
    late: int  # columns of the whole head where targets are still to be checked (check_late), 0 where they are
    group: str  # name of the vocabulary group, "" = the head is whole
    names: tuple[str, ...]
    sizes: tuple[int, ...]

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """What a custom operator takes before the options."""
        return self[:8]


def prepare(
    hidden: Tensor,
    lm_head: Tensor,
    targets: Tensor,
    pools: Mapping[str, Pool] | None,
    bias: Tensor | None,
    temperature: float | Tensor,
    softcap: float | None,
    ignore_index: int,
    entropy: bool,
    normalize: bool,
    backend: str,
    vocab_group: ProcessGroup | None,
    max_scored: int | None,
    table: BackendTable,
) -> Call:
    """Check every argument of a call, choose its backend and bring it into the form the operators take."""
    check.check_tensor("hidden", hidden, shape=("T", "H"), dtypes=check.FLOATS)
    rows, width = hidden.shape
    device = hidden.device
    check.check_tensor("lm_head", lm_head, shape=("V", width), dtypes=check.FLOATS, device=device)
    hidden, lm_head = _autocast(hidden, lm_head)
    if lm_head.dtype != hidden.dtype:
        raise TypeError(
            f"lm_head: expected the dtype of hidden ({_name(hidden.dtype)}), got {check.describe(lm_head)}; "
            "cast one of them or use torch.autocast"
        )
    if width == 0 or (lm_head.shape[0] == 0 and vocab_group is None):
        raise ValueError(f"lm_head: expected V >= 1 and H >= 1, got {check.describe(lm_head)}")
    check.check_tensor("targets", targets, shape=(rows,), dtypes=check.INDICES, device=device)
    if bias is not None:
        check.check_tensor("bias", bias, shape=(lm_head.shape[0],), dtypes=check.FLOATS, device=device)
    if softcap is not None:
        check.check_number("softcap", softcap)
        check.check_positive("softcap", softcap)
    check.check_int("ignore_index", ignore_index)
    check.check_flag("entropy", entropy)
    check.check_flag("normalize", normalize)
    vocabulary, vocab_start, group = lm_head.shape[0], 0, ""
    if vocab_group is not None:
        vocabulary, vocab_start, group = vocab_parallel.shard(lm_head, vocab_group)
    targets = targets.long()
    bound = -1 if max_scored is None else _bound(max_scored)
    if device.type == "cpu":
        _check_targets(targets, vocabulary, ignore_index, bound)
    names, sizes, starts, ends = _pack_pools(pools, rows, device)
    scale = _scalar("temperature", temperature, hidden)
    cap = None if softcap is None else _scalar("softcap", softcap, hidden)
    chosen = table.choose(backend, hidden)
    if chosen == "reference" and group:
        raise ValueError("vocab_group: the reference backend works on a whole head; use backend='chunked'")
    if chosen != "reference":
        for name, tensor in (("hidden", hidden), ("lm_head", lm_head), ("bias", bias), ("temperature", scale)):
            check.refuse_forward_ad(name, [tensor])
    elif device.type != "cpu":  # the fused backends check late
        _check_targets(targets, vocabulary, ignore_index, bound)
    late = 0 if device.type == "cpu" or chosen == "reference" else vocabulary
    grad = torch.is_grad_enabled()
    asked = (grad and t is not None and t.requires_grad for t in (hidden, lm_head, bias, scale))
    options = Options(chosen, ignore_index, entropy, normalize, bound, vocab_start, Needs(*asked))
    return Call(hidden, lm_head, targets, starts, ends, bias, scale, cap, options, late, group, names, sizes)


def check_late(call: Call) -> None:
    """Check the targets of a call whose operator has been called, on a device: the assertions' launches do not hold up
    its first product, and no kernel follows a target out of its row."""
    if call.late:
        _check_targets(call.targets, call.late, call.options.ignore_index, call.options.max_scored)


def check_weight(token_weight: Tensor | None, hidden: Tensor) -> Tensor | None:
    """Check token_weight and give it as fp32 [T] (fp64 beside fp64 hidden states); None, 1 everywhere, as it is."""
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if token_weight is None:
        return None
    shape, device = (hidden.shape[0],), hidden.device
    check.check_tensor("token_weight", token_weight, shape=shape, dtypes=check.FLOATS, device=device)
    return token_weight.to(dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _autocast(hidden: Tensor, lm_head: Tensor) -> tuple[Tensor, Tensor]:
    """Under torch.autocast the operands take its dtype, as those of a linear layer do; the results stay fp32."""
    kind = hidden.device.type
    if hidden.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return hidden, lm_head
    dtype = torch.get_autocast_dtype(kind)
    return hidden.to(dtype), lm_head.to(dtype)


def _scalar(name: str, value: float | Tensor, hidden: Tensor) -> Tensor:
    """A 0-d tensor beside hidden, fp32 (fp64 beside fp64), above 0; keeps the graph of a given tensor."""
    check.check_positive(name, value)
    dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32
    if not isinstance(value, Tensor):
        return torch.full((), value, dtype=dtype, device=hidden.device)
    good = value.detach()
    check.require((good > 0) & (good < torch.inf), f"{name}: expected a value above 0, and finite")
    return value.to(device=hidden.device, dtype=dtype)


def _check_targets(targets: Tensor, vocabulary: int, ignore_index: int, bound: int) -> None:
    """Every target is ignored or in [0, V), and no more rows than ``bound`` (-1 = unknown) are scored."""
    good = (targets.clamp(0, vocabulary - 1) == targets) | (targets == ignore_index)
    message = f"targets: expected values in [0, {vocabulary}) or ignore_index ({ignore_index})"
    if targets.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(good.all()):
        row = int((~good).to(torch.int8).argmax())
        raise ValueError(f"{message}, got {int(targets[row])} at row {row}")
    check.require(good, message)
    if 0 <= bound < targets.shape[0]:
        scored = (targets != ignore_index).sum()
        check.require(scored <= bound, f"max_scored: more than {bound} rows of targets are scored")


def _bound(max_scored: int) -> int:
    check.check_int("max_scored", max_scored)
    if max_scored < 0:
        raise ValueError(f"max_scored: expected a number of rows, got {max_scored}")
    return max_scored


def _pack_pools(
    pools: Mapping[str, Pool] | None, rows: int, device: torch.device
) -> tuple[tuple[str, ...], tuple[int, ...], Tensor, Tensor]:
    """(names, sizes, starts [K], ends [K]) of all read-outs; an index i is the span [i, i + 1)."""
    if pools is not None and not isinstance(pools, Mapping):
        came = check.describe(pools)
        raise TypeError(f"pools: expected a dict name -> index [N] or (starts [N], ends [N]), got {came}")
    names: list[str] = []
    sizes: list[int] = []
    starts: list[Tensor] = []
    ends: list[Tensor] = []
    for name, pool in (pools or {}).items():
        label = f"pools[{name!r}]"
        if isinstance(pool, (tuple, list)):
            if len(pool) != 2:
                raise ValueError(f"{label}: expected (starts, ends), got {len(pool)} entries")
            first, last = pool
            check.check_tensor(f"{label} starts", first, shape=("N",), dtypes=check.INDICES, device=device)
            check.check_tensor(f"{label} ends", last, shape=(first.shape[0],), dtypes=check.INDICES, device=device)
            check.require_range(f"{label} starts", first, 0, rows)
            check.require_range(f"{label} ends", last, 1, rows + 1)
            check.require(last > first, f"{label}: expected starts < ends")
        else:
            check.check_tensor(label, pool, shape=("N",), dtypes=check.INDICES, device=device)
            check.require_range(label, pool, 0, rows)
            first, last = pool, pool + 1
        names.append(name)
        sizes.append(first.shape[0])
        starts.append(first.long())
        ends.append(last.long())
    if not names:
        none = torch.empty(0, dtype=torch.int64, device=device)
        return (), (), none, torch.empty_like(none)
    return tuple(names), tuple(sizes), torch.cat(starts), torch.cat(ends)
