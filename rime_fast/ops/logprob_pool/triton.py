"""The Triton backend: host side of triton_kernels.py, with the same functions as cpu.py and cuda.py.

The backward walks the vocabulary in panels: dlogits of all scored rows for P columns in the operands' dtype, then dW of
those columns (a sum over all rows in fp32 registers, written once) and the panel's share of dX, added to the gradient
itself (fp32, or bf16 with the rounding kept beside it), which starts as the read-outs' gradient. The workspace, panel
and roundings, is within one limit (triton_tiles.plan); the scored rows, gathered once a pass, come on top. The weighted
cross-entropy runs forward and backward at once with the logits recomputed (8MHV): gradient-in-forward would need a
row's whole logits in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rime_fast.ops.logprob_pool.places import Places, gather
from rime_fast.ops.logprob_pool.problem import (
    Gradients,
    Needs,
    Problem,
    Scored,
    Spans,
    Statistics,
    Upstream,
    gradient_dtype,
    loss_slope,
    new_statistics,
    workspace_limit,
)
from rime_fast.ops.logprob_pool.read_outs import ReadOuts
from rime_fast.ops.logprob_pool.triton_tiles import (
    DLOGITS_WIDE,
    FORWARD_ROWS,
    FORWARD_WIDE,
    GROUP,
    SPLIT_COLUMNS,
    Tiles,
    capability_of,
    head_tiles,
    hidden_tiles,
    interpreted,
    plan,
    processors,
    score_tiles,
)

INTERPRETER_TMA = True  # descriptors where a GPU would take them; tests compare both


def why_not(tensor: Tensor) -> str | None:
    """The reason Triton cannot serve a call on ``tensor``, or None."""
    if tensor.dtype == torch.float64:
        return "it computes in fp32; fp64 runs on the reference"
    if not tensor.is_cuda and not (interpreted() and tensor.device.type == "cpu"):
        return f"it needs CUDA tensors (or TRITON_INTERPRET=1 for the CPU), got {tensor.device.type}"
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return None


def uses_tma(tensor: Tensor) -> bool:
    """Whether tensor descriptors load a tensor: the generation has them, and every row starts on 16 bytes."""
    aligned = tensor.stride(1) == 1 and tensor.stride(0) * tensor.element_size() % 16 == 0
    if not aligned or tensor.data_ptr() % 16:
        return False
    if not tensor.is_cuda:
        return INTERPRETER_TMA
    return capability_of(tensor)[0] in (9, 10) and tensor.element_size() == 2


def makes_plain_logits(problem: Problem) -> bool:
    """Whether the widest tiles make the statistics of this head's logits and their gradient: on sm_90, where both
    operands come by descriptors and scores are logits over a temperature."""
    plain = problem.scoring.bias is None and problem.scoring.softcap is None
    return plain and capability_of(problem.hidden)[0] == 9 and uses_tma(problem.lm_head)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _dense(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


def forward(problem: Problem) -> tuple[Statistics, ReadOuts]:
    """Compute the rows' statistics (2MHV FLOP) and the read-outs, which come from the first launch."""
    from rime_fast.ops.logprob_pool import triton_kernels as kernels
    from rime_fast.ops.logprob_pool import triton_rows

    options, (starts, ends) = problem.options, problem.spans
    scored, targets = Places(problem, 1).scored, problem.local_targets
    wide = FORWARD_WIDE if problem.scoring.bias is None else None
    run = Launch(problem, problem.scoring.softcap is not None, wide)
    t = run.tiles
    stats = new_statistics(problem.hidden, options.entropy)
    found = ReadOuts(run.empty(starts.shape[0], run.width), run.empty(starts.shape[0]))
    split = SPLIT_COLUMNS // t.BN
    splits = _cdiv(run.vocabulary, SPLIT_COLUMNS)
    for start in range(0, max(1, scored.order.shape[0]), FORWARD_ROWS):
        part = scored.part(start, FORWARD_ROWS)
        rows, read = part.order.shape[0], starts.shape[0] if start == 0 else 0
        partial = run.empty(4, splits, rows)
        if rows + read:
            x = run.gathered(part)
            kernels.forward_kernel[run.programs(max(read, _cdiv(rows, t.BM) * splits))](
                run.hidden,
                run.operand(x, t.BM, t.BK),
                run.operand(run.lm_head, t.BN, t.BK),
                *problem.scoring,
                targets,
                *part,
                partial,
                starts,
                ends,
                *found,
                read,
                rows,
                run.width,
                run.vocabulary,
                run.hidden.stride(0),
                x.stride(0),
                run.lm_head.stride(0),
                SPLIT=split,
                ENTROPY=options.entropy,
                NORMALIZE=options.normalize,
                enable_fp_fusion=False,
                **run.flags,
                **run.cut(t),
            )
        if rows:
            triton_rows.merge_kernel[(_cdiv(rows, 128),)](
                partial, *part, *stats, rows, run.length, splits, BM=128, ENTROPY=options.entropy, num_warps=4
            )
    return stats, found


