"""Operator B's Triton kernels: tiles of similarities that never reach memory as logits.

statistics_kernel  program = one term x one superblock of SM queries x SN keys, walked in BM x BN tiles. Row statistics
                   (rivals' maximum and sum, largest rival) live in registers along a row of tiles and are stored once
                   a superblock; column statistics live in the program's own slice of a partial array, read and
                   written once a tile. The host merges partials in a fixed order: no atomics, the same bits always.
                   The term varies fastest, so the programs that run together share tiles of q and k in L2.
gradient_kernel    program = one BM x BN tile of a panel: the similarities again, turned into G in the operands' dtype.
                   Library GEMMs then add G k to dq and G^T q to dk (triton_sweep.py).
FLOP: 2 N K D each, a term; with the two GEMMs 8 N K D. Bytes: q and k once per superblock through L2; per tile BM + BN
statistics; the panel (bounded) written once and read twice.

Logits are in base 2: s = (q . k) scale2, scale2 = log2(e) / temperature. While ``bounded`` is set (no |logit| can
exceed 60, see rows.py) no maximum is subtracted and ONE exponential serves a row and its column. A tile that holds a
positive, or the matrix's edge, takes the branch ``care``: positives are lifted out (rime/contrast.h). The bodies are
free of autotuning, libdevice and inline assembly, so that they run in the interpreter; there ``WIDEN`` casts the
operands to fp32, as its bf16 dot is wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _similarities(
    q, k, rows, cols, n, n_keys, width, stride_q, stride_k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WIDEN: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """q . k [BM, BN] fp32. Rows and columns past the end repeat the last one: loads need no mask for them."""
    depth = tl.arange(0, BK)
    q_at = q + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * stride_q + depth[None, :]
    k_at = k + tl.minimum(cols, n_keys - 1).to(tl.int64)[None, :] * stride_k + depth[:, None]
    x = tl.zeros((BM, BN), dtype=tl.float32)
    for start in range(0, width, BK):
        if EVEN:
            a, b = tl.load(q_at + start), tl.load(k_at + start)
        else:
            deep = depth < width - start
            a = tl.load(q_at + start, mask=deep[None, :], other=0.0)
            b = tl.load(k_at + start, mask=deep[:, None], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        x = tl.dot(a, b, x, input_precision=PRECISION)
    return x


@triton.jit
def _finite(shift):
    """A shift that leaves -inf - shift at -inf: 0 where nothing was kept."""
    return tl.where(shift == float("-inf"), 0.0, shift)


@triton.jit
def statistics_kernel(
    q, k, labels, row_ids, col_ids, row_limit, col_limit, positives, scale2, bounded, positive, row_part, col_part,
    n, n_keys, width, stride_q, stride_k, plane_q, plane_k, n_terms, query_modes, key_modes, SM, SN,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, IDS: tl.constexpr, MARGIN: tl.constexpr,
    WIDEN: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """row_part [terms, 3, key superblocks, n]: maximum, sum, largest rival. col_part [terms, 2, row superblocks,
    n_keys]. labels [n, positives]; positive [terms, n, positives], written where a label is met. query_modes,
    key_modes: 4 bits a term."""
    term = tl.program_id(0) % n_terms
    a_blocks, b_blocks = tl.cdiv(n, SM), tl.cdiv(n_keys, SN)
    a = (tl.program_id(0) // n_terms) % a_blocks
    b = tl.program_id(0) // n_terms // a_blocks
    q += ((query_modes >> (4 * term)) & 15).to(tl.int64) * plane_q
    k += ((key_modes >> (4 * term)) & 15).to(tl.int64) * plane_k
    scale, one_exponential = tl.load(scale2), tl.load(bounded) != 0
    row_out = row_part + (term * 3 * b_blocks + b).to(tl.int64) * n
    row_plane = b_blocks.to(tl.int64) * n
    col_out = col_part + (term * 2 * a_blocks + a).to(tl.int64) * n_keys
    col_plane = a_blocks.to(tl.int64) * n_keys
    for row0 in range(a * SM, tl.minimum((a + 1) * SM, n), BM):
        rows = row0 + tl.arange(0, BM)
        live = rows < n
        first_label, last_label = n_keys.to(tl.int64), tl.full((), -1, dtype=tl.int64)
        for p in range(positives):
            label = tl.load(labels + rows.to(tl.int64) * positives + p, mask=live, other=-1)
            first_label = tl.minimum(first_label, tl.min(tl.where(label >= 0, label, n_keys), axis=0))
            last_label = tl.maximum(last_label, tl.max(label, axis=0))
        rival = tl.full((BM,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BM,), dtype=tl.float32)
        for col0 in range(b * SN, tl.minimum((b + 1) * SN, n_keys), BN):
            cols = col0 + tl.arange(0, BN)
            inside = cols < n_keys
            s = scale * _similarities(
                q, k, rows, cols, n, n_keys, width, stride_q, stride_k, BM, BN, BK, WIDEN, EVEN, PRECISION
            )
            if (row0 + BM > n) | (col0 + BN > n_keys) | ((last_label >= col0) & (first_label < col0 + BN)):
                x = s
                s = tl.where(live[:, None] & inside[None, :], s, float("-inf"))
                for p in range(positives):
                    place = rows.to(tl.int64) * positives + p
                    label = tl.load(labels + place, mask=live, other=-1)
                    own = cols[None, :] == label[:, None]
                    own_logit = tl.sum(tl.where(own, x, 0.0), axis=1)
                    met = live & (label >= col0) & (label < tl.minimum(col0 + BN, n_keys))
                    tl.store(positive + (term * n).to(tl.int64) * positives + place, own_logit, mask=met)
                    s = tl.where(own, float("-inf"), s)
            if IDS:
                row_id = tl.load(row_ids + rows, mask=live, other=0)
                col_id = tl.load(col_ids + cols, mask=inside, other=0)
                s = tl.where(row_id[:, None] == col_id[None, :], float("-inf"), s)
            before = rival
            if MARGIN:
                row_high = tl.load(row_limit + term * n + rows, mask=live, other=float("inf")) * scale
                col_high = tl.load(col_limit + term * n_keys + cols, mask=inside, other=float("inf")) * scale
                rival = tl.maximum(rival, tl.max(tl.where(s > row_high[:, None], float("-inf"), s), axis=1))
            else:
                rival = tl.maximum(rival, tl.max(s, axis=1))
            begun = inside & (cols < tl.where(row0 > a * SM, n_keys, 0))  # this program wrote here before
            col_total = tl.load(col_out + col_plane + cols, mask=begun, other=0.0)
            if one_exponential:
                e = tl.exp2(s)
                col_top = tl.zeros((BN,), dtype=tl.float32)
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
                col_before = tl.load(col_out + cols, mask=begun, other=float("-inf"))
                col_top = tl.maximum(col_before, tl.max(by_col, axis=0))
                col_total *= tl.exp2(col_before - _finite(col_top))
                col_total += tl.sum(tl.exp2(by_col - _finite(col_top)[None, :]), axis=0)
            tl.store(col_out + cols, col_top, mask=inside)
            tl.store(col_out + col_plane + cols, col_total, mask=inside)
            tl.debug_barrier()  # the next row of tiles reads what other threads of this program wrote
        tl.store(row_out + rows, tl.where(one_exponential, 0.0, rival), mask=live)
        tl.store(row_out + row_plane + rows, total, mask=live)
        tl.store(row_out + 2 * row_plane + rows, rival, mask=live)


@triton.jit
def gradient_kernel(
    q, k, labels, positives, row_ids, col_ids, row_limit, col_limit, scale2, bounded, ratio, row_shift, row_coef,
    col_shift, col_coef, positive_slope, panel, row_first, col_first, n, n_keys, width, stride_q, stride_k,
    stride_panel, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, IDS: tl.constexpr, MARGIN: tl.constexpr,
    WIDEN: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """panel [rows, columns] <- ratio x (row_coef 2^(s - row_shift) + col_coef 2^(s - col_shift)), and
    ratio x positive_slope at the positives, for rows row_first .. n - 1 and columns col_first .. n_keys - 1."""
    row0, col0 = row_first + tl.program_id(0) * BM, col_first + tl.program_id(1) * BN
    rows, cols = row0 + tl.arange(0, BM), col0 + tl.arange(0, BN)
    live, inside = rows < n, cols < n_keys
    scale = tl.load(scale2)
    s = scale * _similarities(
        q, k, rows, cols, n, n_keys, width, stride_q, stride_k, BM, BN, BK, WIDEN, EVEN, PRECISION
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
        label = tl.load(labels + place, mask=live, other=-1)
        slope = tl.load(positive_slope + place, mask=live, other=0.0) * factor
        g = tl.where(cols[None, :] == label[:, None], slope[:, None], g)
    at = panel + (rows - row_first).to(tl.int64)[:, None] * stride_panel + (cols - col_first)[None, :]
    tl.store(at, g.to(panel.dtype.element_ty), mask=live[:, None] & inside[None, :])
