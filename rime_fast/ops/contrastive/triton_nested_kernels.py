"""The contrastive loss's Triton kernels for nested widths (Matryoshka): every width on the way to the widest.

nested_statistics_kernel  program = one superblock of SM queries x SN keys of a term, walked in BM x BN tiles. A tile's
                          products grow by the columns between one width and the next; at each edge they are scaled by
                          both sides' inverse norms and counted. Row and column statistics of all widths, too many for
                          registers, live in the program's own slices of partial arrays, read and written once a tile.
nested_gradient_kernel    program = one BM x BN tile of a panel: the same walk makes each width's gradient to its
                          products, kept in fp32 scratch of the tile's own; then, from the widest down, their suffix
                          sums go to the panels that library GEMMs add to dq and dk. Sums of G S a tile, for the rows'
                          own directions, are stored as parts; the host adds them up in a fixed order.
FLOP and conventions (base 2, ``bounded``, ``WIDEN``) as in triton_kernels.py. Rows come by pointers: the edges of
widths need not be multiples of anything.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rime_fast.ops.contrastive.triton_kernels import _finite


@triton.jit
def _grow(
    x,
    q_at,
    k_at,
    start,
    stop,
    BK: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x + the products over columns start .. stop - 1."""
    for begin in range(start, stop, BK):
        deep = (begin + tl.arange(0, BK) < stop)[None, :]
        a, b = tl.load(q_at + begin, mask=deep, other=0.0), tl.load(k_at + begin, mask=deep, other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        x = tl.dot(a, b.T, x, input_precision=PRECISION)
    return x


@triton.jit
def nested_statistics_kernel(
    q,
    k,
    edges,
    q_norm,
    k_norm,
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
    widths,
    stride_q,
    stride_k,
    SM,
    SN,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    IDS: tl.constexpr,
    MARGIN: tl.constexpr,
    BOUNDED: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write row_part [widths, 3, key superblocks, n]: maximum, sum, largest rival; and col_part [widths, 2, row
    superblocks, n_keys]. edges [widths + 1]: 0 and the widths. q_norm [widths, n], k_norm [widths, n_keys], limits
    alike; positive [widths, n, positives], written where a label is met. label_range as in statistics_kernel."""
    a_blocks, b_blocks = tl.cdiv(n, SM), tl.cdiv(n_keys, SN)
    a, b = tl.program_id(0) % a_blocks, tl.program_id(0) // a_blocks
    scale = tl.load(scale2)
    mine = (tl.load(bounded) != 0) == BOUNDED  # otherwise it is the other launch's work
    row_plane, col_plane = b_blocks.to(tl.int64) * n, a_blocks.to(tl.int64) * n_keys
    depth = tl.arange(0, BK)
    for col0 in range(b * SN, tl.minimum((b + 1) * SN, tl.where(mine, n_keys, 0)), BN):
        cols = col0 + tl.arange(0, BN)
        inside = cols < n_keys
        k_at = k + tl.minimum(cols, n_keys - 1).to(tl.int64)[:, None] * stride_k + depth[None, :]
        for row0 in range(a * SM, tl.minimum((a + 1) * SM, n), BM):
            rows = row0 + tl.arange(0, BM)
            live = rows < n
            q_at = q + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * stride_q + depth[None, :]
            first_label, last_label = tl.load(label_range + row0 // BM * 2), tl.load(label_range + row0 // BM * 2 + 1)
            care = (row0 + BM > n) | (col0 + BN > n_keys) | ((last_label >= col0) & (first_label < col0 + BN))
            row_begun = live & (rows < tl.where(col0 > b * SN, n, 0))  # this program wrote here before
            col_begun = inside & (cols < tl.where(row0 > a * SM, n_keys, 0))
            x = tl.zeros((BM, BN), dtype=tl.float32)
            for w in range(0, widths):
                x = _grow(x, q_at, k_at, tl.load(edges + w), tl.load(edges + w + 1), BK, WIDEN, PRECISION)
                left = tl.load(q_norm + w * n + rows, mask=live, other=0.0) * scale
                right = tl.load(k_norm + w * n_keys + cols, mask=inside, other=0.0)
                s = x * left[:, None] * right[None, :]
                if care:
                    s = tl.where(live[:, None] & inside[None, :], s, float("-inf"))
                    for p in range(positives):
                        place = rows.to(tl.int64) * positives + p
                        label = (tl.load(labels + place, mask=live, other=-1) - col0).to(tl.int32)
                        own = tl.arange(0, BN)[None, :] == label[:, None]
                        own_logit = tl.sum(tl.where(own, s, 0.0), axis=1)
                        met = (label >= 0) & (label < tl.minimum(BN, n_keys - col0))
                        tl.store(positive + (w * n).to(tl.int64) * positives + place, own_logit, mask=met)
                        s = tl.where(own, float("-inf"), s)
                if IDS:
                    row_id = tl.load(row_ids + rows, mask=live, other=0)
                    col_id = tl.load(col_ids + cols, mask=inside, other=0)
                    s = tl.where(row_id[:, None] == col_id[None, :], float("-inf"), s)
                by_row, by_col = s, s
                if MARGIN:
                    row_high = tl.load(row_limit + w * n + rows, mask=live, other=float("inf")) * scale
                    col_high = tl.load(col_limit + w * n_keys + cols, mask=inside, other=float("inf")) * scale
                    by_row = tl.where(s > row_high[:, None], float("-inf"), s)
                    by_col = tl.where(s > col_high[None, :], float("-inf"), s)
                row_out = row_part + (w * 3) * row_plane + b.to(tl.int64) * n + rows
                col_out = col_part + (w * 2) * col_plane + a.to(tl.int64) * n_keys + cols
                before = tl.load(row_out + 2 * row_plane, mask=row_begun, other=float("-inf"))
                total = tl.load(row_out + row_plane, mask=row_begun, other=0.0)
                col_total = tl.load(col_out + col_plane, mask=col_begun, other=0.0)
                rival = tl.maximum(before, tl.max(by_row, axis=1))
                if BOUNDED:
                    total += tl.sum(tl.exp2(by_row), axis=1)
                    col_total += tl.sum(tl.exp2(by_col), axis=0)
                    tl.store(row_out, tl.zeros((BM,), dtype=tl.float32), mask=live)
                    tl.store(col_out, tl.zeros((BN,), dtype=tl.float32), mask=inside)
                else:
                    col_before = tl.load(col_out, mask=col_begun, other=float("-inf"))
                    top = tl.maximum(col_before, tl.max(by_col, axis=0))
                    total *= tl.exp2(before - _finite(rival))
                    total += tl.sum(tl.exp2(by_row - _finite(rival)[:, None]), axis=1)
                    col_total *= tl.exp2(col_before - _finite(top))
                    col_total += tl.sum(tl.exp2(by_col - _finite(top)[None, :]), axis=0)
                    tl.store(row_out, rival, mask=live)
                    tl.store(col_out, top, mask=inside)
                tl.store(row_out + row_plane, total, mask=live)
                tl.store(row_out + 2 * row_plane, rival, mask=live)
                tl.store(col_out + col_plane, col_total, mask=inside)
            tl.debug_barrier()  # the next tile reads what other threads of this program wrote


@triton.jit
def nested_gradient_kernel(
    q,
    k,
    edges,
    q_norm,
    k_norm,
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
    scratch,
    by_row,
    by_col,
    row_first,
    col_first,
    n,
    n_keys,
    widths,
    all_rows,
    all_keys,
    stride_q,
    stride_k,
    stride_panel,
    plane,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    IDS: tl.constexpr,
    MARGIN: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write panel [widths, rows, columns] <- the gradient to the products between one width and the next, for rows
    row_first .. n - 1 and columns col_first .. n_keys - 1; a width's matrix is ``plane`` apart, scratch (fp32)
    alike. Row arrays are [widths, all_rows], column arrays [widths, all_keys]; ratio [widths]. by_row [widths,
    tiles of columns, rows], by_col [widths, tiles of rows, columns]: a tile's sums of G S."""
    row0, col0 = row_first + tl.program_id(0) * BM, col_first + tl.program_id(1) * BN
    rows, cols = row0 + tl.arange(0, BM), col0 + tl.arange(0, BN)
    live, inside = rows < n, cols < n_keys
    both = live[:, None] & inside[None, :]
    scale = tl.load(scale2)
    limited = tl.load(bounded) != 0
    depth = tl.arange(0, BK)
    q_at = q + tl.minimum(rows, n - 1).to(tl.int64)[:, None] * stride_q + depth[None, :]
    k_at = k + tl.minimum(cols, n_keys - 1).to(tl.int64)[:, None] * stride_k + depth[None, :]
    at = (rows - row_first).to(tl.int64)[:, None] * stride_panel + (cols - col_first)[None, :]
    x = tl.zeros((BM, BN), dtype=tl.float32)
    for w in range(0, widths):
        x = _grow(x, q_at, k_at, tl.load(edges + w), tl.load(edges + w + 1), BK, WIDEN, PRECISION)
        row_at, col_at = w * all_rows + rows, w * all_keys + cols
        left = tl.load(q_norm + row_at, mask=live, other=0.0)
        right = tl.load(k_norm + col_at, mask=inside, other=0.0)
        similarity = x * left[:, None] * right[None, :]
        s = similarity * scale
        factor = tl.load(ratio + w)
        a = (tl.load(row_coef + row_at, mask=live, other=0.0) * factor)[:, None]
        b = (tl.load(col_coef + col_at, mask=inside, other=0.0) * factor)[None, :]
        if MARGIN:
            row_high = tl.load(row_limit + row_at, mask=live, other=float("inf")) * scale
            col_high = tl.load(col_limit + col_at, mask=inside, other=float("inf")) * scale
            a, b = tl.where(s > row_high[:, None], 0.0, a), tl.where(s > col_high[None, :], 0.0, b)
        if limited:
            g = tl.exp2(s) * (a + b)
        else:  # a zero coefficient goes with a masked, perhaps overflowing, exponential
            g = tl.where(a == 0.0, 0.0, tl.exp2(s - tl.load(row_shift + row_at, mask=live, other=0.0)[:, None]) * a)
            f = tl.exp2(s - tl.load(col_shift + col_at, mask=inside, other=0.0)[None, :]) * b
            g += tl.where(b == 0.0, 0.0, f)
        if IDS:
            row_id = tl.load(row_ids + rows, mask=live, other=0)
            col_id = tl.load(col_ids + cols, mask=inside, other=0)
            g = tl.where(row_id[:, None] == col_id[None, :], 0.0, g)
        for p in range(positives):
            place = rows.to(tl.int64) * positives + p
            label = (tl.load(labels + place, mask=live, other=-1) - col0).to(tl.int32)
            slope = tl.load(positive_slope + (w * all_rows).to(tl.int64) * positives + place, mask=live, other=0.0)
            g = tl.where(tl.arange(0, BN)[None, :] == label[:, None], (slope * factor)[:, None], g)
        g = tl.where(both, g, 0.0)
        product = g * similarity
        row_tiles, col_tiles = tl.num_programs(0), tl.num_programs(1)
        row_slot = (w * col_tiles + tl.program_id(1)) * (n - row_first) + rows - row_first
        col_slot = (w * row_tiles + tl.program_id(0)) * (n_keys - col_first) + cols - col_first
        tl.store(by_row + row_slot, tl.sum(product, axis=1), mask=live)
        tl.store(by_col + col_slot, tl.sum(product, axis=0), mask=inside)
        tl.store(scratch + w * plane + at, g * left[:, None] * right[None, :], mask=both)
    tl.debug_barrier()
    suffix = tl.zeros((BM, BN), dtype=tl.float32)
    for v in range(0, widths):
        w = widths - 1 - v
        suffix += tl.load(scratch + w * plane + at, mask=both, other=0.0)
        tl.store(panel + w * plane + at, suffix.to(panel.dtype.element_ty), mask=both)