def backward(problem: Problem, stats: Statistics, upstream: Upstream, rows: Tensor | None) -> Gradients:
    """Compute the gradients, that of hidden on top of the read-outs' ``rows``; makes the logits
    again, panel by panel."""
    needs, scored = problem.options.needs, Places(problem, 1).scored
    upstream = Upstream(*(None if t is None else t.contiguous() for t in upstream))  # type: ignore[arg-type]
    work = _Backward(problem, stats, upstream, rows, scored)
    capacity, hidden = scored.order.shape[0], problem.hidden
    if capacity == 0 or not any(needs):
        return work.finish()
    low, limit, itemsize = needs.hidden and hidden.dtype == torch.bfloat16, workspace_limit(), hidden.element_size()
    width, vocabulary = hidden.shape[1], problem.lm_head.shape[0]
    cut = plan(capacity, width, vocabulary, itemsize, low, any(needs[1:]), limit)
    if cut.rows == capacity or not needs.hidden:
        work.sweep(scored, needs, cut.columns)
        return work.finish()
    columns = plan(cut.rows, width, vocabulary, itemsize, low, False, limit).columns
    for start in range(0, capacity, cut.rows):
        work.sweep(scored.part(start, cut.rows), Needs(hidden=True), columns)
    if any(needs[1:]):
        columns = plan(capacity, width, vocabulary, itemsize, False, True, limit).columns
        work.sweep(scored, needs._replace(hidden=False), columns)
    return work.finish()


def forward_with_gradient(
    problem: Problem, token_weight: Tensor | None, merge: Callable[[Statistics], Statistics] | None
) -> tuple[Statistics, ReadOuts, Gradients]:
    """Compute the forward and the gradients in one call, the logits recomputed."""
    stats, found = forward(problem)
    stats = stats if merge is None else merge(stats)
    return stats, found, backward(problem, stats, Upstream(loss_slope(problem, token_weight), None), None)


def read_outs_forward(hidden: Tensor, spans: Spans, normalize: bool) -> ReadOuts:
    """Compute the read-outs in a launch of their own, for library products."""
    from rime_fast.ops.logprob_pool import triton_rows as kernels

    hidden, count = _dense(hidden), spans.starts.shape[0]
    embeddings = torch.empty(count, hidden.shape[1], dtype=torch.float32, device=hidden.device)
    found = ReadOuts(embeddings, embeddings.new_empty(count))
    if count:
        kernels.read_outs_kernel[(count,)](hidden, *spans, *found, hidden.shape[1], hidden.stride(0), normalize)
    return found


def start_gradient_(out: Tensor, factor: Tensor | None, rows: Tensor | None, spans: Spans) -> None:
    """Start the gradient of hidden in one launch: out [T, H] <- factor out (None: 0, whatever it held) + every span's
    ``rows`` [K, H] on its rows."""
    from rime_fast.ops.logprob_pool import triton_rows as kernels

    if rows is None and factor is None:
        out.zero_()
    elif out.numel():
        count, (length, width) = 0 if rows is None else rows.shape[0], out.shape
        kernels.start_gradient_kernel[(_cdiv(length, 32), _cdiv(width, 256))](
            out, factor, rows, *spans, count, length, width, out.stride(0), BT=32, BC=256
        )


