"""An index of embeddings: the nearest items of a query, and how sure the first place is.

A folder holds ``index.safetensors`` (``rows`` [N, D] fp32, unit norm), ``items.jsonl`` (an item a line) and
``index.json`` (what made it); with FAISS also ``index.faiss``. Plain search is exact and needs nothing; FAISS is for
sets where reading every row is too slow.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from rime_fast.data.sources import write_rows

CHUNK = 1 << 16  # rows compared at a time
THRESHOLD = 0.05  # [ours] mode auto's margin below which an item is decoded; the budget curve gives a model's own


class EmbeddingIndex:
    """Unit rows to search in; ``RimeEmbedder`` and the server ask it for margins (mode "auto").

    rows: [N, D] floating, N >= 1; kept as fp32. items: N dicts to return with the hits (None: only row numbers).
    facts: what the rows are, for messages and for ``search`` to do the same with a query: "mode", "model", "template".
    faiss: a FAISS factory string ("Flat", "HNSW32", "IVF4096,Flat") to search through (package faiss-cpu); None: plain.

        index = EmbeddingIndex(embedder.encode(catalogue), items=catalogue)
        scores, rows = index.search(embedder.encode(["a red shoe"]), k=5)
    """

    def __init__(
        self,
        rows: torch.Tensor,
        *,
        items: Sequence[dict[str, Any]] | None = None,
        facts: dict[str, Any] | None = None,
        faiss: str | None = None,
    ) -> None:
        if rows.ndim != 2 or not len(rows) or not rows.is_floating_point():
            raise ValueError(f"rows is {rows.dtype} {tuple(rows.shape)}; expected floating [N, D] with N of 1 or more")
        if items is not None and len(items) != len(rows):
            raise ValueError(f"items has {len(items)} entries; expected one for each of the {len(rows)} rows")
        self.rows = rows.detach().float().cpu()
        if not bool(torch.isfinite(self.rows).all()):
            raise ValueError("rows holds values that are not finite; expected unit embeddings")
        self.items = items
        self.facts = facts or {}
        self.faiss = faiss
        self._faiss = _build(self.rows, faiss) if faiss else None

    def __len__(self) -> int:
        return len(self.rows)

    def search(self, queries: torch.Tensor, k: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
        """Find the nearest items of queries: (scores [n, k] fp32, rows [n, k] int64), best first, k at most N; equal
        scores: the lower row first. Where FAISS looks at fewer than k rows (IVF), -inf and -1 stand in the last places.

        queries: [n, D'], unit rows; wider ones are cut to the index's D and normalised again (Matryoshka). Raises
        ValueError for narrower ones.
        """
        if queries.ndim != 2 or queries.shape[1] < self.rows.shape[1]:
            raise ValueError(f"queries is {tuple(queries.shape)}; expected [n, {self.rows.shape[1]}] (or wider)")
        if k < 1:
            raise ValueError(f"k is {k}; expected 1 or more")
        queries = truncated(queries.float().cpu(), self.rows.shape[1])
        k = min(k, len(self))
        if self._faiss is not None:
            scores, rows = map(torch.from_numpy, self._faiss.search(queries.contiguous().numpy(), k))
            return scores.masked_fill(rows < 0, -torch.inf), rows
        best = queries.new_empty(len(queries), 0)
        places = torch.empty(len(queries), 0, dtype=torch.int64)
        for start in range(0, len(self), CHUNK):
            scores = queries @ self.rows[start : start + CHUNK].T
            best = torch.cat([best, scores], dim=1)
            places = torch.cat([places, torch.arange(start, start + scores.shape[1]).expand(len(queries), -1)], dim=1)
            best, order = best.sort(dim=1, descending=True, stable=True)
            best, places = best[:, :k], places.gather(1, order[:, :k])
        return best, places

    def margins(self, queries: torch.Tensor) -> torch.Tensor:
        """Say how sure the first place is, [n] fp32: its score less the second's; infinite where the index has one row
        only."""
        return margins(self.search(queries, 2)[0])

    def save(self, directory: str | Path) -> None:
        """Write the folder (made if absent)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_file({"rows": self.rows.contiguous()}, str(directory / "index.safetensors"))
        facts = {"rows": len(self), "dims": self.rows.shape[1], "faiss": self.faiss} | self.facts
        (directory / "index.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        write_rows(directory / "items.jsonl", self.items or ())
        if self._faiss is not None:
            import faiss

            faiss.write_index(self._faiss, str(directory / "index.faiss"))

    @classmethod
    def load(cls, directory: str | Path) -> EmbeddingIndex:
        """Read a folder of ``save``. Raises ValueError for a folder that is none."""
        directory = Path(directory)
        if not (directory / "index.json").is_file():
            raise ValueError(f"{directory} holds no index.json; expected a folder of `rime-fast index`")
        with reading(directory / "index.json") as path:
            facts = dict(json.loads(path.read_text(encoding="utf-8")))
        items = read_lines(directory / "items.jsonl")
        with reading(directory / "index.safetensors") as path:
            rows = load_file(str(path))["rows"]
        index = cls(rows, items=items or None, facts=facts)
        if factory := index.facts.pop("faiss", None):
            import faiss

            index.faiss, index._faiss = factory, faiss.read_index(str(directory / "index.faiss"))
        return index


@contextmanager
def reading(path: Path) -> Iterator[Path]:
    """Name a file in a ValueError where what is in it cannot be read in this block."""
    try:
        yield path
    except (ValueError, TypeError, KeyError, SafetensorError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the items that `rime-fast embed` or `index` wrote, one a line. Raises ValueError naming a damaged file."""
    with reading(path), path.open(encoding="utf-8") as lines:
        return [dict(json.loads(line)) for line in lines]


def check_auto(index: EmbeddingIndex | None, width: int, threshold: float) -> EmbeddingIndex:
    """Check that mode "auto" can use the index with a model of ``width`` numbers, and give it back; else ValueError
    (TypeError)."""
    if index is None:
        raise ValueError("mode 'auto' needs margins: give index=, an EmbeddingIndex of disc rows")
    if not isinstance(index, EmbeddingIndex):
        raise TypeError(
            f"index is {type(index).__name__}; expected an EmbeddingIndex (EmbeddingIndex.load of a folder)"
        )
    if index.facts.get("mode", "disc") != "disc":
        raise ValueError(f"index holds {index.facts['mode']} rows; mode 'auto' needs disc rows")
    if index.rows.shape[1] > width:
        raise ValueError(f"index has {index.rows.shape[1]} dimensions; expected at most the model's {width}")
    if isinstance(threshold, bool) or not isinstance(threshold, Real):
        raise TypeError(f"threshold is {type(threshold).__name__}; expected a number")
    if not 0 <= threshold <= 2:
        raise ValueError(f"threshold is {threshold}; expected 0 to 2, as the margins of unit rows are")
    return index


def margins(scores: torch.Tensor) -> torch.Tensor:
    """Say by how much the first place leads, [n], from [n, k] scores with the best first; infinite where there is no
    second (k is 1, or -inf stands there)."""
    if scores.shape[1] < 2:
        return scores.new_full((len(scores),), torch.inf)
    return scores[:, 0] - scores[:, 1]


def truncated(rows: torch.Tensor, dims: int | None) -> torch.Tensor:
    """Cut embeddings to their first ``dims`` columns, normalised again (Matryoshka); None: as they are. Rows of int8
    (``embed --precision int8``) come out as fp32 unit rows. ValueError for too many."""
    if rows.dtype == torch.int8:
        rows = torch.nn.functional.normalize(rows.float(), dim=1)
    if dims is None or dims == rows.shape[1]:
        return rows
    if not 1 <= dims < rows.shape[1]:
        raise ValueError(f"dims is {dims}; expected 1 to {rows.shape[1]}")
    return torch.nn.functional.normalize(rows[:, :dims], dim=1)


def _build(rows: torch.Tensor, factory: str) -> Any:
    try:
        import faiss
    except ImportError:
        raise ValueError(f"faiss is {factory!r}, but FAISS is not installed; pip install 'rime-fast[serve]'") from None
    try:
        index = faiss.index_factory(rows.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        index.train(rows.numpy())
        index.add(rows.numpy())
    except RuntimeError as error:
        raise ValueError(f"faiss is {factory!r}: {str(error).strip().splitlines()[-1]}") from None
    return index
