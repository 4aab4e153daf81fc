// Rows in doubt, a warp each, level by level: codes told apart by the sign of |r - a|^2 - |r - b|^2 in float64.
//
// Compiled with DIMS (of the vectors, a multiple of 8), LEVELS (in all), X_HALF (1: float16 vectors, 0: float32),
// SEARCH_ALL (1: where all codes are open, all are looked at; 0: such rows stay open).

constexpr u32 NONE = 0xFFFF;               // no code
constexpr int GROUPS = (DIMS + 127) / 128;  // of four dims a lane

struct Level {
    float error, floor;  // a score by float16 codes errs by at most error |r| + floor
    int codes;           // without padding
};

struct Doubts {
    const void* x;       // (n, DIMS) as given
    const float* plain;  // (LEVELS, codes, DIMS) as given
    const int* list;     // rows in doubt
    const int* listed;   // how many
    int* found;          // (n, LEVELS) codes
    int* runner;         // (n, LEVELS) second nearest, a slot, or -1: see task.cuh
    const unsigned short* slots;
    const unsigned short* half;  // (LEVELS, codes, DIMS) float16 of -2 scale c
    const float* norm;           // (LEVELS, codes) |scale c|^2
    int* doubt;                  // (n) see task.cuh; of rows that stay open, what is left to do
    int* open;                   // rows that stay open
    int* opened;                 // how many
    int codes;                   // of a level with padding
    float scale;
    double close;  // the share of the distances that float64 sums in another order could turn
    Level level[LEVELS];
};

__device__ __forceinline__ void widen(double (&to)[4], const float4& from) {
    to[0] = from.x, to[1] = from.y, to[2] = from.z, to[3] = from.w;
}

__device__ __forceinline__ float4 load_half(const unsigned short* from) {
    const uint2 halves = __ldg((const uint2*)from);
    float4 to;
    widen(halves.x, to.x, to.y);
    widen(halves.y, to.z, to.w);
    return to;
}

__device__ __forceinline__ float4 load_x(const Doubts& task, int row, int dim) {
#if X_HALF
    return load_half((const unsigned short*)task.x + (u64)row * DIMS + dim);
#else
    return __ldg((const float4*)((const float*)task.x + (u64)row * DIMS + dim));
#endif
}

__device__ __forceinline__ float4 load_code(const Doubts& task, int level, int code, int dim) {
    return __ldg((const float4*)(task.plain + ((u64)level * task.codes + code) * DIMS + dim));
}

