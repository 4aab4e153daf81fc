// What can be among the K best of each candidate. Scores never leave the chip, only those listed do.
//
// First pass: the maxima of 256 interleaved groups of behaviours a candidate, and from them a threshold that at
// least K behaviours reach. Second pass: what reaches it is listed, with its score.

#define SLOT (LOOKERS * 16)  // bytes of four scores of every thread

// Pairs of float16.
__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned both;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}
__device__ __forceinline__ unsigned max2(unsigned x, unsigned y) {
  unsigned z;
  asm("max.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}
__device__ __forceinline__ unsigned add2(unsigned x, unsigned y) {
  unsigned z;
  asm("add.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}
__device__ __forceinline__ unsigned reached2(unsigned x, unsigned y) {
  unsigned z;
  asm("set.ge.f16x2.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  return z;
}

// The largest t (to 1 / 2048) that at least `wanted` of the groups of each of two candidates reach; 0 if none.
__device__ __forceinline__ void thresholds(
    const unsigned (&high)[SPLITS][2][COLUMNS / 8], int wanted, float (&low)[2]) {
  float top[2] = {1, 1};
  low[0] = low[1] = 0;
  for (int halving = 0; halving < 11; halving++) {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const float middle = 0.5f * (low[r] + top[r]);
      const unsigned level = pack(middle, middle);
      unsigned counts = 0;
#pragma unroll
      for (int split = 0; split < SPLITS; split++)
#pragma unroll
        for (int j = 0; j < COLUMNS / 8; j++) counts = add2(counts, reached2(high[split][r][j], level));
      float reached = half_value(counts & 0xFFFF) + half_value(counts >> 16);
      reached += __shfl_xor_sync(~0u, reached, 1);
      reached += __shfl_xor_sync(~0u, reached, 2);
      if (reached >= wanted) low[r] = middle; else top[r] = middle;
    }
  }
}

// Keep four scores, and the position of the first, at `to` where the largest reaches `low`, and move on. A
// thread keeps up to STAGED fours of each of its candidates R; the positions of both lie behind all fours.
#define POSITIONS(R) ((2 - R) * STAGED * SLOT + R * 4)
template <int R>
__device__ __forceinline__ void keep(unsigned& to, const float (&x)[4], float low, int at) {
  asm volatile(
      "{.reg .pred p;\n"
      "setp.ge.f32 p, %1, %2;\n"
      "@p st.shared.v4.f32 [%0], {%3, %4, %5, %6};\n"
      "@p st.shared.b32 [%0 + %8], %7;\n"
      "@p add.u32 %0, %0, %9;}"
      : "+r"(to)
      : "f"(fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]))), "f"(low), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]),
        "r"(at), "n"(POSITIONS(R)), "n"(SLOT)
      : "memory");
}

// Write a score that reaches `floor`, and its position, `done` bytes into a part of a list.
__device__ __forceinline__ void append(const int2* list, unsigned& done, float score, float floor, int at) {
  asm volatile(
      "{.reg .pred p; .reg .b64 to;\n"
      "setp.ge.f32 p, %2, %3;\n"
      "cvt.u64.u32 to, %0;\n"
      "add.u64 to, to, %1;\n"
      "@p st.global.v2.b32 [to], {%4, %5};\n"
      "@p add.u32 %0, %0, 8;}"
      : "+r"(done)
      : "l"(list), "f"(score), "f"(floor), "r"(__float_as_int(score)), "r"(at)
      : "memory");
}

