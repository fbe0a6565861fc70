"""Rewrite sensitivity: how much of a gen embedding, and of what it finds, comes from its rewrite.

[ours] The same queries are read with their own rewrite, another query's, none, and their teacher's, a prefill each, and
ranked against one index. [known] (UME-R1): gen embeddings with different rewrites may have cosines of 0.95 to 0.98. If
swapping the rewrites costs nothing, the rewrite is decoration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from rime_fast.eval.budget import outcomes
from rime_fast.eval.metrics import mean_cosine

if TYPE_CHECKING:
    from rime_fast.eval.embedder import Encoded, RimeEmbedder

LOOK = 1000  # queries looked through for a rewrite to swap with


@dataclass(frozen=True)
class Sensitivity:
    """What ``rewrite_sensitivity`` measured.

    rewrites: "own", "swapped", "empty" and, where every query has one in the data, "teacher" -> {"score": mean of
    ``metric``, "cosine": mean cosine with the embedding of the own rewrite, "loss": own score less this one's, "error":
    standard error of the loss over queries}. unrelated: mean cosine of two queries with their own rewrites, which is
    what "cosine" is to be compared with. unswapped: queries for which no other rewrite was found.
    """

    metric: str
    n_queries: int
    rewrites: dict[str, dict[str, float]]
    unrelated: float
    unswapped: int

    @property
    def decoration(self) -> bool:
        """Whether swapping costs nothing that can be told from chance (two standard errors)."""
        row = self.rewrites["swapped"]
        return row["loss"] <= 2 * row["error"]

    def to_dict(self) -> dict[str, Any]:
        """Give plain numbers, for a report."""
        return asdict(self) | {"decoration": self.decoration}

    def line(self) -> str:
        """Say the scores in one line."""
        parts = (f"{name} {row['score']:.3f} (cosine {row['cosine']:.3f})" for name, row in self.rewrites.items())
        end = "; swapping costs nothing: the rewrite is decoration" if self.decoration else ""
        return f"rewrites: {self.metric} " + ", ".join(parts) + end


def rewrite_sensitivity(
    embedder: RimeEmbedder,
    data: Any,
    *,
    queries: Encoded | None = None,
    targets: torch.Tensor | None = None,
    metric: str = "hit@1",
) -> Sensitivity:
    """Measure it for a model on a RetrievalSet, or on a suite's task (``task.load()``).

    queries: ``embedder.encode_items(data.queries, "gen")`` (or "both"), of which the rewrites are taken; targets:
    [M, D], the index, disc embeddings of ``data.candidates``; made here where they are not given. metric: a name of
    ``metrics.per_query``. Teachers' rewrites are those of the data (``Side.rewrite``).
    """
    queries = embedder.encode_items(data.queries, "gen") if queries is None else queries
    targets = embedder.encode(data.candidates) if targets is None else targets
    own = queries.rewrites
    if own is None:
        raise ValueError("queries has no rewrites; encode them in mode 'gen' or 'both'")
    partners = swap_partners(own, data.correct)
    texts = {"own": own, "swapped": [own[j] for j in partners], "empty": [""] * len(own)}
    if all((side.rewrite or "").strip() for side in data.queries):
        texts["teacher"] = [side.rewrite or "" for side in data.queries]
    rows = {name: embedder.encode_rewritten(data.queries, given) for name, given in texts.items()}
    scores = {name: outcomes(data, row, targets, metric)[0] for name, row in rows.items()}
    n = len(own)
    found = {}
    for name, row in rows.items():
        loss = scores["own"] - scores[name]
        found[name] = {
            "score": scores[name].mean().item(),
            "cosine": (row * rows["own"]).sum(dim=1).double().mean().item(),
            "loss": loss.mean().item(),
            "error": (loss.std() / n**0.5).item() if n > 1 else 0.0,
        }
    unswapped = sum(i == j for i, j in enumerate(partners))
    return Sensitivity(metric, n, found, mean_cosine(rows["own"]), unswapped)


def swap_partners(rewrites: Sequence[str], correct: Sequence[Sequence[int]]) -> list[int]:
    """Choose for each query the one whose rewrite it gets: the next in a fixed random circle that has another rewrite
    and other right candidates; failing that, another rewrite; failing that, itself."""
    n = len(rewrites)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(0)).tolist()
    partners = [0] * n
    for place, i in enumerate(order):
        right = set(correct[i])
        following = (order[(place + step) % n] for step in range(1, n))
        others = [j for j in islice(following, LOOK) if rewrites[j] != rewrites[i]]
        partners[i] = next((j for j in others if right.isdisjoint(correct[j])), others[0] if others else i)
    return partners
