// What happens between levels and between tiles: codes, doubts, the error that the next scores may have.

// What scores of a level may be off by, and what to add to make distances of them that are not negative.
__device__ __forceinline__ void expect_error(Rows& rows, const Level& level) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        rows.error[r] = level.a * sqrtf(rows.square[r]) + level.b * rows.length[r] + level.c * rows.lost[r] +
                        level.floor + rows.square[r] * (1.0f / (1 << 21));
        rows.offset[r] = rows.square[r] * (1.0f + 1.0f / (1 << 20)) + rows.error[r];
    }
}

// Puts codes where units were.
__device__ __forceinline__ void name_codes(Least& least, int lane) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const int place = least.key[i] & LOW_BITS;
        least.unit[i] = least.unit[i] * UNIT + (place >> 1) * 8 + (lane & 3) * 2 + (place & 1);
    }
}

// The four threads of a row agree on its three least.
__device__ __forceinline__ void agree(Least& least, int codes, int lane) {
    int code[2] = {least.unit[0], least.unit[1]};
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
        int key[3], from[2];
#pragma unroll
        for (int i = 0; i < 3; i++) key[i] = __shfl_xor_sync(~0u, least.key[i], step);
#pragma unroll
        for (int i = 0; i < 2; i++) from[i] = __shfl_xor_sync(~0u, code[i], step);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool first = key[i] < least.key[0], second = key[i] < least.key[1];
            code[1] = first ? code[0] : second ? from[i] : code[1];
            code[0] = first ? from[i] : code[0];
            insert(key[i], least.key);
        }
        least.key[2] = min(least.key[2], key[2]);
    }
    // Equal keys are ordered differently by different threads: the first one's word counts.
#pragma unroll
    for (int i = 0; i < 2; i++) least.unit[i] = min(__shfl_sync(~0u, code[i], lane & ~3), codes - 1);
}

// A slot for a row with many near codes, two of each of its threads; -1 where a third may be near as well.
__device__ __forceinline__ int fill_slot(const Task& task, const Least& own, float edge, int codes, int lane) {
    bool near[3];
#pragma unroll
    for (int i = 0; i < 3; i++) near[i] = !(__int_as_float(own.key[i] & ~LOW_BITS) > edge);
    const u32 four = 15u << (lane & ~3), crowded = __ballot_sync(four, near[2]);
    int slot = -1;
    if ((lane & 3) == 0 && !crowded) slot = atomicAdd(task.counts + 1, 1);
    slot = __shfl_sync(four, slot, lane & ~3);
    if (slot >= task.slots_most) slot = -1;
    if (slot >= 0) {
        const u32 one = near[0] && own.unit[0] < codes ? own.unit[0] : NONE;
        const u32 two = near[1] && own.unit[1] < codes ? own.unit[1] : NONE;
        ((u32*)task.slots)[slot * 4 + (lane & 3)] = one | two << 16;
    }
    return slot;
}

// Appends the rows in doubt, in no order.
__device__ __forceinline__ void list_doubts(const Rows& rows, const Task& task, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        const bool open = (lane & 3) == 0 && rows.row[r] < task.n && rows.doubt[r];
        const u32 all = __ballot_sync(~0u, open);
        int start = 0;
        if (lane == 0 && all) start = atomicAdd(task.counts, __popc(all));
        start = __shfl_sync(~0u, start, 0);
        if (open) task.list[start + __popc(all & ((1u << lane) - 1))] = rows.row[r];
    }
}

// A level's codes, runners and doubts; then the state of the next level.
__device__ __forceinline__ void finish_level(Rows& rows, Least (&least)[2], const Task& task, int level,
                                             int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        name_codes(least[r], lane);
        const Least own = least[r];
        const int bit = task.first + level, codes = task.level[level].codes;
        agree(least[r], codes, lane);
        const float first = __int_as_float(least[r].key[0] & ~LOW_BITS);
        const float limit = 2.0f * rows.error[r] + first * CUT;
        // Written so that NaN is a doubt.
        if (!(__int_as_float(least[r].key[1] & ~LOW_BITS) - first > limit)) rows.doubt[r] |= 1 << bit;
        if (!(__int_as_float(least[r].key[2] & ~LOW_BITS) - first > limit)) {
            rows.doubt[r] |= 1 << (bit + 16);
            least[r].unit[1] = rows.row[r] < task.n ? fill_slot(task, own, first + limit, codes, lane) : -1;
        }
        rows.square[r] = first * (1.0f + CUT);
        if ((lane & 3) == r && rows.row[r] < task.n) {
            task.found[(u64)rows.row[r] * task.stride + bit] = least[r].unit[0];
            task.runner[(u64)rows.row[r] * task.stride + bit] = least[r].unit[1];
            if (level == LEVELS - 1) task.doubt[rows.row[r]] = rows.doubt[r];
        }
#pragma unroll
        for (int e = 0; e < EARLIER; e++) {  // table (level + 1, e) lies `level` tables after (level, e)
            if (e < level) rows.bias[e][r] += level * TABLE4;
            if (e == level)
                rows.bias[e][r] = ROW4 + level * (level + 3) / 2 * TABLE4 + least[r].unit[0] * ROW4;
        }
        least[r] = Least{{LARGEST, LARGEST, LARGEST}, {0, 0}};
    }
    if (level == LEVELS - 1) {
        if (task.last) list_doubts(rows, task, lane);
    } else {
        expect_error(rows, task.level[level + 1]);
    }
}

// The norm of two rows of a thread, by the four threads that share them.
__device__ __forceinline__ void begin_tile(Rows& rows, const Task& task, u32 x, int tile, int local, int lane) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float square = 0.0f;
#pragma unroll 2
        for (int i = 0; i < 2 * CHUNKS; i++) {
            const int piece = (lane & 3) + 4 * ((lane >> 2 ^ i) & 1);
            const u32 at = x + (i >> 1) * X_BYTES + (local + 8 * r) * 128 + ((piece ^ (lane >> 2)) << 4);
            u32 halves[4];
            asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                         : "=r"(halves[0]), "=r"(halves[1]), "=r"(halves[2]), "=r"(halves[3])
                         : "r"(at));
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float low, high;
                widen(halves[j], low, high);
                square += low * low + high * high;
            }
        }
        square += __shfl_xor_sync(~0u, square, 1);
        square += __shfl_xor_sync(~0u, square, 2);
        rows.row[r] = tile * ROWS + local + 8 * r;
        const bool live = rows.row[r] < task.n;
        rows.lost[r] = live && task.lost ? task.lost[rows.row[r]] : 0.0f;
        rows.doubt[r] = live && task.first ? task.doubt[rows.row[r]] : 0;
        rows.length[r] = sqrtf(square) * 1.001f + rows.lost[r];
        rows.square[r] = rows.length[r] * rows.length[r];
#pragma unroll
        for (int e = 0; e < EARLIER; e++) rows.bias[e][r] = 0;
    }
    expect_error(rows, task.level[0]);
}
