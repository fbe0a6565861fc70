"""The contrastive loss's Triton kernels: tiles of similarities that never reach memory as logits.

statistics_kernel  program = one term x one superblock of SM queries x SN keys, walked in BM x BN tiles, down the rows
                   first. Column statistics (rivals' maximum and sum) live in registers down a column of tiles and are
                   stored once a superblock; row statistics, of which a thread holds far fewer, live in the program's
                   own slice of a partial array, read and written once a tile. The term varies fastest, so the
                   programs that run together share tiles of q and k in L2.
merge_kernel       those partials to running statistics in fp64, in a fixed order: no atomics, the same bits always
gradient_kernel    program = one BM x BN tile of a panel: the similarities again, turned into G in the operands' dtype.
                   Library GEMMs then add G k to dq and G^T q to dk (triton.py).
FLOP: 2 N K D each, a term; with the two GEMMs 8 N K D. Bytes: q and k once per superblock through L2; per tile BM + BN
statistics; the panel (bounded) written once and read twice.

Logits are in base 2: s = (q . k) scale2, scale2 = log2(e) / temperature. While ``bounded`` is set (no |logit| can
exceed 60, see softmax.py) no maximum is subtracted and ONE exponential serves a row and its column. A tile that holds a
positive, or the matrix's edge, takes the branch ``care``: positives are lifted out (csrc/rime). The bodies are
free of autotuning, libdevice and inline assembly, so that they run in the interpreter; there ``WIDEN`` casts the
operands to fp32, as its bf16 dot is wrong.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

LN2 = tl.constexpr(math.log(2))  # a plain number bound to a name in a kernel would be fp32


@triton.jit
def _similarities(
    q,
    k,
    row0,
    col0,
    q_base,
    k_base,
    n,
    n_keys,
    width,
    stride_q,
    stride_k,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDEN: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """q . k [BM, BN] fp32 of rows row0 and columns col0 onwards, which lie q_base and k_base rows into q and k.

    What stands in rows and columns past the end is finite wherever q and k are: the next mode's, zeros, the last one.
    """
    x = tl.zeros((BM, BN), dtype=tl.float32)
    depth = tl.arange(0, BK)
    if not TMA:
        rows, cols = row0 + tl.arange(0, BM), col0 + tl.arange(0, BN)
        q_at = q + (q_base + tl.minimum(rows, n - 1)).to(tl.int64)[:, None] * stride_q + depth[None, :]
        k_at = k + (k_base + tl.minimum(cols, n_keys - 1)).to(tl.int64)[:, None] * stride_k + depth[None, :]
    for start in range(0, width, BK):
        if TMA:
            a, b = q.load([q_base + row0, start]), k.load([k_base + col0, start])
        elif EVEN:
            a, b = tl.load(q_at + start), tl.load(k_at + start)
        else:
            deep = (depth < width - start)[None, :]
            a, b = tl.load(q_at + start, mask=deep, other=0.0), tl.load(k_at + start, mask=deep, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        x = tl.dot(a, b.T, x, input_precision=PRECISION)
    return x


@triton.jit
def _finite(shift):
    """A shift that leaves -inf - shift at -inf: 0 where nothing was kept."""
    return tl.where(shift == float("-inf"), 0.0, shift)


@triton.jit
def statistics_kernel(
    q,
    k,
    labels,
    label_range,
    row_ids,
    col_ids,
    row_limit,
    col_limit,
    positives,
    scale2,
    bounded,
    positive,
    row_part,
    col_part,
    n,
    n_keys,
    width,
    stride_q,
    stride_k,
    first_row,
    plane_q,
    n_terms,
    query_modes,
    key_modes,
    SM,
    SN,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    IDS: tl.constexpr,
    MARGIN: tl.constexpr,
    BOUNDED: tl.constexpr,
    WIDEN: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Add a superblock of similarities to the running statistics. row_part [terms, 3, key superblocks, n]: maximum,
    sum, largest rival. col_part [terms, 2, row superblocks, n_keys]. q [modes x plane_q, width], of which rows
    first_row .. first_row + n - 1 of each mode; k [modes x n_keys, width]; either a pointer or (TMA) a descriptor of
    blocks [BM or BN, BK]. labels [n, positives], label_range [tiles of rows, 2]: their smallest and largest; positive
    [terms, n, positives], written where a label is met. query_modes, key_modes: 4 bits a term."""
    term = tl.program_id(0) % n_terms
    a_blocks, b_blocks = tl.cdiv(n, SM), tl.cdiv(n_keys, SN)
    a = (tl.program_id(0) // n_terms) % a_blocks
    b = tl.program_id(0) // n_terms // a_blocks
    q_base = ((query_modes >> (4 * term)) & 15).to(tl.int32) * plane_q + first_row  # nine terms fill more than 31 bits
    k_base = ((key_modes >> (4 * term)) & 15).to(tl.int32) * n_keys
    scale = tl.load(scale2)
    mine = (tl.load(bounded) != 0) == BOUNDED  # otherwise it is the other launch's work
    row_out = row_part + (term * 3 * b_blocks + b).to(tl.int64) * n
    row_plane = b_blocks.to(tl.int64) * n
    col_out = col_part + (term * 2 * a_blocks + a).to(tl.int64) * n_keys
    col_plane = a_blocks.to(tl.int64) * n_keys
    for col0 in range(b * SN, tl.minimum((b + 1) * SN, tl.where(mine, n_keys, 0)), BN):
        cols = col0 + tl.arange(0, BN)
        inside = cols < n_keys
        col_top = tl.full((BN,), 0.0 if BOUNDED else float("-inf"), dtype=tl.float32)
        col_total = tl.zeros((BN,), dtype=tl.float32)
        for row0 in range(a * SM, tl.minimum((a + 1) * SM, n), BM):
            rows = row0 + tl.arange(0, BM)
            live = rows < n
            s = scale * _similarities(
                q,
                k,
                row0,
                col0,
                q_base,
                k_base,
                n,
                n_keys,
                width,
                stride_q,
                stride_k,
                BM,
                BN,
                BK,
                WIDEN,
                EVEN,
                PRECISION,
                TMA,
            )
            first_label, last_label = tl.load(label_range + row0 // BM * 2), tl.load(label_range + row0 // BM * 2 + 1)
            if (row0 + BM > n) | (col0 + BN > n_keys) | ((last_label >= col0) & (first_label < col0 + BN)):
                s = tl.where(live[:, None] & inside[None, :], s, float("-inf"))
                for p in range(positives):
                    place = rows.to(tl.int64) * positives + p
                    label = (tl.load(labels + place, mask=live, other=-1) - col0).to(tl.int32)
                    own = tl.arange(0, BN)[None, :] == label[:, None]
                    own_logit = tl.sum(tl.where(own, s, 0.0), axis=1)
                    met = (label >= 0) & (label < tl.minimum(BN, n_keys - col0))
                    tl.store(positive + (term * n).to(tl.int64) * positives + place, own_logit, mask=met)
                    s = tl.where(own, float("-inf"), s)
            if IDS:
                row_id = tl.load(row_ids + rows, mask=live, other=0)
                col_id = tl.load(col_ids + cols, mask=inside, other=0)
                s = tl.where(row_id[:, None] == col_id[None, :], float("-inf"), s)
            begun = live & (rows < tl.where(col0 > b * SN, n, 0))  # this program wrote here before
            before = tl.load(row_out + 2 * row_plane + rows, mask=begun, other=float("-inf"))
            total = tl.load(row_out + row_plane + rows, mask=begun, other=0.0)
            if MARGIN:
                row_high = tl.load(row_limit + term * n + rows, mask=live, other=float("inf")) * scale
                col_high = tl.load(col_limit + term * n_keys + cols, mask=inside, other=float("inf")) * scale
                rival = tl.maximum(before, tl.max(tl.where(s > row_high[:, None], float("-inf"), s), axis=1))
            else:
                rival = tl.maximum(before, tl.max(s, axis=1))
            if BOUNDED:
                e = tl.exp2(s)
                if MARGIN:
                    total += tl.sum(tl.where(s > row_high[:, None], 0.0, e), axis=1)
                    col_total += tl.sum(tl.where(s > col_high[None, :], 0.0, e), axis=0)
                else:
                    total += tl.sum(e, axis=1)
                    col_total += tl.sum(e, axis=0)
            else:
                total *= tl.exp2(before - _finite(rival))
                by_row = s - _finite(rival)[:, None]
                if MARGIN:
                    by_row = tl.where(s > row_high[:, None], float("-inf"), by_row)
                total += tl.sum(tl.exp2(by_row), axis=1)
                by_col = s
                if MARGIN:
                    by_col = tl.where(s > col_high[None, :], float("-inf"), s)
                top = tl.maximum(col_top, tl.max(by_col, axis=0))
                col_total *= tl.exp2(col_top - _finite(top))
                col_total += tl.sum(tl.exp2(by_col - _finite(top)[None, :]), axis=0)
                col_top = top
            tl.store(row_out + rows, tl.zeros((BM,), dtype=tl.float32) if BOUNDED else rival, mask=live)
            tl.store(row_out + row_plane + rows, total, mask=live)
            tl.store(row_out + 2 * row_plane + rows, rival, mask=live)
            tl.debug_barrier()  # the next column of tiles reads what other threads of this program wrote
        tl.store(col_out + cols, col_top, mask=inside)
        tl.store(col_out + col_plane + cols, col_total, mask=inside)


@triton.jit
def gradient_kernel(
    q,
    k,
    labels,
    positives,
    row_ids,
    col_ids,
    row_limit,
    col_limit,
    scale2,
    bounded,
    ratio,
    row_shift,
    row_coef,
    col_shift,
    col_coef,
    positive_slope,
    panel,
    row_first,
    col_first,
    n,
    n_keys,
    width,
    stride_q,
    stride_k,
    stride_panel,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    IDS: tl.constexpr,
    MARGIN: tl.constexpr,
    WIDEN: tl.constexpr,
    EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
    TMA: tl.constexpr,
):
    """Write the similarities' gradient for the library's products: panel [rows, columns] <- ratio x (row_coef 2^(s -
    row_shift) + col_coef 2^(s - col_shift)), and ratio x positive_slope at the positives, for rows row_first .. n - 1
    and columns col_first .. n_keys - 1."""
    row0, col0 = row_first + tl.program_id(0) * BM, col_first + tl.program_id(1) * BN
    rows, cols = row0 + tl.arange(0, BM), col0 + tl.arange(0, BN)
    live, inside = rows < n, cols < n_keys
    scale = tl.load(scale2)
    zero = tl.full((), 0, dtype=tl.int32)
    s = scale * _similarities(
        q, k, row0, col0, zero, zero, n, n_keys, width, stride_q, stride_k, BM, BN, BK, WIDEN, EVEN, PRECISION, TMA
    )
    factor = tl.load(ratio)
    a = (tl.load(row_coef + rows, mask=live, other=0.0) * factor)[:, None]
    b = (tl.load(col_coef + cols, mask=inside, other=0.0) * factor)[None, :]
    if MARGIN:
        row_high = tl.load(row_limit + rows, mask=live, other=float("inf")) * scale
        col_high = tl.load(col_limit + cols, mask=inside, other=float("inf")) * scale
        a, b = tl.where(s > row_high[:, None], 0.0, a), tl.where(s > col_high[None, :], 0.0, b)
    if tl.load(bounded) != 0:
        g = tl.exp2(s) * (a + b)
    else:  # a zero coefficient goes with a masked, perhaps overflowing, exponential
        g = tl.where(a == 0.0, 0.0, tl.exp2(s - tl.load(row_shift + rows, mask=live, other=0.0)[:, None]) * a)
        f = tl.exp2(s - tl.load(col_shift + cols, mask=inside, other=0.0)[None, :]) * b
        g += tl.where(b == 0.0, 0.0, f)
    if IDS:
        row_id = tl.load(row_ids + rows, mask=live, other=0)
        col_id = tl.load(col_ids + cols, mask=inside, other=0)
        g = tl.where(row_id[:, None] == col_id[None, :], 0.0, g)
    for p in range(positives):
        place = rows.to(tl.int64) * positives + p
        label = (tl.load(labels + place, mask=live, other=-1) - col0).to(tl.int32)
        slope = tl.load(positive_slope + place, mask=live, other=0.0) * factor
        g = tl.where(tl.arange(0, BN)[None, :] == label[:, None], slope[:, None], g)
    at = panel + (rows - row_first).to(tl.int64)[:, None] * stride_panel + (cols - col_first)[None, :]
    tl.store(at, g.to(panel.dtype.element_ty), mask=live[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["n_parts", "size", "stride", "stride_known"])
def merge_kernel(
    parts,
    positive,
    running_max,
    running_sum,
    rival,
    known,
    n_parts,
    size,
    positives,
    stride,
    stride_known,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add partial statistics in base 2, parts [losses, PLANES, n_parts, size], to running ones in base e [losses, size]
    of row stride ``stride``, in fp64 and in a fixed order.

    Planes: the maximum, the sum below it, and of rows the largest rival. Of rows also positive [losses, size,
    positives] in base 2, -inf where none was met, goes to ``known``, whose losses lie ``stride_known`` apart.
    """
    loss, at = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < size
    top_at = parts + loss * PLANES * n_parts * size + at
    sum_at, rival_at = top_at + n_parts * size, top_at + 2 * n_parts * size
    into = loss * stride + at
    old = tl.load(running_max + into, mask=live, other=0.0).to(tl.float64)
    best = old
    for part in range(n_parts):
        top = tl.load(top_at + part * size, mask=live, other=0.0).to(tl.float64) * LN2
        best = tl.where((top > best) | (top != top), top, best)  # NaN stays
    none = best == float("-inf")
    shift = tl.where(none, 0.0, best).to(running_max.dtype.element_ty)  # what later steps will subtract
    exact = shift.to(tl.float64)
    total = tl.load(running_sum + into, mask=live, other=0.0) * tl.exp(old - exact)
    for part in range(n_parts):
        top = tl.load(top_at + part * size, mask=live, other=0.0).to(tl.float64) * LN2
        total += tl.load(sum_at + part * size, mask=live, other=0.0).to(tl.float64) * tl.exp(top - exact)
    tl.store(running_sum + into, total, mask=live)
    tl.store(running_max + into, tl.where(none, float("-inf"), shift), mask=live)
    if PLANES == 3:
        most = tl.load(rival + into, mask=live, other=0.0)
        for part in range(n_parts):
            other = (tl.load(rival_at + part * size, mask=live, other=0.0).to(tl.float64) * LN2).to(tl.float32)
            most = tl.where((other > most) | (other != other), other, most)
        tl.store(rival + into, most, mask=live)
        for p in range(positives):
            place = at.to(tl.int64) * positives + p
            found = tl.load(positive + loss * size * positives + place, mask=live, other=0.0)
            met = live & (found != float("-inf"))
            tl.store(known + loss * stride_known + place, (found.to(tl.float64) * LN2).to(tl.float32), mask=met)