template <class Number>
__device__ __forceinline__ Number all_lanes(Number value) {
#pragma unroll
    for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

template <class Do>
__device__ __forceinline__ void each_group(int lane, Do work) {
#pragma unroll
    for (int g = 0; g < GROUPS; g++) {
        const int dim = g * 128 + lane * 4;
        if (DIMS % 128 == 0 || dim < DIMS) work(g, dim);
    }
}

// A row at a level: what is left of it, its code so far, whether another is as near as float64 can tell.
struct Row {
    double r[GROUPS][4];
    int level, code;
    bool tied;
};

// Takes `other` where it is nearer, by all lanes of a warp.
__device__ __forceinline__ void meet(const Doubts& task, Row& row, int other, int lane) {
    double lead = 0.0, scale = 0.0;
    each_group(lane, [&](int g, int dim) {
        double a[4], b[4];
        widen(a, load_code(task, row.level, row.code, dim));
        widen(b, load_code(task, row.level, other, dim));
#pragma unroll
        for (int i = 0; i < 4; i++) {
            lead += (a[i] + b[i] - 2.0 * row.r[g][i]) * (a[i] - b[i]);
            scale += row.r[g][i] * row.r[g][i] + a[i] * a[i] + b[i] * b[i];
        }
    });
    lead = all_lanes(lead), scale = all_lanes(scale);
    row.tied |= !(fabs(lead) > task.close * scale);
    if (lead > 0.0) row.code = other;
}

// Takes the nearest of the code and those in a slot.
__device__ __forceinline__ void meet_slot(const Doubts& task, Row& row, int slot, int lane) {
    const u32 mine = lane < 8 ? task.slots[slot * 8 + lane] : NONE;
    for (u32 left = __ballot_sync(~0u, mine != NONE); left; left &= left - 1) {
        const int other = __shfl_sync(~0u, mine, __ffs(left) - 1);
        if (other != row.code) meet(task, row, other, lane);
    }
}

// Every code by float16 codes and float32 sums first, those within their error in float64.
__device__ __forceinline__ void meet_all(const Doubts& task, Row& row, int lane) {
    const Level& level = task.level[row.level];
    const u64 start = (u64)row.level * task.codes;
    float r[GROUPS][4], square = 0.0f;
    each_group(lane, [&](int g, int) {
#pragma unroll
        for (int i = 0; i < 4; i++) r[g][i] = (float)row.r[g][i] * task.scale, square += r[g][i] * r[g][i];
    });
    const float reach = 2.0f * (level.error * sqrtf(all_lanes(square)) * 1.001f + level.floor);
    float least = 1e30f;
    for (int code = 0; code < level.codes; code += 4) {
        float score[4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int at = min(code + k, level.codes - 1);
            score[k] = 0.0f;
            each_group(lane, [&](int g, int dim) {
                const float4 c = load_half(task.half + (start + at) * DIMS + dim);
                score[k] += r[g][0] * c.x + r[g][1] * c.y + r[g][2] * c.z + r[g][3] * c.w;
            });
        }
#pragma unroll
        for (int k = 0; k < 4; k++) {
            const int at = min(code + k, level.codes - 1);
            score[k] = all_lanes(score[k]) + task.norm[start + at];
            if (!(score[k] > least + reach) && at != row.code) meet(task, row, at, lane);
            least = fminf(least, score[k]);
        }
    }
}

// Settles one level; false where it stays open.
__device__ __forceinline__ bool settle_level(const Doubts& task, Row& row, bool many, int runner, int lane) {
    if (!many)
        meet(task, row, runner, lane);
    else if (runner >= 0)
        meet_slot(task, row, runner, lane);
    else if (SEARCH_ALL)
        meet_all(task, row, lane);
    else
        return false;
    return !row.tied;
}

// Every level from `level` on is open to all codes; returns the doubts.
__device__ __forceinline__ int open_rest(const Doubts& task, u64 first_cell, int level, int lane) {
    if (lane >= level && lane < LEVELS) task.runner[first_cell + lane] = -1;
    __syncwarp();
    return ((1 << LEVELS) - (1 << level)) * 0x10001;
}

// Settles what is in doubt, or leaves the row open from some level on.
__device__ __forceinline__ void settle_row(const Doubts& task, int at, int lane) {
    const u64 cell = (u64)at * LEVELS;
    int doubt = task.doubt[at];
    Row row;
    each_group(lane, [&](int g, int dim) { widen(row.r[g], load_x(task, at, dim)); });
    row.tied = false;
    for (row.level = 0; row.level < LEVELS; row.level++) {
        const int guess = row.code = task.found[cell + row.level];
        const int below = ((1 << LEVELS) - 1) & (~1 << row.level);
        if (doubt >> row.level & 1) {
            if (!settle_level(task, row, doubt >> (row.level + 16) & 1, task.runner[cell + row.level], lane)) {
                if (lane == 0) task.doubt[at] = doubt, task.open[atomicAdd(task.opened, 1)] = at;
                return;
            }
            doubt &= below * 0x10001;
            if (row.code != guess) {  // another residual
                if (lane == 0) task.found[cell + row.level] = row.code;
                doubt = open_rest(task, cell, row.level + 1, lane);
            }
        }
        if (!(doubt & below)) return;
        each_group(lane, [&](int g, int dim) {
            double c[4];
            widen(c, load_code(task, row.level, row.code, dim));
#pragma unroll
            for (int i = 0; i < 4; i++) row.r[g][i] -= c[i];
        });
    }
}

extern "C" __global__ void __launch_bounds__(128, 5) settle(const __grid_constant__ Doubts task) {
    const int lane = threadIdx.x & 31, warps = gridDim.x * (blockDim.x / 32), listed = *task.listed;
    for (int place = (blockIdx.x * blockDim.x + threadIdx.x) / 32; place < listed; place += warps)
        settle_row(task, task.list[place], lane);
}
