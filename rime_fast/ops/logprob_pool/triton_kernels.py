"""Triton kernels of the log-prob operator: tiles over (scored rows, vocabulary), no logits in memory.

The scored rows of X come gathered (triton_places.py), 0 past their number M, which is read on the device:
programs are persistent and walk the units of work there are, so the cost follows M without the host knowing it. What is
kept by row of the batch (targets, statistics, gradients) is found through `order`, the scored rows' numbers.

forward_kernel     unit = BM rows x one split (SPLIT tiles of BN columns): X W^T tile by tile in fp32, an online
                   max / sum / entropy sum and the target's logit; one partial result per row and split,
                   which merge_kernel (triton_rows.py) joins in a fixed order: same bits always. The
                   read-outs of the same hidden states come from this launch too (triton_rows.py).
dlogits_kernel     unit = BM x BN: the tile again, then its gradient, into a panel [C, P] in the operands' dtype.
dhead_kernel       unit = BM columns of the panel x BN of H: dW = dlogits^T X over all M rows, written once; dbias.
dhidden_kernel     unit = BM rows x BN of H: dX += dlogits W over the panel, each element owned by one program.
No atomics. FLOP: 2MHV each for forward, dlogits, dhead, dhidden.

Order: units go in bands of GROUP row blocks, so that the ~130 programs that run together share both operands in L2: a
band of 16 x 128 rows of H 4096 is 16 MiB of X, which stays there while W passes once; W is read from memory M / 2048
times, X once. Arithmetic intensity of a tile out of L2: BM BN / (BM + BN) FLOP a byte (bf16), 64 for 128 x 128 and 85
for 128 x 256, which dhead takes on sm_90 (accumulator: 128 registers a thread on 8 warps, two warpgroups of wgmma);
the other kernels spill at that size (measured by the cross-compiler, triton_tiles.py) and keep 128 x 128. Shared
memory: stages x BK (BM + BN) x 2 bytes.

TMA (sm_90 on, 16-bit operands, rows that start on 16 bytes): X, W and the panel come through tensor descriptors, made
by the host. The plain path (sm_80) loads all through pointers; both run the same products in the same order.

Forward and dlogits are launched with enable_fp_fusion off: in a fused multiply-add, z - lse would keep what
the rounding of z lost, which at |z| of 1e9 is more than the logarithm of any float.

The bodies are free of autotuning, libdevice and inline assembly, so that they run in the interpreter; there
``WIDEN`` casts the operands to fp32, as its bf16 dot is wrong.
"""

from __future__ import annotations

import triton
import triton.language as tl

from rime_fast.ops.logprob_pool.triton_rows import read_out, tanh


@triton.jit
def _place(unit, rows, columns, GROUP: tl.constexpr):
    """(row block, column block) of a unit: down a band of GROUP row blocks, then to its next column."""
    band = unit // (GROUP * columns)
    inside = unit - band * (GROUP * columns)
    height = tl.minimum(rows - band * GROUP, GROUP)
    return band * GROUP + inside % height, inside // height


@triton.jit
def _scores(
    x,
    w,
    bias,
    row,
    live,
    first,
    width,
    vocabulary,
    stride_x,
    stride_w,
    inv_temperature,
    softcap,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    WIDEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """z [BM, BN] fp32 of BM scored rows from ``row`` and BN columns from ``first``; those past the vocabulary come out
    as -inf."""
    columns = first + tl.arange(0, BN)
    inside = columns < vocabulary
    depth = tl.arange(0, BK)
    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, width, BK):
        if TMA:
            a, b = x.load([row, k]), w.load([first, k]).T
        else:
            deep = depth < width - k
            x_at = x + (row + tl.arange(0, BM)).to(tl.int64)[:, None] * stride_x + depth[None, :]
            a = tl.load(x_at + k, mask=live[:, None] & deep[None, :], other=0.0)
            w_at = w + columns.to(tl.int64)[None, :] * stride_w + depth[:, None]
            b = tl.load(w_at + k, mask=inside[None, :] & deep[:, None], other=0.0)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias + columns, mask=inside, other=0.0)[None, :]
    if HAS_CAP:
        cap = tl.load(softcap)
        acc = cap * tanh(acc / cap)
    return tl.where(inside[None, :], acc * inv_temperature, float("-inf"))