def scale_(out: Tensor, factor: Tensor | None) -> None:
    """Scale a gradient: out <- factor out (None: 0, whatever it held); reads and write nothing
    where the factor is 1."""
    none = torch.empty(0, dtype=torch.int64, device=out.device)
    start_gradient_(out.view(-1, out.shape[-1] if out.dim() else 1), factor, None, Spans(none, none))


class Launch:
    """What every kernel of one call shares."""

    def __init__(self, problem: Problem, heavy: bool, wide: Tiles | None) -> None:
        self.hidden, self.lm_head = _dense(problem.hidden), _dense(problem.lm_head)
        self.length, self.width = self.hidden.shape
        self.vocabulary = self.lm_head.shape[0]
        dtype, chip = self.hidden.dtype, capability_of(self.hidden)
        self.head_tiles, self.hidden_tiles = head_tiles(dtype, chip), hidden_tiles(dtype, chip)
        self.tma = uses_tma(self.lm_head)
        self.tiles = score_tiles(dtype, chip, heavy, self.tma, wide)
        self.scoring = scoring = problem.scoring
        self.flags = {"HAS_BIAS": scoring.bias is not None, "HAS_CAP": scoring.softcap is not None}

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.hidden.device)

    def gathered(self, scored: Scored) -> Tensor:
        """The scored rows one after the other, 0 past their number."""
        return gather(self.hidden, scored.order, self.length)

    def operand(self, tensor: Tensor, rows: int, columns: int) -> Any:
        """Give ``tensor`` as a kernel takes it: a descriptor of blocks [rows, columns], or the pointer."""
        if not self.tma:
            return tensor
        from triton.tools.tensor_descriptor import TensorDescriptor

        return TensorDescriptor.from_tensor(tensor, [rows, columns])

    def cut(self, tiles: Tiles) -> dict[str, Any]:
        """The constants that all kernels with products take."""
        found: dict[str, Any] = {"BM": tiles.BM, "BN": tiles.BN, "BK": tiles.BK, "GROUP": GROUP, "TMA": self.tma}
        return found | {"WIDEN": not self.hidden.is_cuda, "num_warps": tiles.warps, "num_stages": tiles.stages}

    def programs(self, units: int) -> tuple[int]:
        """Persistent: as many programs as processors, or as units of work if these are fewer."""
        return (max(1, min(processors(self.hidden), units)),)


def dlogits(
    run: Launch,
    x: Tensor,
    scored: Scored | None,
    targets: Tensor,
    stats: Statistics,
    upstream: Upstream,
    panel: Tensor,
    products: Tensor | None,
    first: int,
    columns: int,
) -> None:
    """Make logits and their gradient: panel [C, P] of ``columns`` columns from ``first``.

    x [C, H]: the scored rows. targets, stats, upstream: by row of the batch, found through ``scored``; None: by row of
    x, all of which are scored. products: see dlogits_kernel.
    """
    from rime_fast.ops.logprob_pool import triton_kernels as kernels

    t, capacity = run.tiles, panel.shape[0]
    kernels.dlogits_kernel[run.programs(_cdiv(capacity, t.BM) * _cdiv(columns, t.BN))](
        run.operand(x, t.BM, t.BK),
        run.operand(run.lm_head, t.BN, t.BK),
        *run.scoring,
        targets,
        *(scored or (None, None)),
        *stats,
        *upstream,
        run.operand(panel, t.BM, t.BN),
        products,
        first,
        columns,
        capacity,
        stats.lse.shape[1],
        run.width,
        run.vocabulary,
        x.stride(0),
        run.lm_head.stride(0),
        panel.stride(0),
        ENTROPY=upstream.entropy is not None,
        PRODUCTS=products is not None,
        enable_fp_fusion=False,
        **run.flags,
        **run.cut(t),
    )


