"""Joint training (SFT): the loss of one batch of pairs, as pure functions of tensors.

    L = CE_q + CE_p + w_d C(d_q, d_p) + w_g C(g_q, g_p) + w_x 1/2 [ C(g_q, d_p) + C(d_q, g_p) ]
          + w_s 1/2 [ C(g_q, d_q) + C(g_p, d_p) ]
          + w_l C(l_q, l_p) + w_x 1/2 [ C(l_q, d_p) + C(d_q, l_p) + C(l_q, g_p) + C(g_q, l_p) ] + w_c (CE'_q + CE'_p)
    C(a, b) = 1/2 [ CE(s a b_all^T, own) + CE(s b a_all^T, own) ],   s = 1 / temperature

CE is the token mean over the assistant tokens of a side. C, the scale 50 (temperature 0.02) and the unit weights of
CE, w_d and w_g are UME-R1's [known, arXiv 2511.00405]; Cross-Mode Alignment (the w_x term) is RIME's idea [known], its
form and weight here are [ours], and so is the same-item term (w_s, off by default). The last line is that of latent
rewrites (rime_fast/model/latent.py): l the latent embedding, CE' the cross-entropy of the copy that reads the latent
tokens alone [known: BToks' mask and loss; ours: the contrast, its weights, and that CMA takes l in].

Over several ranks everything is GLOBAL: the token means divide by the tokens of all ranks, the contrast runs over the
pairs of all ranks. DDP, FSDP, DeepSpeed and accelerate AVERAGE the ranks' gradients, while the gradient of a global
loss is the SUM of the ranks' shares: so each rank's share is multiplied by the number of ranks, and the MEAN over ranks
of the values, and of the gradients, is that of one process holding the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.ops.contrastive import contrastive_loss

IGNORE = -100
Term = tuple[str, str, float]
FIXED = "disc (no gradient)"


@dataclass(frozen=True)
class JointWeights:
    """Weights of the loss terms; a term of weight 0 is neither computed nor logged.

    ce_query, ce_target: next-token loss of the query's and the target's assistant turn [known, UME-R1: 1, 1].
    disc, gen: contrast of both sides in one mode, d-d and g-g [known, UME-R1: 1, 1].
    cross: Cross-Mode Alignment, half of it g-d and half d-g [known: idea; ours: form and weight 1].
    same_item: g against d of the SAME side, half of it per side [ours, off].
    latent: contrast l-l of the latent embedding, which then joins the cross terms, each pair of modes with half and
        half of ``cross`` [ours, off]. latent_ce: next-token loss of both sides' second copies [known: BToks; off].
    """

    ce_query: float = 1.0
    ce_target: float = 1.0
    disc: float = 1.0
    gen: float = 1.0
    cross: float = 1.0
    same_item: float = 0.0
    latent: float = 0.0
    latent_ce: float = 0.0

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            if not (isinstance(value, (int, float)) and math.isfinite(value) and value >= 0):
                raise ValueError(f"JointWeights.{one.name} is {value!r}; expected a finite number >= 0")

    def of(self, objective: str, with_disc: bool = True) -> JointWeights:
        """Leave out what an objective does not train: "joint" nothing, "sft" every contrast, "contrastive" every
        cross-entropy; without ``with_disc`` what reads a discriminative embedding."""
        discriminative, entropies = ("disc", "cross", "same_item"), ("ce_query", "ce_target", "latent_ce")
        off = {"joint": (), "sft": (*discriminative, "gen", "latent"), "contrastive": entropies}[objective]
        left = (*off, *(() if with_disc else discriminative))
        return replace(self, **dict.fromkeys(left, 0.0))

    def modes(self) -> tuple[str, ...]:
        """The embeddings that the contrastive terms read, a subset of ("disc", "gen", "latent")."""
        mixed = self.cross > 0 or self.same_item > 0
        on = {"disc": self.disc > 0 or mixed, "gen": self.gen > 0 or mixed, "latent": self.latent > 0}
        return tuple(mode for mode, wanted in on.items() if wanted)

    def scores_tokens(self) -> bool:
        """Whether any cross-entropy is on."""
        return max(self.ce_query, self.ce_target, self.latent_ce) > 0

    def pair_terms(self) -> list[Term]:
        """The terms between queries and targets that are on, as (query mode, key mode, weight)."""
        half = 0.5 * self.cross
        every = [("disc", "disc", self.disc), ("gen", "gen", self.gen), ("gen", "disc", half), ("disc", "gen", half)]
        if self.latent > 0:
            every.append(("latent", "latent", self.latent))
            every += [pair for m in ("disc", "gen") for pair in (("latent", m, half), (m, "latent", half))]
        return [term for term in every if term[2] > 0]

    def served_term(self) -> tuple[str, str] | None:
        """The term that a served embedding is compared by, as (query mode, key mode): g, else latent, else d with its
        like; None without any."""
        order = ("gen", "latent", "disc")
        terms = [(q, k) for q, k, _ in self.pair_terms()]
        return min(terms, key=lambda t: (t[0] != t[1], order.index(t[0]), order.index(t[1])), default=None)


@dataclass
class JointLoss:
    """The loss of a batch and what the log says of it. total: 0-d fp32 with gradient. terms: name -> 0-d, unweighted,
    no gradient. accuracy: mode pair -> hit@1, 0-d.

    With Matryoshka widths: accuracy also "mode pair@width"; per_dim: width -> the weighted terms' sum there, 0-d.
    """

    total: Tensor
    terms: dict[str, Tensor]
    accuracy: dict[str, Tensor]
    per_dim: dict[int, Tensor] = field(default_factory=dict)


def scored_tokens(targets: Tensor, query_rows: int, group: Any = None) -> Tensor:
    """Count the scored tokens of the queries and of the targets, over all ranks: [2] fp32, stays on the device.

    targets: [T] int64, ``IGNORE`` where not scored; the first ``query_rows`` rows belong to queries.
    """
    scored = targets != IGNORE
    counts = torch.stack([scored[:query_rows].sum(), scored[query_rows:].sum()]).float()
    if group is not None:
        dist.all_reduce(counts, group=group)
    return counts


def token_weights(
    targets: Tensor,
    query_rows: int,
    counts: Tensor,
    weights: JointWeights,
    world: int = 1,
    condensed: Tensor | None = None,
) -> Tensor:
    """Compute w_t of every row, so that sum_t w_t (-logp_t) = ce_query CE_q + ce_target CE_p: [T] fp32.

    counts: ``scored_tokens``. world: ranks that average gradients; a rank's share is multiplied by it, so the mean of
    the ranks' values, like the mean of their gradients, is that of the global token mean. A side without a scored
    token weighs 0. condensed [T] bool: rows of the second copies, with as many scored tokens as are counted; they
    weigh latent_ce.
    """
    share = world / counts.clamp(min=1)
    weight = torch.empty(targets.shape, dtype=torch.float32, device=targets.device)
    for rows, own, ce in (
        (slice(query_rows), share[0], weights.ce_query),
        (slice(query_rows, None), share[1], weights.ce_target),
    ):
        weight[rows] = ce * own
        if condensed is not None:
            weight[rows] = torch.where(condensed[rows], weights.latent_ce * own, weight[rows])
    return weight * (targets != IGNORE)


def side_cross_entropy(logp: Tensor, query_rows: int, counts: Tensor, world: int = 1) -> dict[str, Tensor]:
    """Compute the cross-entropy of each side, unweighted, {"ce_query", "ce_target"} -> 0-d; over ranks their mean is
    the global token mean.

    logp: [T] fp32, 0 where ignored (the log-probs operator's promise).
    """
    share = world / counts.clamp(min=1)
    return {"ce_query": -logp[:query_rows].sum() * share[0], "ce_target": -logp[query_rows:].sum() * share[1]}


def joint_loss(
    ce: Tensor,
    queries: Mapping[str, Tensor],
    keys: Mapping[str, Tensor],
    *,
    weights: JointWeights | None = None,
    temperature: float | Tensor = 0.02,
    symmetric: bool = True,
    detach_disc: bool = False,
    query_ids: Tensor | None = None,
    key_ids: Tensor | None = None,
    margin: float | None = None,
    dims: Sequence[int] | None = None,
    dim_weights: Sequence[float] | None = None,
    group: Any = None,
    backend: str = "auto",
) -> JointLoss:
    """Compute the whole joint loss of one batch.

    ce: 0-d, already weighted (``fused_linear_ce`` with ``token_weights``, or ``side_cross_entropy`` summed by hand).
    queries: mode ("disc", "gen", "latent") -> [n, D] unit rows; keys: mode -> [n + h, D]: the n positives in the
        queries' order, then h hard negatives, candidates for every query.
    temperature: float, or a 0-d tensor that may want a gradient (with ``group``: average it over the ranks).
    symmetric: False trains the query -> key direction only [known, Think-Then-Embed's embedder].
    detach_disc: stop-gradient on d in the cross terms, so that they pull g to d and leave d alone [ours, off].
    query_ids [n], key_ids [n + h] int64: a key whose id equals the query's is no negative (never masks the positive).
    margin: a key more similar than the positive by more than this is no negative.
    dims, dim_weights: Matryoshka widths of every contrast, and their weights (``contrastive_loss``).
    group: torch.distributed group of the global batch (see the module's docstring); ranks may hold different n and h.

    Raises ValueError for a missing mode; shapes, dtypes and ids are ``contrastive_loss``'s to check.
    """
    weights = weights or JointWeights()
    for mode in weights.modes():
        for name, side in (("queries", queries), ("keys", keys)):
            if mode not in side:
                raise ValueError(f"{name} has modes {sorted(side)}; the weights {weights} also need {mode!r}")
    world = 1 if group is None else dist.get_world_size(group)
    settings: dict[str, Any] = {"temperature": temperature, "margin": margin, "symmetric": symmetric}
    settings |= {"dims": dims, "dim_weights": dim_weights, "group": group, "backend": backend}
    loss = JointLoss(ce, {}, {})

    def add(
        names: list[str], a: Mapping[str, Tensor], b: Mapping[str, Tensor], terms: list[Term], a_ids: Any, b_ids: Any
    ) -> None:
        out = contrastive_loss(a, b, terms=terms, query_ids=a_ids, key_ids=b_ids, **settings)
        # value of the global loss, gradient of this rank's share times the ranks
        loss.total = loss.total + (out.loss if world == 1 else out.loss * world - out.loss.detach() * (world - 1))
        for name, found in zip(names, out.per_term, strict=True):
            loss.terms[name], loss.accuracy[name] = out.per_term[found].detach(), out.accuracy[found]
            for width in out.per_dim:
                loss.accuracy[f"{name}@{width}"] = out.accuracy[found, width]
        for width, value in out.per_dim.items():
            loss.per_dim[width] = loss.per_dim.get(width, 0.0) + value.detach()

    pair_terms = weights.pair_terms()
    if pair_terms:
        names = [f"{q}-{k}" for q, k, _ in pair_terms]
        queries, keys = dict(queries), dict(keys)
        if detach_disc:
            queries[FIXED], keys[FIXED] = queries["disc"].detach(), keys["disc"].detach()
            pair_terms = [
                (q, k, w) if q == k else (FIXED if q == "disc" else q, FIXED if k == "disc" else k, w)
                for q, k, w in pair_terms
            ]
        add(names, queries, keys, pair_terms, query_ids, key_ids)
    if weights.same_item > 0:
        same: list[Term] = [("gen", "disc", 0.5 * weights.same_item)]
        add(["same-query"], queries, queries, same, query_ids, query_ids)
        add(["same-target"], keys, keys, same, key_ids, key_ids)
    return loss