@triton.jit(do_not_specialize=["read_outs", "capacity"])
def forward_kernel(
    hidden,
    x,
    w,
    bias,
    temperature,
    softcap,
    targets,
    order,
    count,
    partial,
    starts,
    ends,
    embeddings,
    inv_norm,
    read_outs,
    capacity,
    width,
    vocabulary,
    stride_hidden,
    stride_x,
    stride_w,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    NORMALIZE: tl.constexpr,
    WIDEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """Reduce a band of logits to partial statistics [4, splits, capacity]: top, sum, weighted sum (with ENTROPY), the
    target's logit (0 if elsewhere).

    embeddings [read_outs, H], inv_norm [read_outs]: see read_out.
    """
    for k in range(tl.program_id(0), read_outs, tl.num_programs(0)):
        read_out(k, hidden, starts, ends, embeddings, inv_norm, width, stride_hidden, NORMALIZE)
    rows_live = tl.load(count)
    inv_temperature = 1.0 / tl.load(temperature)
    row_blocks = tl.cdiv(rows_live, BM)
    splits = tl.cdiv(vocabulary, BN * SPLIT)
    plane = splits * capacity
    for unit in range(tl.program_id(0), row_blocks * splits, tl.num_programs(0)):
        block, split = _place(unit, row_blocks, splits, GROUP)
        rows = block * BM + tl.arange(0, BM)
        live = rows < rows_live
        at = tl.load(order + rows, mask=live, other=0)
        target = tl.load(targets + at, mask=live, other=-1)
        top = tl.full((BM,), float("-inf"), dtype=tl.float32)
        total = tl.zeros((BM,), dtype=tl.float32)
        weighted = tl.zeros((BM,), dtype=tl.float32)
        found = tl.zeros((BM,), dtype=tl.float32)
        for j in range(tl.minimum(SPLIT, tl.cdiv(vocabulary, BN) - split * SPLIT)):
            first = (split * SPLIT + j) * BN
            z = _scores(
                x,
                w,
                bias,
                block * BM,
                live,
                first,
                width,
                vocabulary,
                stride_x,
                stride_w,
                inv_temperature,
                softcap,
                BM,
                BN,
                BK,
                HAS_BIAS,
                HAS_CAP,
                WIDEN,
                TMA,
            )
            columns = first + tl.arange(0, BN)
            found += tl.sum(tl.where(columns[None, :] == target[:, None], z, 0.0), axis=1)
            new_top = tl.maximum(top, tl.max(z, axis=1))
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            old = tl.exp(top - base)
            z -= base[:, None]
            e = tl.exp(z)
            if ENTROPY:
                drop = tl.where(old == 0.0, 0.0, old * (weighted + (top - base) * total))
                weighted = drop + tl.sum(e * tl.maximum(z, -1e30), axis=1)  # 0 * -inf would be NaN
            total = old * total + tl.sum(e, axis=1)
            top = new_top
        out = partial + split * capacity + rows
        tl.store(out, top, mask=live)
        tl.store(out + plane, total, mask=live)
        if ENTROPY:
            tl.store(out + 2 * plane, weighted, mask=live)
        tl.store(out + 3 * plane, found, mask=live)


@triton.jit(do_not_specialize=["capacity", "length"])
def dlogits_kernel(
    x,
    w,
    bias,
    temperature,
    softcap,
    targets,
    order,
    count,
    lse,
    target_logit,
    entropy,
    grad_logp,
    grad_entropy,
    panel,
    products,
    first,
    columns_in_panel,
    capacity,
    length,
    width,
    vocabulary,
    stride_x,
    stride_w,
    stride_panel,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    PRODUCTS: tl.constexpr,
    WIDEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """Make the logits of a panel again and their gradient: panel[r, v - first] = dlogits of scored row r and column v;
    products [tile, capacity] = sum_v dz (z - z[target]).

    order None: what belongs to a row (targets, statistics, gradients) comes by scored row. count None: all of capacity
    are scored. Whole tiles are written: 0 for rows past M and columns past the vocabulary, which the products then may
    read.
    """
    rows_live = capacity
    if count is not None:
        rows_live = tl.load(count)
    inv_temperature = 1.0 / tl.load(temperature)
    row_blocks = tl.cdiv(rows_live, BM)
    tiles = tl.cdiv(columns_in_panel, BN)
    for unit in range(tl.program_id(0), row_blocks * tiles, tl.num_programs(0)):
        block, tile = _place(unit, row_blocks, tiles, GROUP)
        rows = block * BM + tl.arange(0, BM)
        live = rows < rows_live
        at = rows
        if order is not None:
            at = tl.load(order + rows, mask=live, other=0)
        local = tile * BN + tl.arange(0, BN)
        columns = first + local
        z = _scores(
            x,
            w,
            bias,
            block * BM,
            live,
            first + tile * BN,
            width,
            vocabulary,
            stride_x,
            stride_w,
            inv_temperature,
            softcap,
            BM,
            BN,
            BK,
            HAS_BIAS,
            HAS_CAP,
            WIDEN,
            TMA,
        )
        target = tl.load(targets + at, mask=live, other=-1)
        g = tl.load(grad_logp + at, mask=live, other=0.0)
        high, low = tl.load(lse + at, mask=live, other=0.0), tl.load(lse + length + at, mask=live, other=0.0)
        p = tl.exp((z - high[:, None]) - low[:, None])
        dz = tl.where(columns[None, :] == target[:, None], g[:, None], 0.0) - g[:, None] * p
        if ENTROPY:
            h = tl.load(grad_entropy + at, mask=live, other=0.0)
            mean = tl.load(entropy + at, mask=live, other=0.0)
            log_p = (z - high[:, None]) - low[:, None]
            dz -= tl.where(p == 0.0, 0.0, h[:, None] * p * (log_p + mean[:, None]))
        dz = tl.where(live[:, None] & (columns < vocabulary)[None, :], dz, 0.0)
        if PRODUCTS:
            # From z itself: its difference to the log-sum-exp has lost what sets a flat row's logits apart.
            centre = tl.load(target_logit + at, mask=live, other=0.0)
            share = tl.sum(tl.where(dz == 0.0, 0.0, dz * (z - centre[:, None])), axis=1)
            tl.store(products + tile * capacity + rows, share, mask=live)
        if HAS_CAP:
            t = z / (inv_temperature * tl.load(softcap))
            dz = tl.where(dz == 0.0, 0.0, dz * (1.0 - t * t))
        dz *= inv_temperature
        if TMA:
            panel.store([block * BM, tile * BN], dz.to(panel.dtype))
        else:
            out = panel + rows.to(tl.int64)[:, None] * stride_panel + local[None, :]
            keep = (rows < capacity)[:, None] & (local < stride_panel)[None, :]
            tl.store(out, dz.to(panel.dtype.element_ty), mask=keep)


@triton.jit
def dhead_kernel(
    panel,
    x,
    count,
    dhead,
    dbias,
    first,
    columns_in_panel,
    width,
    stride_panel,
    stride_x,
    stride_head,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    BIAS: tl.constexpr,
    WIDEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """Multiply a panel into the head's gradient: dW[first + v, h] = sum_r panel[r, v] x[r, h]; dbias[first + v]
    = sum_r panel[r, v]."""
    rows_live = tl.load(count)
    v_blocks = tl.cdiv(columns_in_panel, BM)
    h_blocks = tl.cdiv(width, BN)
    for unit in range(tl.program_id(0), v_blocks * h_blocks, tl.num_programs(0)):
        v_block, h_block = _place(unit, v_blocks, h_blocks, GROUP)
        local = v_block * BM + tl.arange(0, BM)
        h = h_block * BN + tl.arange(0, BN)
        v_in, h_in = local < columns_in_panel, h < width
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        column = tl.zeros((BM,), dtype=tl.float32)
        for r in range(0, rows_live, BK):
            if TMA:
                a, b = panel.load([r, v_block * BM]).T, x.load([r, h_block * BN])
            else:
                rows = r + tl.arange(0, BK)
                live = rows < rows_live
                a_at = panel + rows.to(tl.int64)[None, :] * stride_panel + local[:, None]
                b_at = x + rows.to(tl.int64)[:, None] * stride_x + h[None, :]
                a = tl.load(a_at, mask=v_in[:, None] & live[None, :], other=0.0)
                b = tl.load(b_at, mask=live[:, None] & h_in[None, :], other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            if BIAS:
                column += tl.sum(a.to(tl.float32), axis=1)
        v = first + local.to(tl.int64)
        out = dhead + v[:, None] * stride_head + h[None, :]
        tl.store(out, acc.to(dhead.dtype.element_ty), mask=v_in[:, None] & h_in[None, :])
        if BIAS:  # noqa: SIM102  (one is known when compiling, the other is not)
            if h_block == 0:
                tl.store(dbias + v, column, mask=v_in)


@triton.jit
def dhidden_kernel(
    panel,
    w,
    order,
    count,
    dhidden,
    low,
    first,
    columns_in_panel,
    width,
    stride_panel,
    stride_w,
    ADD: tl.constexpr,
    LOW: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUP: tl.constexpr,
    WIDEN: tl.constexpr,
    TMA: tl.constexpr,
):
    """Multiply a panel into the rows' gradient: dhidden[order[r], h] (+)= sum_v panel[r, v] W[first + v, h]; added to
    what is there with ADD.

    With LOW, for bf16: what rounding a sum cut off waits in low [C, H], so that a sum keeps 16 bits between panels.
    """
    rows_live = tl.load(count)
    row_blocks = tl.cdiv(rows_live, BM)
    h_blocks = tl.cdiv(width, BN)
    for unit in range(tl.program_id(0), row_blocks * h_blocks, tl.num_programs(0)):
        block, h_block = _place(unit, row_blocks, h_blocks, GROUP)
        rows = block * BM + tl.arange(0, BM)
        h = h_block * BN + tl.arange(0, BN)
        live, h_in = rows < rows_live, h < width
        keep = live[:, None] & h_in[None, :]
        at = tl.load(order + rows, mask=live, other=0)
        out = dhidden + at[:, None] * width + h[None, :]
        rest = low + rows.to(tl.int64)[:, None] * width + h[None, :]
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        if ADD:  # before the products: two accumulators at once would not fit the registers
            acc += tl.load(out, mask=keep, other=0.0).to(tl.float32)
            if LOW:
                acc += tl.load(rest, mask=keep, other=0.0).to(tl.float32)
        for v in range(0, columns_in_panel, BK):
            if TMA:
                a = panel.load([block * BM, v])
                b = w.load([first + v, h_block * BN])
            else:
                local = v + tl.arange(0, BK)
                v_in = local < columns_in_panel
                a_at = panel + rows.to(tl.int64)[:, None] * stride_panel + local[None, :]
                b_at = w + (first + local.to(tl.int64))[:, None] * stride_w + h[None, :]
                a = tl.load(a_at, mask=live[:, None] & v_in[None, :], other=0.0)
                b = tl.load(b_at, mask=v_in[:, None] & h_in[None, :], other=0.0)
            if WIDEN:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        high = acc.to(dhidden.dtype.element_ty)
        tl.store(out, high, mask=keep)
        if LOW:
            tl.store(rest, (acc - high.to(tl.float32)).to(low.dtype.element_ty), mask=keep)
