"""A packed batch of pairs and the recipe's loss of it, for a plain step (one forward) and a cached one (many)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rime_fast.recipe.joint import JointLoss, joint_loss, scored_tokens, token_weights
from rime_fast.trainers.config import RimeConfig

# Batch entries that are for the loss, not for the model.
LOSS_KEYS = ("side", "query_ids", "key_ids", "negative_ids", "negative_of", "prompt_lengths", "dropped")

Rows = dict[str, Tensor]


@dataclass
class PairBatch:
    """What the loss needs of a batch of n pairs, taken out of the model's inputs.

    model_inputs: the rest, with targets and token_weight where tokens are scored. counts: ``scored_tokens``, or None.
    pools: mode -> index of its read-out, for the modes that the loss reads.
    """

    n: int
    query_rows: int
    model_inputs: dict[str, Any]
    pools: Rows
    gen_index: Tensor
    negatives: int
    ids: Tensor | None
    key_ids: Tensor | None
    counts: Tensor | None

    @classmethod
    def of(cls, inputs: dict[str, Any], args: RimeConfig, group: dist.ProcessGroup | None) -> PairBatch:
        """Takes apart a batch of ``Collator.collate_pairs``; over ``group`` the token means are global."""
        weights = args.weights()
        inputs = dict(inputs)
        extra = {key: inputs.pop(key) for key in LOSS_KEYS if key in inputs}
        negatives = extra["negative_of"].shape[0] if "negative_of" in extra else 0
        n = (len(inputs["lengths"]) - negatives) // 2
        query_rows = sum(inputs["lengths"][:n])
        pools = {mode: inputs.pop(f"{mode}_index") for mode in ("disc", "gen")}
        targets, counts = inputs.pop("targets"), None
        if weights.ce_query > 0 or weights.ce_target > 0:
            counts = scored_tokens(targets, query_rows, group)
            weight = token_weights(targets, query_rows, counts, weights, max(args.world_size, 1))
            inputs |= {"targets": targets, "token_weight": weight}
        ids = extra.get("key_ids")
        return cls(
            n=n,
            query_rows=query_rows,
            model_inputs=inputs,
            pools={mode: pools[mode] for mode in weights.modes()},
            gen_index=pools["gen"],
            negatives=negatives,
            ids=ids,
            key_ids=torch.cat([ids, extra["negative_ids"]]) if ids is not None and negatives else ids,
            counts=counts,
        )

    def sides(self, embeddings: Rows) -> tuple[Rows, Rows]:
        """Queries' and keys' rows per mode. A hard negative without a rewrite has no g: its d stands in as a candidate
        of the generative terms [ours]."""
        n = self.n
        queries = {mode: rows[:n] for mode, rows in embeddings.items()}
        keys = {mode: rows[n:] for mode, rows in embeddings.items()}
        if self.negatives and "gen" in keys and "disc" in keys:
            keys["gen"] = torch.where((self.gen_index[n:] >= 0)[:, None], keys["gen"], keys["disc"])
        return queries, keys

    def joint(
        self, ce: Tensor, embeddings: Rows, args: RimeConfig, tau: float | Tensor, group: dist.ProcessGroup | None
    ) -> JointLoss:
        """The joint loss of all rows. ce: the cross-entropy's share, 0-d (0 where it is added elsewhere)."""
        queries, keys = self.sides(embeddings)
        return joint_loss(
            ce,
            queries,
            keys,
            weights=args.weights(),
            temperature=tau,
            symmetric=args.symmetric,
            detach_disc=args.detach_disc_in_cross,
            # a key is no negative when it equals the query's own positive
            query_ids=self.ids,
            key_ids=self.key_ids,
            margin=args.false_negative_margin,
            group=group,
        )


def joint_metrics(joint: JointLoss, tau: float | Tensor) -> dict[str, Tensor]:
    """What a step logs of the contrast."""
    metrics = {f"contrast/{name}": value for name, value in joint.terms.items()}
    metrics |= {f"hit@1/{name}": value for name, value in joint.accuracy.items()}
    return metrics | ({"temperature": tau} if isinstance(tau, Tensor) else {})
