"""The one schedule of the contrastive loss: this rank's queries against the keys of a key source, both ways.

A rank owns the rows of the similarity matrix that belong to its queries, so row softmaxes are its own. Column softmaxes
go over the queries of all ranks: one MAX and one SUM of O(all keys) numbers. Gradients: dq is complete here, dk goes
home through the key source. One process is a group whose key source has one block and whose sums are its own
(keys.OwnKeys). A backend brings ``operands`` and ``sweep`` (cpu.py is the one to read); all else, O(N D), is here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rime_fast.ops.contrastive import cpu, cuda, fused, triton
from rime_fast.ops.contrastive.keys import OwnKeys
from rime_fast.ops.contrastive.problem import (
    Inputs,
    Options,
    accumulation_dtype,
    check_labels,
    inverse_norms,
    largest_norm,
    positive_temperature,
    require_finite,
    require_temperature,
)
from rime_fast.ops.contrastive.softmax import BOUNDED, Positives, Slopes, Solved, Statistics
from rime_fast.ops.contrastive.tiles import (
    Masks,
    TileSweep,
    id_classes,
    pair_similarity,
    scale_by,
    sized,
    unit_of,
)


class Schedule:
    """One call on one rank; ``forward`` and ``backward`` may belong to different objects made of equal arguments.

    flag: 0-d int32, 1 when every |logit| <= BOUNDED: then one exponential serves rows and columns. shiftless: that this
    is so is known on the host, to a backend that then keeps sums without shifts.
    """

    def __init__(
        self,
        x: Inputs,
        options: Options,
        source: OwnKeys,
        bounded: bool | Tensor | None,
        masked: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """bounded: whether every |logit| <= BOUNDED, or the ``flag`` of that; None: found out on the device.
        masked: the ``masked`` of an earlier schedule of the same inputs."""
        self.x, self.options, self.source = x, options, source
        device = x.queries[0].device
        self.backend: Any = triton if options.backend == "triton" else cuda if device.type == "cuda" else cpu
        self.dtype = accumulation_dtype(x.queries[0].dtype)
        self.queries = self.backend.operands(x.queries)
        self.temperature = x.temperature.detach()
        own_kernels = self.backend is cuda and source.alone and fused.serves(x.queries[0])
        if isinstance(bounded, Tensor):  # where the temperature was not above 0, the forward has solved with NaN
            self.scale, self.flag = self.temperature.reciprocal(), bounded
        elif own_kernels:
            keys = self.backend.operands(source.keys)
            self.temperature, self.scale, self.flag = fused.begin(self.queries, keys, self.temperature)
        else:
            self.temperature = positive_temperature(self.temperature)
            self.scale = self.temperature.reciprocal()
            self.flag = self._flag(bounded)
        self.shiftless = self.backend.SHIFTLESS and bool(bounded)
        labels = x.labels
        if labels is None:
            labels = torch.arange(source.first_key, source.first_key + x.n_queries, device=device)
        self.positives = Positives.of(labels)
        self.positives.first = source.first_key if x.labels is None else None
        self.fused = own_kernels and self.positives.first is not None  # the O(N) part is fused.py's
        self.masked = self._masked() if masked is None else masked
        self.masks = self._masks()
        self.key_weights: Tensor | None = None  # Positives.key_weights over all ranks
        self.kept: Tensor | None = None  # similarities, see tiles.TileSweep

    def forward(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Compute (losses, hit@1 of each; Solved.rows and Solved.cols of each for the backward),
        ``n_losses`` of each."""
        labels, losses = self.positives.labels, self.options.n_losses
        state = Statistics.empty(losses, labels, self.source.n_keys, self.shiftless, self.dtype)
        for start, stop, keys in self.source.blocks():
            self._sweep(start, stop, keys).statistics(state.columns(start, stop))
        if self.fused:
            loss, hit, solved = fused.solve(state, self.positives, self.options.symmetric)
            return loss, hit, solved.rows, solved.cols
        solved = Solved.of(state, self.positives)
        if self.options.symmetric and not self.source.alone:
            self._merge_columns(solved.cols)
        totals = torch.stack([solved.total(self.positives, self.options.symmetric), state.hits()])
        loss, hit = (
            torch.div(total, self.source.n_queries, out=total.new_empty(losses, dtype=self.dtype))
            for total in self.source.sum_(totals)
        )
        return loss, hit, solved.rows, solved.cols

    def backward(
        self,
        grad: Tensor,
        rows: Tensor,
        cols: Tensor,
        need_queries: list[bool],
        need_keys: list[bool],
        need_temperature: bool,
    ) -> tuple[list[Tensor | None], list[Tensor | None], Tensor]:
        """Compute the gradients (dq and dk of each mode in the rows' dtype, None where not needed; d temperature, 0
        where not needed).

        The temperature's gradient comes from dq alone: with no query needed it is 0.
        """
        slopes, unit = self._slopes(grad, Solved(rows, cols))
        dq = [
            torch.zeros_like(q, dtype=self.dtype) if need else None
            for q, need in zip(self.queries, need_queries, strict=True)
        ]

        # Sums of G S over the widths below the widest, whose logits do not change with the length of a row.
        narrower: list[Tensor] = []

        def add(start: int, stop: int, keys: list[Tensor], dk: list[Tensor | None]) -> None:
            sweep = self._sweep(start, stop, keys)
            sweep.gradients(slopes.columns(start, stop), dq, dk)
            if not self.source.alone:  # what travels has its size: the unit is each rank's own
                scale_by(unit, dk)
            if need_temperature:
                narrower.extend(products.sum() for products in sweep.row_products)

        dk = self.source.gradients(add, need_keys)
        dq, parts = self._finished(dq, self.queries, unit, need_temperature)
        dk, _ = self._finished(dk, self.x.keys, unit if self.source.alone else None, False)
        dt = torch.zeros_like(self.temperature)
        if parts:  # -(1/t) sum_i dq_i . q_i over all modes, since every logit is q . k / t
            dt = (torch.stack([*parts, *narrower]).sum() / -self.temperature.double()).to(dt.dtype)
            dt = dt if unit is None else dt * unit.to(dt.dtype)
        return dq, dk, dt

    def _finished(
        self, gradients: list[Tensor | None], rows: list[Tensor], unit: Tensor | None, with_products: bool
    ) -> tuple[list[Tensor | None], list[Tensor]]:
        """Give gradients their size in the rows' dtype; with_products: also the sum of each one with its rows, before
        it has its size."""
        if self.fused:
            pairs = zip(gradients, self.backend.operands(rows), strict=True)
            found = [(d, None) if d is None else fused.sized(d, x, unit, with_products) for d, x in pairs]
            return [d for d, _ in found], [products for _, products in found if products is not None]
        there = [(d, x) for d, x in zip(gradients, rows, strict=True) if d is not None and with_products]
        products = [(d * x).sum(1).sum(dtype=torch.float64) for d, x in there]
        return [sized(d, unit, x.dtype) for d, x in zip(gradients, rows, strict=True)], products

    def _flag(self, bounded: bool | None) -> Tensor:
        flag = torch.empty((), dtype=torch.int32, device=self.scale.device)
        if bounded is not None:
            return flag.fill_(int(bounded))
        logit = largest_norm(self.x.queries) * largest_norm(self.source.keys) * self.scale
        return torch.lt(logit, BOUNDED, out=flag)

    def _slopes(self, grad: Tensor, solved: Solved) -> tuple[Slopes, Tensor | None]:
        """What the tiles' gradients need for the gradient ``grad`` to the losses, and their unit (tiles.unit_of)."""
        symmetric, positives, dtype = self.options.symmetric, self.positives, self.queries[0].dtype
        if self.fused:
            narrow = dtype in fused.NARROW
            return fused.slopes(solved, positives, grad, self.temperature, self.source.n_queries, symmetric, narrow)
        weights = self.key_weights
        if weights is None and not positives.covers(self.source.n_keys):
            weights = positives.key_weights(self.source.n_keys)
        factors = (grad.double() * ((0.5 if symmetric else 1.0) / self.source.n_queries)).div_(self.temperature)
        unit = unit_of(factors, dtype)
        factors = factors if unit is None else factors / unit
        form = self.shiftless, self.dtype, self.backend.BASE2
        return Slopes.of(solved, positives, weights, factors, symmetric, *form), unit

    def _merge_columns(self, cols: Tensor) -> None:
        """Log-sum-exps of cols [terms, 3, K] over all ranks' queries, in place, and how much each key weighs."""
        weights = self.positives.key_weights(self.source.n_keys)
        local = cols[:, 1:]
        best = self.source.max_(local.clone())
        shift = torch.where(best == -torch.inf, 0, best)
        merged = self.source.sum_(torch.cat([(local - shift).exp().flatten(0, 1), weights[None]]))
        cols[:, 1:] = shift + merged[:-1].view_as(shift).log()
        self.key_weights = merged[-1]

    def _sweep(self, start: int, stop: int, keys: list[Tensor]) -> TileSweep | triton.TritonSweep:
        labels = self.positives.labels - start if start else self.positives.labels
        masks = [masks.columns(start, stop, labels) for masks in self.masks]
        moved = self.backend.operands(keys)
        widths = self.options.widths
        found = self.backend.sweep(self.queries, moved, self.options.terms, self.scale, masks, self.flag, widths)
        if self.kept is not None:
            found.kept = self.kept
        return found

    def _masked(self) -> tuple[Tensor, Tensor]:
        """Classes of ids [N + K] int32, and limits of similarities [losses, N + K], of this rank's queries and of all
        keys; [0] where not given. Limits need the positives' similarities, which may lie with any rank."""
        x, margin = self.x, self.options.margin
        classes, limits = self.flag.new_empty(0), self.queries[0].new_empty(0, dtype=self.dtype)
        if x.query_ids is not None and x.key_ids is not None:
            classes = id_classes(torch.cat([x.query_ids, self.source.gather(x.key_ids)]))
        if margin is not None:
            similarity = self._pair_similarities()
            best = self.source.max_(self.positives.best_by_key(similarity, self.source.n_keys))
            limits = torch.cat([similarity.amax(2), best], dim=1) + margin
        return classes, limits

    def _masks(self) -> list[Masks]:
        """One a loss, over all keys."""
        sizes, (classes, limits) = [self.x.n_queries, self.source.n_keys], self.masked
        ids = classes.split(sizes) if classes.numel() else (None, None)
        bounds = [limit.split(sizes) for limit in limits] if limits.numel() else [(None, None)] * self.options.n_losses
        return [Masks(self.positives.labels, *ids, *limit) for limit in bounds]

    def _pair_similarities(self) -> Tensor:
        """[losses, N, P] similarity of each query with its positives, and what equals it; -inf for a missing one."""
        labels = self.positives.labels
        widths = self.options.widths or (None,)
        found = labels.new_full((self.options.n_losses, *labels.shape), -torch.inf, dtype=self.dtype)
        for start, stop, keys in self.source.blocks():
            here = (labels >= start) & (labels < stop)
            at = torch.where(here, labels - start, 0)
            slots = [(q, k, width) for q, k in self.options.terms for width in widths]
            for known, (q, k, width) in zip(found, slots, strict=True):
                query, key = self.queries[q], keys[k]
                if width is not None and width < self.options.widths[-1]:
                    query = query[:, :width] * inverse_norms(query, width)[:, None]
                    key = key[:, :width] * inverse_norms(key, width)[:, None]
                known.copy_(torch.where(here, pair_similarity(query, key, at), known))
        return found


def of_one_rank(
    x: Inputs, options: Options, flag: Tensor | None = None, masked: tuple[Tensor, Tensor] | None = None
) -> Schedule:
    """The schedule of one process alone, its values checked (on an accelerator: as far as nothing is read back).

    flag, masked: those of an earlier schedule of the same inputs, which need no second look.
    """
    if flag is not None:
        return Schedule(x, options, OwnKeys(x.keys, x.n_queries), flag, masked)
    if x.labels is not None:
        check_labels(x.labels, x.n_keys)
    bounded = None
    if x.queries[0].device.type == "cpu":
        require_temperature(x.temperature)
        norms = float(largest_norm(x.queries)), float(largest_norm(x.keys))
        require_finite("queries", x.queries, norms[0])
        require_finite("keys", x.keys, norms[1])
        bounded = is_bounded(*norms, float(x.temperature))
    return Schedule(x, options, OwnKeys(x.keys, x.n_queries), bounded)


def is_bounded(query_norm: float, key_norm: float, temperature: float) -> bool:
    """Whether no logit can leave [-BOUNDED, BOUNDED]."""
    return query_norm * key_norm < BOUNDED * temperature
