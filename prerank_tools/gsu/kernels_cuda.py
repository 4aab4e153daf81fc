"""Triton kernels of the GPU search: scores never leave the chip, only thresholds, bits and winners do.

1. `mark`: the products of a block of candidates with the history, twice. First the maxima of interleaved
   groups of behaviours give a threshold that at least K behaviours reach; then one bit says who does.
2. `list_marked`: bits to positions.
3. `rank`: cosines of the listed, their order, their tiers; in float32 with a proven error, and in fixed-order
   float64 for the rows where that error could change an order or a tier.
"""
# M candidates, N behaviours of all groups, D dims, P listed, K kept; BM x BN is the tile of a product

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def prepare(raw_ptr, unit_ptr, square_ptr, rows, D: tl.constexpr, R: tl.constexpr):  # type: ignore[no-untyped-def]
    """Unit rows in float16 and squared lengths in fixed-order float64 of stored rows."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    real = row < rows
    square = _lane_dots(raw_ptr, row, real, raw_ptr, row, real, D, R, tl.float64)
    tl.store(square_ptr + row, square, mask=real)
    length = tl.sqrt(square.to(tl.float32))
    # Lengths that float32 cannot invert leave a zero row; the host gives its group no trust in products.
    scale = tl.where((length > 1e-18) & (length < 1e18), 1.0 / length, 0.0)
    at = row[:, None].to(tl.int64) * D + tl.arange(0, D)[None, :]
    x = tl.load(raw_ptr + at, mask=real[:, None], other=0.0).to(tl.float32)
    tl.store(unit_ptr + at, (x * scale[:, None]).to(tl.float16), mask=real[:, None])


@triton.jit
def mark(  # type: ignore[no-untyped-def]
    candidate_ptr,
    history_ptr,
    offset_ptr,
    visible_ptr,
    slack_ptr,
    tile_group_ptr,
    tile_first_ptr,
    tile_last_ptr,
    word_ptr,
    word_stride,
    K: tl.constexpr,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Bit `t % 32` of word (t // 32, g) of a candidate: behaviour t * BN + g can be among its K best."""
    tile = tl.program_id(0)
    row = tl.load(tile_first_ptr + tile) + tl.arange(0, BM)
    real = row < tl.load(tile_last_ptr + tile)
    base = tl.load(offset_ptr + tl.load(tile_group_ptr + tile))
    visible = tl.load(visible_ptr + row, mask=real, other=0)
    longest = tl.max(visible, axis=0)
    shortest = tl.min(tl.where(real, visible, longest), axis=0)
    tiles, whole = tl.cdiv(longest, BN), shortest // BN // SPLIT * SPLIT
    d = tl.arange(0, D)
    candidate = tl.load(
        candidate_ptr + row.to(tl.int64)[:, None] * D + d[None, :], mask=real[:, None], other=0.0
    )
    column = tl.arange(0, BN)
    history = history_ptr + (base + column).to(tl.int64)[None, :] * D + d[:, None]

    high_0 = tl.full([BM, BN], -4.0, tl.float32)
    high_1, high_2, high_3 = high_0, high_0, high_0
    for t in tl.range(0, whole, SPLIT, num_stages=STAGES):
        high_0 = tl.maximum(high_0, tl.dot(candidate, tl.load(history + t * BN * D)))
        if SPLIT >= 2:
            high_1 = tl.maximum(high_1, tl.dot(candidate, tl.load(history + (t + 1) * BN * D)))
        if SPLIT == 4:
            high_2 = tl.maximum(high_2, tl.dot(candidate, tl.load(history + (t + 2) * BN * D)))
            high_3 = tl.maximum(high_3, tl.dot(candidate, tl.load(history + (t + 3) * BN * D)))
    for t in range(whole, tiles):
        score = _masked(candidate, history, t, column, visible, longest, BN, D)
        high_0 = tl.maximum(high_0, tl.where(t % SPLIT == 0, score, -4.0))
        if SPLIT >= 2:
            high_1 = tl.maximum(high_1, tl.where(t % SPLIT == 1, score, -4.0))
        if SPLIT == 4:
            high_2 = tl.maximum(high_2, tl.where(t % SPLIT == 2, score, -4.0))
            high_3 = tl.maximum(high_3, tl.where(t % SPLIT == 3, score, -4.0))

    low, high = tl.full([BM], -1.01, tl.float32), tl.full([BM], 1.01, tl.float32)
    for _ in range(14):
        middle = 0.5 * (low + high)
        reached = tl.sum((high_0 >= middle[:, None]).to(tl.int32), axis=1)
        if SPLIT >= 2:
            reached += tl.sum((high_1 >= middle[:, None]).to(tl.int32), axis=1)
        if SPLIT == 4:
            reached += tl.sum((high_2 >= middle[:, None]).to(tl.int32), axis=1)
            reached += tl.sum((high_3 >= middle[:, None]).to(tl.int32), axis=1)
        low, high = tl.where(reached >= K, middle, low), tl.where(reached >= K, high, middle)
    slack = tl.load(slack_ptr + row, mask=real, other=0.0)
    # Not clear of zero, where missing vectors and exact zeros lie: everything is listed, and settled exactly.
    low = tl.where(low > 3.0 * slack, low - 2.0 * slack, -3.0)

    for block in range(0, tl.cdiv(tiles, 32)):
        word = tl.zeros([BM, BN], tl.int32)
        first = block * 32
        for j in tl.range(0, tl.minimum(32, tl.maximum(whole - first, 0)), num_stages=STAGES):
            score = tl.dot(candidate, tl.load(history + (first + j) * BN * D))
            word |= (score >= low[:, None]).to(tl.int32) << j
        for j in range(tl.minimum(32, tl.maximum(whole - first, 0)), tl.minimum(32, tiles - first)):
            score = _masked(candidate, history, first + j, column, visible, longest, BN, D)
            word |= (score >= low[:, None]).to(tl.int32) << j
        place = row.to(tl.int64)[:, None] * word_stride + block * BN + column[None, :]
        tl.store(word_ptr + place, word, mask=real[:, None])


