"""Where the relevant candidates of each query come out, streamed so that no [N, M] matrix ever exists.

Ties. A query's candidates are ordered by similarity, highest first; among equal similarities by gain, LOWEST first,
so a tie between a wrong and a right candidate counts as a miss (pessimistic), and equal candidates of equal gain are
interchangeable. The order, and hence every metric made from it, is a function of the numbers alone: not of the row
order, not of the tile size. A collapsed encoder, for which all similarities are equal, scores hit@1 = 0.
``ties="official"`` is the order of the published MMEB code instead: equal similarities in the order of the list (or of
the candidates). There a collapsed encoder scores hit@1 = 1 wherever the right answer stands first in its list.
NaN similarities sort below everything else and tie with each other.

Work: 2 N M D FLOP and M/tile small products more; memory: the tile. Every product has the same shape (the last
tile is filled up with zero rows), because a library GEMM rounds differently for different shapes, and equal candidates
must get equal bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

QUERY_TILE = 128
CANDIDATE_TILE = 2048
LIST_TILE_ELEMENTS = 16 * 1024 * 1024  # floats of candidate rows gathered at a time for per-query lists (64 MiB)
SHARED_LISTS = 8  # lists that cover at least this part of all candidates take their scores from whole products
NEVER = torch.iinfo(torch.int64).max  # rank of a relevant candidate that is not in its query's list

TIES = ("pessimistic", "official")
Rows = torch.Tensor | Sequence[int] | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Ranking:
    """Outcome of ``rank_candidates``; all on the CPU.

    ranks: [N, K] int64, the 1-based rank of each relevant candidate; 0 in the places beyond a query's own number,
        ``NEVER`` for one outside its query's list.
    gains: [N, K] float64, its gain; 0 in those places.
    top: [N, k] int64, candidate rows by falling similarity, -1 beyond the end of a short list (equal similarities: in
        the order the library's top-k gives; for showing, not for scoring).
    top_scores: [N, k] fp32, their similarities.
    pool: [N] int64, how many candidates the query had.
    """

    ranks: torch.Tensor
    gains: torch.Tensor
    top: torch.Tensor
    top_scores: torch.Tensor
    pool: torch.Tensor

    @property
    def best(self) -> torch.Tensor:
        """The rank of each query's best-placed relevant candidate, [N] int64."""
        return torch.where(self.ranks > 0, self.ranks, NEVER).amin(dim=1)


def rank_candidates(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    relevant: Rows,
    *,
    gains: Sequence[Sequence[float]] | torch.Tensor | None = None,
    lists: Sequence[Sequence[int]] | None = None,
    top_k: int = 0,
    ties: str = "pessimistic",
    absent: str = "error",
    query_tile: int = QUERY_TILE,
    candidate_tile: int = CANDIDATE_TILE,
) -> Ranking:
    """Rank every query's relevant candidates by inner product (cosine for unit-norm rows).

    queries [N, D], candidates [M, D]: floating, same device; bf16/fp16 are compared in fp32, fp64 in fp64.
    relevant: per query its relevant candidate rows: [N], [N, K] (-1 fills up), or a list of lists.
    gains: as ``relevant``, positive; all 1 when None.
    lists: per query the candidate rows it chooses among (MMEB style); None: all M for every query.
    ties: "pessimistic" or "official" (see the module's head). absent: what becomes of a relevant candidate outside its
    query's list: "error", or "never": it counts as relevant and is never found.
    Raises ValueError for no queries, a query without relevant candidates, rows out of range or named twice, and
    a relevant candidate missing from the query's list.
    """
    for name, value, known in (("ties", ties, TIES), ("absent", absent, ("error", "never"))):
        if value not in known:
            raise ValueError(f"{name} is {value!r}; expected one of {', '.join(known)}")
    official = ties == "official"
    _check_embeddings(queries, candidates)
    rows, gain = _relevance_table(relevant, gains, queries.shape[0], candidates.shape[0])
    listed = None if lists is None else _check_lists(lists, rows, candidates.shape[0], absent)
    dtype = torch.promote_types(torch.promote_types(queries.dtype, candidates.dtype), torch.float32)
    queries, candidates = queries.detach().to(dtype), candidates.detach().to(dtype)
    if listed is None:
        blocks = _shared_pool(queries, candidates, rows, gain, top_k, query_tile, candidate_tile, official)
        pool = torch.full((queries.shape[0],), candidates.shape[0])
    else:
        blocks = _own_lists(queries, candidates, rows, gain, listed, top_k, official)
        pool = torch.tensor([len(own) for own in listed])
    ranks, top, scores = (torch.cat(part).cpu() for part in zip(*blocks, strict=True))
    return Ranking(ranks, gain, top, scores.float(), pool)


def _shared_pool(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    rows: torch.Tensor,
    gain: torch.Tensor,
    top_k: int,
    nq: int,
    nc: int,
    official: bool,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Per block of ``nq`` queries: ranks [n, K], top rows [n, k], top scores [n, k]."""
    top_k = min(top_k, candidates.shape[0])
    for first in range(0, queries.shape[0], nq):
        n = min(nq, queries.shape[0] - first)
        block = _filled(queries[first : first + n], nq)
        own = rows[first : first + n].to(queries.device)
        own_gain = gain[first : first + n].to(queries.device)
        own_scores = _scores_of(block, candidates, own, nc)
        ahead = torch.zeros_like(own) if official else _ahead_among_relevant(own_scores, own_gain, own >= 0)
        best = own_scores.new_full((n, 0), 0.0)
        best_rows = own.new_full((n, 0), 0)
        for start in range(0, candidates.shape[0], nc):
            width = min(nc, candidates.shape[0] - start)
            tile = _similarity(block, _filled(candidates[start : start + width], nc))[:n, :width]
            if top_k:
                best, best_rows = _merge_top(best, best_rows, tile, start, top_k)
            ahead += _ahead_in_tile(tile, own_scores, own - start, official)
        yield torch.where(own >= 0, ahead + 1, 0), best_rows, best


def _own_lists(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    rows: torch.Tensor,
    gain: torch.Tensor,
    lists: list[torch.Tensor],
    top_k: int,
    official: bool,
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """As ``_shared_pool`` for queries with lists of their own, several short lists at a time."""
    longest = max(len(own) for own in lists)
    width = -(-longest // 64) * 64  # whole register tiles for every row of the product
    shared = candidates.shape[0] <= SHARED_LISTS * width
    step = QUERY_TILE if shared else max(1, LIST_TILE_ELEMENTS // (width * candidates.shape[1]))
    top_k = min(top_k, longest)
    for first in range(0, len(lists), step):
        part = lists[first : first + step]
        listed = torch.full((len(part), width), -1)
        for i, own in enumerate(part):
            listed[i, : len(own)] = own
        listed = listed.to(queries.device)
        block = queries[first : first + len(part)]
        tile = _scores_by_product(block, candidates, listed) if shared else _scores_by_gather(block, candidates, listed)
        own = rows[first : first + len(part)].to(queries.device)
        match = listed.unsqueeze(1) == own.unsqueeze(2)  # [n, K, width]
        inside = match.any(dim=2) & (own >= 0)
        place = torch.where(inside, match.int().argmax(dim=2), -1)
        own_scores = tile.gather(1, place.clamp(min=0))
        own_gain = gain[first : first + len(part)].to(queries.device)
        ahead = torch.zeros_like(own) if official else _ahead_among_relevant(own_scores, own_gain, inside)
        ahead += _ahead_in_tile(torch.where(listed >= 0, tile, torch.nan), own_scores, place, official)
        best, column = torch.where(listed >= 0, tile, -torch.inf).topk(top_k, dim=1)
        ranks = torch.where(inside, ahead + 1, torch.where(own >= 0, NEVER, 0))
        yield ranks, listed.gather(1, column), best


def _scores_by_gather(block: torch.Tensor, candidates: torch.Tensor, listed: torch.Tensor) -> torch.Tensor:
    """[n, width] similarities to the listed rows, by bringing those rows together."""
    tile = torch.bmm(candidates[listed.clamp(min=0)], block.unsqueeze(2)).squeeze(2)
    return tile.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _scores_by_product(block: torch.Tensor, candidates: torch.Tensor, listed: torch.Tensor) -> torch.Tensor:
    """As ``_scores_by_gather``, from the products with all candidates: less memory traffic where lists overlap."""
    n, filled = listed.shape[0], _filled(block, QUERY_TILE)
    tiles = [
        _similarity(filled, _filled(candidates[start : start + CANDIDATE_TILE], CANDIDATE_TILE))[:n]
        for start in range(0, candidates.shape[0], CANDIDATE_TILE)
    ]
    return torch.cat(tiles, dim=1).gather(1, listed.clamp(min=0))


def _similarity(block: torch.Tensor, tile: torch.Tensor) -> torch.Tensor:
    return (block @ tile.t()).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _filled(rows: torch.Tensor, count: int) -> torch.Tensor:
    """``rows`` filled up to ``count`` rows with zeros."""
    return rows if rows.shape[0] == count else torch.nn.functional.pad(rows, (0, 0, 0, count - rows.shape[0]))


def _scores_of(block: torch.Tensor, candidates: torch.Tensor, own: torch.Tensor, nc: int) -> torch.Tensor:
    """[n, K] similarity of each query to its relevant rows, by products of the same shape as the tiles'."""
    n, k = own.shape
    flat = own.clamp(min=0).reshape(-1)
    owner = torch.arange(n, device=own.device).repeat_interleave(k)
    scores = []
    for start in range(0, n * k, nc):
        part = flat[start : start + nc]
        tile = _similarity(block, _filled(candidates[part], nc))
        scores.append(tile[owner[start : start + nc], torch.arange(part.shape[0], device=own.device)])
    return torch.cat(scores).view(n, k)


def _ahead_among_relevant(scores: torch.Tensor, gain: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """[n, K] int64: how many of the query's own relevant candidates come before each of them."""
    n, k = scores.shape
    ahead = torch.zeros(n, k, dtype=torch.int64, device=scores.device)
    place = torch.arange(k, device=scores.device)
    for other in range(k):  # one column at a time: [n, K] at once, never [n, K, K]
        s, g = scores[:, other : other + 1], gain[:, other : other + 1]
        before = (s > scores) | ((s == scores) & ((g < gain) | ((g == gain) & (other < place))))
        ahead += (before & real[:, other : other + 1]).long()
    return ahead


def _ahead_in_tile(tile: torch.Tensor, scores: torch.Tensor, columns: torch.Tensor, official: bool) -> torch.Tensor:
    """[n, K] int64: candidates of this tile that come before each relevant one: those that are not relevant and not
    below it, or (official) those above it and those equal to it in an earlier column.

    columns [n, K]: where the relevant rows are in this tile; outside [0, width) they are not in it.
    """
    width = tile.shape[1]
    if official:
        column = torch.arange(width, device=tile.device)
        before = [
            (tile > scores[:, k : k + 1]) | ((tile == scores[:, k : k + 1]) & (column < columns[:, k : k + 1]))
            for k in range(scores.shape[1])
        ]
        return torch.stack([one.sum(dim=1) for one in before], dim=1)
    inside = (columns >= 0) & (columns < width)
    marked = torch.nn.functional.pad(tile, (0, 1))  # one spare column takes the writes of what is not in this tile
    marked.scatter_(1, torch.where(inside, columns, width), torch.nan)
    rest = marked[:, :width]  # relevant ones are NaN now, and NaN is never ahead
    return torch.stack([(rest >= scores[:, k : k + 1]).sum(dim=1) for k in range(scores.shape[1])], dim=1)


def _merge_top(
    best: torch.Tensor, rows: torch.Tensor, tile: torch.Tensor, start: int, top_k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    value, column = tile.topk(min(top_k, tile.shape[1]), dim=1)
    value = torch.cat([best, value], dim=1)
    rows = torch.cat([rows, column + start], dim=1)
    order = value.argsort(dim=1, descending=True, stable=True)[:, :top_k]
    return value.gather(1, order), rows.gather(1, order)


def _check_embeddings(queries: torch.Tensor, candidates: torch.Tensor) -> None:
    for name, value in (("queries", queries), ("candidates", candidates)):
        if value.ndim != 2 or not value.is_floating_point():
            got = f"{value.dtype} of shape {tuple(value.shape)}"
            raise ValueError(f"{name} must be a floating [rows, D] tensor, got {got}")
        if value.shape[0] == 0:
            raise ValueError(f"{name} must have at least one row, got shape {tuple(value.shape)}")
    if queries.shape[1] != candidates.shape[1]:
        raise ValueError(f"queries and candidates must agree in D, got {queries.shape[1]} and {candidates.shape[1]}")
    if queries.device != candidates.device:
        raise ValueError(f"queries and candidates must be on one device, got {queries.device} and {candidates.device}")


def _relevance_table(
    relevant: Rows, gains: Sequence[Sequence[float]] | torch.Tensor | None, n: int, m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """rows [N, K] int64 (-1 fills up) and gains [N, K] float64 (0 fills up), checked."""
    lists = _as_lists(relevant, "relevant", n)
    values = [[1.0] * len(own) for own in lists] if gains is None else _as_lists(gains, "gains", n)
    for i, (own, value) in enumerate(zip(lists, values, strict=True)):
        if not own:
            raise ValueError(f"relevant[{i}] is empty; every query needs at least one relevant candidate")
        bad = next((row for row in own if not 0 <= row < m), None)
        if bad is not None:
            raise ValueError(f"relevant[{i}] names candidate {bad}; expected rows in [0, {m})")
        if len(set(own)) < len(own):
            raise ValueError(f"relevant[{i}] names a candidate twice: {own}")
        if gains is not None and (len(value) != len(own) or not all(0 < g < float("inf") for g in value)):
            raise ValueError(f"gains[{i}] must be {len(own)} positive numbers, got {value}")
    width = max(len(own) for own in lists)
    rows = torch.tensor([own + [-1] * (width - len(own)) for own in lists])
    gain = torch.tensor([list(v) + [0.0] * (width - len(v)) for v in values], dtype=torch.float64)
    return rows, gain


def _as_lists(value: Sequence | torch.Tensor, name: str, n: int) -> list[list]:
    lists = value.tolist() if isinstance(value, torch.Tensor) else list(value)
    if len(lists) != n:
        raise ValueError(f"{name} must have one entry per query ({n}), got {len(lists)}")
    fill = -1 if name == "relevant" else 0
    lists = [list(row) if isinstance(row, (list, tuple)) else [row] for row in lists]
    return [[x for x in row if x != fill] for row in lists] if isinstance(value, torch.Tensor) else lists


def _check_lists(lists: Sequence[Sequence[int]], rows: torch.Tensor, m: int, absent: str) -> list[torch.Tensor]:
    if len(lists) != rows.shape[0]:
        raise ValueError(f"lists must have one entry per query ({rows.shape[0]}), got {len(lists)}")
    checked = []
    for i, (own, wanted) in enumerate(zip(lists, rows.tolist(), strict=True)):
        unique = set(own)
        if len(unique) < len(own):
            raise ValueError(f"lists[{i}] names a candidate twice")
        bad = next((row for row in own if not 0 <= row < m), None)
        if bad is not None:
            raise ValueError(f"lists[{i}] names candidate {bad}; expected rows in [0, {m})")
        missing = next((row for row in wanted if row >= 0 and row not in unique and absent == "error"), None)
        if missing is not None:
            raise ValueError(f"lists[{i}] lacks candidate {missing}, which is relevant for this query")
        checked.append(torch.as_tensor(list(own), dtype=torch.int64))
    return checked
