// All levels of a residual assignment in one pass: vectors are read once, scores never leave the chip.
//
// A block keeps 128 vectors in shared memory and streams the codes of every level past them. Level l scores
// code c of a vector x with codes c_0 .. c_{l-1} before it as |c|^2 - 2 x.c + sum_j 2 c_j.c, the last two from
// tables, so products need no residual and run on while the scores of the unit before are searched.
// One thread loads; two warpgroups of 64 vectors each multiply and search. See task.cuh for the sizes.

// The vectors of every tile of this block, and all codes for each, into the stages that come free.
__device__ __forceinline__ void load_all(const TensorMap& map, const Task& task, const Shared& at, int tiles) {
    int stage = 0, turn = 1, x_turn = 1;
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, x_turn ^= 1) {
        const unsigned char* from = task.codes;
        for (int unit = 0; unit < LEVELS * UNITS; unit++) {
            for (int chunk = 0; chunk < CHUNKS; chunk++, from += C_BYTES) {
                if (unit == 0) {
                    barrier_wait(at.x_free + 8 * chunk, x_turn);
                    barrier_expect(at.x_full + 8 * chunk, X_BYTES);
                    load_box(at.x + chunk * X_BYTES, &map, chunk * DEPTH, tile * ROWS, at.x_full + 8 * chunk);
                }
                barrier_wait(at.c_free + 8 * stage, turn);
                barrier_expect(at.c_full + 8 * stage, C_BYTES);
                load_bytes(at.c + stage * C_BYTES, from, C_BYTES, at.c_full + 8 * stage);
                if (++stage == STAGES) stage = 0, turn ^= 1;
            }
        }
    }
}

// Where a warpgroup stands: the stage it multiplies next, and the unit whose scores it searches next.
struct State {
    int stage, turn, x_turn, level, unit;
    Rows rows;
    Least least[2];
};

// Hands back the stage before the one at hand, and in a tile's last unit the chunk of vectors.
__device__ __forceinline__ void release(const Shared& at, const State& s, int chunk, bool last_unit, int lane) {
    if (lane != 0) return;
    barrier_arrive(at.c_free + 8 * (s.stage == 0 ? STAGES - 1 : s.stage - 1));
    if (last_unit) barrier_arrive(at.x_free + 8 * chunk);
}

// Multiplies one unit into `sum` while the scores of the unit before, in `before`, are searched.
template <bool MULTIPLY>
__device__ __forceinline__ void step(float (&sum)[64], float (&before)[64], State& s, const Task& task,
                                     const Shared& at, bool first_unit, bool last_unit, u32 x, int lane) {
    int found[2][3] = {{LARGEST, LARGEST, LARGEST}, {LARGEST, LARGEST, LARGEST}};
    float4 bias[2][EARLIER][2];  // of this piece and the next
    const float4* from[EARLIER][2];
#pragma unroll
    for (int e = 0; e < EARLIER; e++)
#pragma unroll
        for (int r = 0; r < 2; r++)
            from[e][r] = task.bias + s.rows.bias[e][r] + s.unit * (UNIT / 4) + (lane & 3);
    int mask = ~LOW_BITS;
    asm volatile("" : "+r"(mask));  // one register, so that a key is one instruction
    asm volatile("" : "+r"(x));  // else the addresses of all its chunks are kept in registers
    load_bias(bias[0], from, s.level, 0);
    load_bias(bias[1], from, s.level, 1);
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        if (MULTIPLY) {
            if (first_unit) barrier_wait(at.x_full + 8 * chunk, s.x_turn);
            barrier_wait(at.c_full + 8 * s.stage, s.turn);
            product_begin();
#pragma unroll
            for (int k = 0; k < DEPTH / 16; k++)
                product(sum, operand(x + chunk * X_BYTES + 32 * k), operand(at.c + s.stage * C_BYTES + 32 * k),
                        chunk + k > 0);
            product_commit();
            if (chunk == 0) product_wait<1>();  // shows the compiler that the unit before is complete
        }
#pragma unroll
        for (int piece = chunk * PIECES / CHUNKS; piece < (chunk + 1) * PIECES / CHUNKS; piece++) {
            search_piece(before, bias[piece & 1], s.rows, s.level, found, piece, mask, at.spare);
            if (piece + 2 < PIECES) load_bias(bias[piece & 1], from, s.level, piece + 2);
        }
        if (MULTIPLY) {
            product_wait<1>();
            if (chunk > 0) release(at, s, chunk - 1, last_unit, lane);
            if (++s.stage == STAGES) s.stage = 0, s.turn ^= 1;
        }
    }
#pragma unroll
    for (int r = 0; r < 2; r++) merge(s.least[r], found[r], s.unit);
    if (MULTIPLY) {
        product_wait<0>();
        hold(sum);
        release(at, s, CHUNKS - 1, last_unit, lane);
    }
}

// Products of a unit beside the search of the one before, across levels and tiles.
__device__ __forceinline__ void search_all(const Task& task, const Shared& at, int tiles) {
    const int lane = threadIdx.x & 31, local = (threadIdx.x / 32 - 4) * 16 + lane / 4;
    const u32 x = at.x + (__shfl_sync(~0u, threadIdx.x / 128, 0) - 1) * 64 * 128;
    float even[64], odd[64];
#pragma unroll
    for (int i = 0; i < 64; i++) odd[i] = 0.0f;
    State s = {0, 0, 0, LEVELS - 1, UNITS - 1, {}, {}};
    s.rows.row[0] = s.rows.row[1] = task.n;  // of no tile yet
    for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, s.x_turn ^= 1) {
        for (int unit = 0; unit < LEVELS * UNITS; unit += 2) {
            step<true>(even, odd, s, task, at, unit == 0, false, x, lane);
            if (++s.unit == UNITS) {
                finish_level(s.rows, s.least, task, s.level, lane);
                s.unit = 0, s.level++;
            }
            if (unit == 0) {
                begin_tile(s.rows, task, at.x, tile, local, lane);
                s.level = 0;
            }
            step<true>(odd, even, s, task, at, false, unit == LEVELS * UNITS - 2, x, lane);
            s.unit++;
        }
    }
    if (blockIdx.x >= tiles) return;
    step<false>(even, odd, s, task, at, false, false, x, lane);
    finish_level(s.rows, s.least, task, s.level, lane);
}

extern "C" __global__ void __launch_bounds__(384, 1)
    nearest(const __grid_constant__ TensorMap x_map, const __grid_constant__ Task task) {
    extern __shared__ unsigned char memory[];
    const u32 x = (shared_address(memory) + 1023) & ~1023u;
    const u32 c = x + CHUNKS * X_BYTES, end = c + STAGES * C_BYTES;
    const Shared at = {x, c, end, end + 8 * CHUNKS, end + 16 * CHUNKS, end + 16 * CHUNKS + 8 * STAGES,
                       end + 16 * (CHUNKS + STAGES)};
    if (threadIdx.x == 0) {
        for (int i = 0; i < CHUNKS; i++) barrier_init(at.x_full + 8 * i, 1), barrier_init(at.x_free + 8 * i, 8);
        for (int i = 0; i < STAGES; i++) barrier_init(at.c_full + 8 * i, 1), barrier_init(at.c_free + 8 * i, 8);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    const int tiles = (task.n + ROWS - 1) / ROWS;
    if (threadIdx.x < 128) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
        if (threadIdx.x == 0) load_all(x_map, task, at, tiles);
    } else {
        asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
        search_all(task, at, tiles);
    }
}