@triton.jit
def list_marked(  # type: ignore[no-untyped-def]
    word_ptr,
    word_stride,
    visible_ptr,
    rows,
    place_ptr,
    count_ptr,
    P: tl.constexpr,
    BN: tl.constexpr,
    R: tl.constexpr,
):
    """Positions of the marked behaviours of each candidate (any order), the first P of them, and how many."""
    row = tl.program_id(0) * R + tl.arange(0, R)
    real = row < rows
    visible = tl.load(visible_ptr + row, mask=real, other=0)
    blocks = tl.cdiv(tl.cdiv(visible, BN), 32)
    column = tl.arange(0, BN)
    count = tl.zeros([R], tl.int32)
    for block in range(0, tl.max(blocks, axis=0)):
        place = row.to(tl.int64)[:, None] * word_stride + block * BN + column[None, :]
        word = tl.load(word_ptr + place, mask=(block < blocks)[:, None], other=0).to(tl.uint32, bitcast=True)
        bits = _set_bits(word)
        slot = count[:, None] + tl.cumsum(bits, axis=1) - bits
        count += tl.sum(bits, axis=1)
        for _ in range(0, tl.max(tl.max(bits, axis=1), axis=0)):
            below = _set_bits((word ^ (word & (word - 1))) - 1)
            at = (block * 32 + below) * BN + column[None, :]
            tl.store(place_ptr + row[:, None] * P + slot, at, mask=(word != 0) & (slot < P))
            word = word & (word - 1)
            slot += 1
    tl.store(count_ptr + row, count, mask=real)