class _Backward:
    """One backward: what its panels share, and the gradients, panel by panel."""

    def __init__(
        self, problem: Problem, stats: Statistics, upstream: Upstream, rows: Tensor | None, scored: Scored
    ) -> None:
        self.problem, self.stats, self.upstream, needs = problem, stats, upstream, problem.options.needs
        self.targets = problem.local_targets
        heavy = problem.scoring.softcap is not None or upstream.entropy is not None or needs.temperature
        self.run = run = Launch(problem, heavy, DLOGITS_WIDE)
        hidden, lm_head, device = problem.hidden, problem.lm_head, problem.hidden.device
        kind, make = gradient_dtype(hidden.dtype), torch.empty if scored.order.shape[0] else torch.zeros
        self.hidden = torch.empty(hidden.shape, dtype=kind, device=device) if needs.hidden else None
        if self.hidden is not None:
            start_gradient_(self.hidden, None, rows, problem.spans)
        self.started = rows is not None
        self.head = make(lm_head.shape, dtype=kind, device=device) if needs.lm_head else None
        self.bias = make(run.vocabulary, dtype=torch.float32, device=device) if needs.bias else None
        self.products = torch.zeros((), dtype=torch.float64, device=device) if needs.temperature else None

    def sweep(self, scored: Scored, needs: Needs, columns: int) -> None:
        """Every panel of the vocabulary for the rows in ``scored``."""
        run, upstream = self.run, self.upstream
        capacity, device = scored.order.shape[0], run.hidden.device
        x = run.gathered(scored)
        # Zeros: the kernels write the tiles of the rows there are, and torch sums over the whole panel.
        panel = torch.zeros(capacity, columns, dtype=run.hidden.dtype, device=device)
        products = run.empty(_cdiv(columns, run.tiles.BN), capacity) if needs.temperature else None
        low = run.empty(0)
        if needs.hidden and run.hidden.dtype == torch.bfloat16:
            make = torch.zeros if self.started else torch.empty
            low = make(capacity, run.width, dtype=torch.bfloat16, device=device)
        for first in range(0, run.vocabulary, columns):
            here = min(columns, run.vocabulary - first)
            if products is not None:
                products.zero_()
            dlogits(run, x, scored, self.targets, self.stats, upstream, panel, products, first, here)
            self._add(panel, x, scored, needs, low, first, here)
            if products is not None and self.products is not None:
                self.products += products.sum(dtype=torch.float64)

    def _add(
        self, panel: Tensor, x: Tensor, scored: Scored, needs: Needs, low: Tensor, first: int, columns: int
    ) -> None:
        """One panel: dlogits of ``columns`` columns from ``first``; x: the rows it is of."""
        from rime_fast.ops.logprob_pool import triton_kernels as kernels

        run = self.run
        if needs.lm_head and self.head is not None:
            t = run.head_tiles
            kernels.dhead_kernel[run.programs(_cdiv(columns, t.BM) * _cdiv(run.width, t.BN))](
                run.operand(panel, t.BK, t.BM),
                run.operand(x, t.BK, t.BN),
                scored.number,
                self.head,
                self.bias,
                first,
                columns,
                run.width,
                panel.stride(0),
                x.stride(0),
                self.head.stride(0),
                BIAS=self.bias is not None,
                **run.cut(t),
            )
        elif needs.bias and self.bias is not None:
            self.bias[first : first + columns] = panel[:, :columns].sum(dim=0, dtype=torch.float32)
        if needs.hidden and self.hidden is not None:
            t = run.hidden_tiles
            kernels.dhidden_kernel[run.programs(_cdiv(panel.shape[0], t.BM) * _cdiv(run.width, t.BN))](
                run.operand(panel, t.BM, t.BK),
                run.operand(run.lm_head, t.BK, t.BN),
                *scored,
                self.hidden,
                low,
                first,
                columns,
                run.width,
                panel.stride(0),
                run.lm_head.stride(0),
                ADD=first > 0 or self.started,
                LOW=low.numel() > 0,
                **run.cut(t),
            )

    def finish(self) -> Gradients:
        d_temperature = self.products
        if d_temperature is not None:
            d_temperature = (-d_temperature / self.problem.scoring.temperature.double()).float()
        return Gradients(self.hidden, self.head, self.bias, d_temperature)