// What the threads that look at scores do.
__device__ __forceinline__ void look_through(
    const Tiles& t, unsigned held, unsigned staged, const half_bits* candidates, const float* candidate_scale,
    const int* visible, const float* slack, int first, int last, int longest, int shortest, int2* lists,
    int* counts, float* floors, int k) {
  const int tiles = tiles_of(longest), warp = threadIdx.x / 32;
  const bool sifted = longest > LISTED;
  const int quad = threadIdx.x % 4, row = first + warp * 16 + threadIdx.x % 32 / 4;  // and row + 8
  int seen[2], mine[2];
  for (int r = 0; r < 2; r++) {
    mine[r] = min(row + r * 8, last - 1);
    seen[r] = row + r * 8 < last ? visible[mine[r]] : 0;
  }
#if HELD
  Candidates a;
  for (int k = 0; k < STEPS; k++)
    for (int part = 0; part < 4; part++)
      a[k][part] =
          *(const unsigned*)(candidates + (i64)mine[part % 2] * WIDTH + k * 16 + quad * 2 + part / 2 * 8);
#else
  const Candidates a = held + (HOPPER ? warp / 4 * 64 * 128 : 0);  // the warpgroup's, or all
#endif

  float low[2] = {0, 0};
  if (sifted) {
    unsigned high[SPLITS][2][COLUMNS / 8];
    for (int i = 0; i < 64; i++) high[i / (COLUMNS / 4)][i / (COLUMNS / 8) % 2][i % (COLUMNS / 8)] = 0;
    auto look = [&](int tile, int step, const float(&d)[SCORES], const float(&s)[COLUMNS / 4]) {
#pragma unroll
      for (int j = 0; j < COLUMNS / 8; j++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const float *x = d + 4 * j + 2 * r, *z = s + 2 * j;
          high[step][r][j] = max2(high[step][r][j], pack(x[0] * z[0], x[1] * z[1]));
        }
    };
    each_tile(t, a, 0, tiles, seen, shortest, look);
    thresholds(high, k, low);
  }

  unsigned from[2], to[2];
  unsigned listed[2] = {0, 0};  // bytes
  bool over[2] = {false, false};
  int2* list[2];
  for (int r = 0; r < 2; r++) {
    // Not clear of zero, where missing vectors and exact zeros lie: everything is listed. Scores were rounded.
    const float scale = candidate_scale[mine[r]], cosine = low[r] * scale * 0.999f, away = slack[mine[r]];
    const bool clear = cosine > 3.0f * away && seen[r] > LISTED;
    low[r] = seen[r] == 0 ? 4.0f : clear ? (cosine - 2.1f * away) / scale : -4.0f;
    if (quad == 0 && row + r * 8 < last) floors[row + r * 8] = clear ? low[r] : -4.0f;
    from[r] = to[r] = staged + r * STAGED * SLOT + threadIdx.x * 16;
    list[r] = lists + ((i64)mine[r] * 4 + quad) * SLOTS;
  }
  auto write_out = [&]() {
#pragma unroll
    for (int r = 0; r < 2; r++) {
      const unsigned most = __reduce_max_sync(~0u, to[r] - from[r]);
      for (unsigned four = from[r]; four < from[r] + most; four += SLOT) {
        float x[4];
        int at;
        asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                     : "=f"(x[0]), "=f"(x[1]), "=f"(x[2]), "=f"(x[3])
                     : "r"(four));
        asm volatile("ld.shared.b32 %0, [%1];" : "=r"(at) : "r"(four + POSITIONS(r)));
        // NaN, which nothing reaches, past a thread's last, and where a part may not hold four more.
        const bool room = listed[r] <= (SLOTS - 4) * 8;
        const float floor = four < to[r] && room ? low[r] : __int_as_float(0x7FC00000);
        over[r] |= four < to[r] && !room;
#pragma unroll
        for (int i = 0; i < 4; i++) append(list[r], listed[r], x[i], floor, at + i % 2 + i / 2 * 8);
      }
      to[r] = from[r];
    }
  };
  auto emit = [&](int tile, int step, const float(&d)[SCORES], const float(&s)[COLUMNS / 4]) {
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j += 2) {
      const unsigned held = max(to[0] - from[0], to[1] - from[1]);
      if (j % 8 == 0 && __any_sync(~0u, held > (STAGED - 4) * SLOT)) write_out();
      const float *x = d + 4 * j, *z = s + 2 * j;
      const float first[4] = {x[0] * z[0], x[1] * z[1], x[4] * z[2], x[5] * z[3]};
      const float second[4] = {x[2] * z[0], x[3] * z[1], x[6] * z[2], x[7] * z[3]};
      keep<0>(to[0], first, low[0], tile * COLUMNS + 8 * j + quad * 2);
      keep<1>(to[1], second, low[1], tile * COLUMNS + 8 * j + quad * 2);
    }
  };
  each_tile(t, a, sifted ? tiles : 0, tiles, seen, shortest, emit);
  write_out();
  for (int r = 0; r < 2; r++)
    if (row + r * 8 < last) counts[(row + r * 8) * 4 + quad] = over[r] ? SLOTS + 1 : listed[r] / 8;
}