@triton.jit
def rank(  # type: ignore[no-untyped-def]
    candidate_ptr,
    history_ptr,
    inverse_c_ptr,
    inverse_n_ptr,
    with_vector_ptr,
    group_ptr,
    offset_ptr,
    visible_ptr,
    place_ptr,
    count_ptr,
    flag_ptr,
    position_ptr,
    sim_ptr,
    n_valid_ptr,
    tier_ptr,
    error,
    K: tl.constexpr,
    KP: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    P: tl.constexpr,
    PART: tl.constexpr,
    LISTS: tl.constexpr,
    TIERS: tl.constexpr,
):
    """Order one candidate's listed behaviours by float32 cosines, each within `error` of the true one.

    Flags: 0 settled; 1 and 2 need the exact pass, over P or STRIDE listed; 3 listed more than fit. A row is
    settled where no two cosines are too near to tell who comes first (lists) or who is among the K
    (histograms), and none is too near the edge of a tier.
    """
    row = tl.program_id(0)
    count = tl.load(count_ptr + row)
    base = tl.load(offset_ptr + tl.load(group_ptr + row))
    slot = tl.arange(0, P)
    listed = slot < count
    at = tl.load(place_ptr + row * STRIDE + slot, mask=listed, other=0)
    # In parts, so that a row's products stay in few registers and more rows are in flight.
    dot = tl.zeros([P], tl.float32)
    for part in tl.static_range(D // PART):
        d = part * PART + tl.arange(0, PART)
        place = (base + at).to(tl.int64)[:, None] * D + d[None, :]
        x = tl.load(history_ptr + place, mask=listed[:, None], other=0).to(tl.float32)
        y = tl.load(candidate_ptr + row.to(tl.int64) * D + d).to(tl.float32)
        dot += tl.sum(tl.sum(tl.reshape(x * y[None, :], (P, PART // 8, 8)), axis=2), axis=1)
    inverse_c = tl.load(inverse_c_ptr + row).to(tl.float32)
    inverse_n = tl.load(inverse_n_ptr + base + at, mask=listed, other=0.0).to(tl.float32)
    sim = dot * inverse_c * inverse_n
    usable = listed & (inverse_n > 0)
    # A length that float32 cannot hold makes its cosine anything, NaN included; an exact zero must be known.
    strange = usable & ~((tl.abs(sim) > error) & (tl.abs(sim) < 1.5))
    strange = strange | (usable & ((inverse_n > 1e15) | (inverse_n < 1e-15)))
    odd = (inverse_c > 1e15) | (inverse_c < 1e-15)
    sim = tl.where(usable, sim, -4.0)
    before = tl.sum((sim[None, :] > (sim + 2.0 * error)[:, None]).to(tl.int32), axis=1)
    upto = tl.sum((sim[None, :] >= (sim - 2.0 * error)[:, None]).to(tl.int32), axis=1) - 1
    best = usable & (before < K)
    if LISTS:
        doubt = best & (upto > before)
    else:
        doubt = best & (upto >= K)
    tenths = sim * 10.0
    doubt = doubt | (best & (tl.abs(tenths - tl.floor(tenths + 0.5)) <= 10.0 * error + 2e-6)) | strange
    flag = tl.max(doubt.to(tl.int32), axis=0)
    flag = tl.where(odd & (count > 0), 1, flag)
    flag = tl.where(count > P, 2, flag)
    tl.store(flag_ptr + row, tl.where(count > STRIDE, 3, flag))
    _write(
        row,
        at,
        sim,
        best,
        before,
        base,
        with_vector_ptr,
        visible_ptr,
        position_ptr,
        sim_ptr,
        n_valid_ptr,
        tier_ptr,
        K,
        KP,
        LISTS,
        TIERS,
    )


@triton.jit
def rank_exactly(  # type: ignore[no-untyped-def]
    candidate_ptr,
    history_ptr,
    inverse_c_ptr,
    inverse_n_ptr,
    with_vector_ptr,
    group_ptr,
    offset_ptr,
    visible_ptr,
    place_ptr,
    count_ptr,
    flag_ptr,
    position_ptr,
    sim_ptr,
    n_valid_ptr,
    tier_ptr,
    rows,
    K: tl.constexpr,
    KP: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    P: tl.constexpr,
    FLAG: tl.constexpr,
    LISTS: tl.constexpr,
    TIERS: tl.constexpr,
):
    """The same in fixed-order float64, ties to the later behaviour, for the rows that carry this flag.

    Few do, so that a program looks through many rows.
    """
    for row in range(tl.program_id(0), rows, tl.num_programs(0)):
        if tl.load(flag_ptr + row) == FLAG:
            count = tl.load(count_ptr + row)
            base = tl.load(offset_ptr + tl.load(group_ptr + row))
            slot = tl.arange(0, P)
            listed = slot < count
            at = tl.load(place_ptr + row * STRIDE + slot, mask=listed, other=0)
            one = tl.zeros([1], tl.int32) + row
            dot = _lane_dots(history_ptr, base + at, listed, candidate_ptr, one, one >= 0, D, P, tl.float64)
            inverse_n = tl.load(inverse_n_ptr + base + at, mask=listed, other=0.0)
            sim = dot * tl.load(inverse_c_ptr + one) * inverse_n
            usable = listed & (inverse_n > 0) & (sim != 0)
            sim = tl.where(usable, sim, -4.0)
            later = (sim[None, :] == sim[:, None]) & (at[None, :] > at[:, None])
            above = ((sim[None, :] > sim[:, None]) | later) & usable[None, :]
            before = tl.sum(above.to(tl.int32), axis=1)
            best = usable & (before < K)
            _write(
                row,
                at,
                sim.to(tl.float32),
                best,
                before,
                base,
                with_vector_ptr,
                visible_ptr,
                position_ptr,
                sim_ptr,
                n_valid_ptr,
                tier_ptr,
                K,
                KP,
                LISTS,
                TIERS,
            )


@triton.jit
def _write(  # type: ignore[no-untyped-def]
    row,
    at,
    sim,
    best,
    place,
    base,
    with_vector_ptr,
    visible_ptr,
    position_ptr,
    sim_ptr,
    n_valid_ptr,
    tier_ptr,
    K: tl.constexpr,
    KP: tl.constexpr,
    LISTS: tl.constexpr,
    TIERS: tl.constexpr,
):
    kept = tl.sum(best.to(tl.int32), axis=0)
    visible = tl.load(visible_ptr + row)
    with_vector = tl.load(with_vector_ptr + base + visible - 1, mask=visible > 0, other=0)
    tl.store(n_valid_ptr + row, tl.where(kept < K, kept, with_vector))
    if LISTS:
        pad = tl.arange(0, KP)
        empty = (pad >= kept) & (pad < K)
        tl.store(position_ptr + row * K + pad, tl.full([KP], -1, tl.int32), mask=empty)
        tl.store(sim_ptr + row * K + pad, tl.full([KP], -1.1, tl.float32), mask=empty)
        tl.store(position_ptr + row * K + place, at, mask=best)
        tl.store(sim_ptr + row * K + place, sim, mask=best)
    if TIERS:
        tier = tl.ceil(sim * 10.0).to(tl.int32) + 10
        bins = tl.arange(0, 32)
        counted = ((tier[:, None] == bins[None, :]) & best[:, None]).to(tl.int32)
        tl.store(tier_ptr + row * 22 + bins, tl.sum(counted, axis=0).to(tl.uint8), mask=bins < 22)


@triton.jit
def latest(  # type: ignore[no-untyped-def]
    candidate_ptr,
    history_ptr,
    inverse_c_ptr,
    inverse_n_ptr,
    group_ptr,
    offset_ptr,
    visible_ptr,
    sim_ptr,
    S: tl.constexpr,
    D: tl.constexpr,
    P: tl.constexpr,
):
    """Exact cosines of one candidate with the S latest behaviours it sees, newest first, -1.1 for none."""
    row = tl.program_id(0)
    base = tl.load(offset_ptr + tl.load(group_ptr + row))
    slot = tl.arange(0, P)
    at = base + tl.load(visible_ptr + row) - 1 - slot
    seen = (at >= base) & (slot < S)
    one = tl.zeros([1], tl.int32) + row
    dot = _lane_dots(history_ptr, at, seen, candidate_ptr, one, one >= 0, D, P, tl.float64)
    sim = dot * tl.load(inverse_c_ptr + one) * tl.load(inverse_n_ptr + at, mask=seen, other=0.0)
    known = (sim < 2.0) & (sim != 0)
    tl.store(sim_ptr + row * S + slot, tl.where(known, sim.to(tl.float32), -1.1), mask=slot < S)


@triton.jit
def _masked(candidate, history, t, column, visible, longest, BN: tl.constexpr, D: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores of tile `t`, -4 where a candidate does not see the behaviour."""
    at = t * BN + column
    score = tl.dot(candidate, tl.load(history + t * BN * D, mask=(at < longest)[None, :], other=0.0))
    return tl.where(at[None, :] < visible[:, None], score, -4.0)


@triton.jit
def _lane_dots(  # type: ignore[no-untyped-def]
    x_ptr, x_row, x_real, y_ptr, y_row, y_real, D: tl.constexpr, P: tl.constexpr, number: tl.constexpr
):
    """`cosine.lane_dots`: lane d % 16 adds up dimension d, then lanes are added by halves."""
    lane = tl.arange(0, 16)
    total = tl.zeros([P, 16], number)
    for step in tl.static_range(D // 16):
        x = tl.load(
            x_ptr + x_row.to(tl.int64)[:, None] * D + step * 16 + lane[None, :], mask=x_real[:, None], other=0
        )
        y = tl.load(
            y_ptr + y_row.to(tl.int64)[:, None] * D + step * 16 + lane[None, :], mask=y_real[:, None], other=0
        )
        total += x.to(number) * y.to(number)
    left, right = tl.split(tl.permute(tl.reshape(total, (P, 2, 8)), (0, 2, 1)))
    left, right = tl.split(tl.permute(tl.reshape(left + right, (P, 2, 4)), (0, 2, 1)))
    left, right = tl.split(tl.permute(tl.reshape(left + right, (P, 2, 2)), (0, 2, 1)))
    left, right = tl.split(left + right)
    return left + right


@triton.jit
def _set_bits(word):  # type: ignore[no-untyped-def]
    """How many bits of a 32-bit word are set."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)