// `lists`: (M, 4, SLOTS) scores and positions, one part for each thread that sees a candidate; `counts`: (M, 4),
// more than SLOTS where a part overflowed; `floors`: what every listed score reaches, -4 where all are listed.
// A score times the candidate's `scale` is within `slack` of the cosine. `waiting`: no row waits for `settle`
// yet.
extern "C" __global__ void __launch_bounds__(THREADS, 1) shortlist(
    const __grid_constant__ Map map, const half_bits* histories, const float* history_scale,
    const half_bits* candidates, const float* candidate_scale, const i64* offset, const int* visible,
    const float* slack, const int* tile_group, const int* tile_first, const int* tile_last, int2* lists,
    int* counts, float* floors, int* waiting, int k) {
  extern __shared__ __align__(1024) unsigned char memory[];
  __shared__ int bounds[2];
  __shared__ __align__(8) u64 barriers[2 * STAGES];
  Tiles t;
  t.rows = ((unsigned)__cvta_generic_to_shared(memory) + 1023) / 1024 * 1024;
  const unsigned held = t.rows + STAGES * TILE_BYTES, staged = held + (HELD ? 0 : ROWS * WIDTH * 2);
  t.scales = staged + 3 * STAGED * SLOT;
  t.full = (unsigned)__cvta_generic_to_shared(barriers), t.empty = t.full + STAGES * 8;

  const int first = tile_first[blockIdx.x], last = tile_last[blockIdx.x], warp = threadIdx.x / 32;
  const i64 base = offset[tile_group[blockIdx.x]];
  if (blockIdx.x == 0 && threadIdx.x == 0) waiting[0] = 0;
  if (threadIdx.x == 0) {
    bounds[0] = 0, bounds[1] = 0x7FFFFFFF;
    for (int stage = 0; stage < STAGES; stage++) {
      set_up(t.full + stage * 8, HOPPER ? 33 : 32);
      set_up(t.empty + stage * 8, LOOKERS / 32);
    }
    asm volatile("fence.proxy.async;" ::: "memory");
  }
  __syncthreads();
  if (first + (int)threadIdx.x < last) {
    atomicMax(&bounds[0], visible[first + threadIdx.x]);
    atomicMin(&bounds[1], visible[first + threadIdx.x]);
  }
#if !HELD
  for (int word = threadIdx.x; word < ROWS * WIDTH / 8; word += THREADS) {
    const int m = word / (WIDTH / 8), column = word % (WIDTH / 8);
    const int4 x = *(const int4*)(candidates + (i64)min(first + m, last - 1) * WIDTH + column * 8);
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(held + swizzled(m, column, ROWS)), "r"(x.x),
                 "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
  }
  asm volatile("fence.proxy.async;" ::: "memory");
#endif
  __syncthreads();
  const int longest = bounds[0], shortest = bounds[1];
  const int tiles = tiles_of(longest);
  const bool sifted = longest > LISTED;  // else everything is listed
  if (warp >= LOOKERS / 32) {
#if HOPPER
    asm volatile("setmaxnreg.dec.sync.aligned.u32 24;");
#endif
    const Source from = {&map, histories + base * WIDTH, history_scale + base, (int)base, longest};
    if (warp == LOOKERS / 32)
      for (int turn = 0; turn < tiles * (sifted ? 2 : 1); turn++) {
        if (turn >= STAGES) await(t.empty + turn % STAGES * 8, (turn / STAGES - 1) % 2);
        fetch(from, t, turn % tiles, turn % STAGES);
      }
  } else {
#if HOPPER
    asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
#endif
    look_through(t, held, staged, candidates, candidate_scale, visible, slack, first, last, longest, shortest, lists,
                 counts, floors, k);
  }
}
