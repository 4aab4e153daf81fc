// Products of candidates with their user's history, tile by tile: 64 candidates for each of WARPGROUPS groups of
// four warps, by COLUMNS behaviours; float16, summed in float32. Four more warps, of which one works, fetch tiles
// ahead (registers are shared out by fours of warps). HOPPER: by that card's own products and copy engine.
// HELD: candidates are held in registers, else in shared memory. STAGES tiles are held at once.

// COLUMNS behaviours a tile: 128, or 64 where rows are long.
#define SCORES (COLUMNS / 2)        // products of a tile that a thread holds: of two candidates
#define SPLITS (256 / COLUMNS)
#define ROWS (64 * WARPGROUPS)
#define LOOKERS (128 * WARPGROUPS)  // threads that look at scores
#define THREADS (LOOKERS + 128)
#define TILE_BYTES (COLUMNS * WIDTH * 2)
#define STEPS (WIDTH / 16)
#define ROUND SPLITS  // tiles a round

// Sixteen-byte words of a row of 128 bytes are permuted by the row, so that eight rows of a column meet no bank
// twice; this is also the tensor cores' own 128-byte swizzle.
__device__ __forceinline__ unsigned swizzled(int row, int word, int rows) {
  return (word / 8) * rows * 128 + row * 128 + (((word % 8) ^ (row % 8)) * 16);
}

// ---- tiles of a history, fetched ahead

__device__ __forceinline__ void set_up(unsigned barrier, int arrivals) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void arrive(unsigned barrier) {
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void await(unsigned barrier, int parity) {
  unsigned done;
  do {
    asm volatile(
        "{.reg .pred p; mbarrier.test_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (!done);
}

__device__ __forceinline__ int tiles_of(int longest) {
  return (longest + ROUND * COLUMNS - 1) / (ROUND * COLUMNS) * ROUND;
}

struct Tiles {
  unsigned rows, scales, full, empty;  // shared addresses, by stage: swizzled rows, scales, barriers
  __device__ unsigned tile(int stage) const { return rows + stage * TILE_BYTES; }
  __device__ unsigned scale(int stage) const { return scales + stage * COLUMNS * 4; }
};

struct __align__(64) Map {
  u64 words[16];
};
struct Source {
  const Map* map;  // of the rows of all histories
  const half_bits* rows;
  const float* scales;
  int base, longest;
};

// By one warp. A tile is there when the copies of all its threads have landed, and on Hopper the copy engine's.
__device__ __forceinline__ void fetch(const Source& from, const Tiles& to, int tile, int stage) {
  const int lane = threadIdx.x % 32;
  const unsigned full = to.full + stage * 8;
#if HOPPER
  if (lane == 0) {
    asm volatile("{.reg .b64 state; mbarrier.arrive.expect_tx.shared.b64 state, [%0], %1;}" ::"r"(full),
                 "r"(TILE_BYTES)
                 : "memory");
#pragma unroll
    for (int chunk = 0; chunk < WIDTH / 64; chunk++)
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
          "[%1, {%2, %3}], [%4];" ::"r"(to.tile(stage) + chunk * COLUMNS * 128),
          "l"(from.map), "r"(chunk * 64), "r"(from.base + tile * COLUMNS), "r"(full)
          : "memory");
  }
#else
  for (int word = lane; word < COLUMNS * WIDTH / 8; word += 32) {
    const int row = word / (WIDTH / 8), column = word % (WIDTH / 8);
    const int at = min(tile * COLUMNS + row, from.longest - 1);
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                     to.tile(stage) + swizzled(row, column, COLUMNS)),
                 "l"(from.rows + (i64)at * WIDTH + column * 8)
                 : "memory");
  }
#endif
  for (int row = lane; row < COLUMNS; row += 32)
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to.scale(stage) + row * 4),
                 "l"(from.scales + min(tile * COLUMNS + row, from.longest - 1))
                 : "memory");
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(full) : "memory");
}

// ---- one tile's product: 64 candidates by 64 behaviours into 32 registers a thread. Thread t of a warp holds,
// for candidates t / 4 and t / 4 + 8 of the warp's 16, behaviours 8 j + 2 (t % 4) and the next.

#define EIGHT(d, i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define REGISTERS32(d) EIGHT(d, 0), EIGHT(d, 8), EIGHT(d, 16), EIGHT(d, 24)
#define NAMES32 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15," \
  "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#if COLUMNS == 64
#define REGISTERS(d) REGISTERS32(d)
#define INTO "m64n64k16.f32.f16.f16 {" NAMES32 "}"
#define A0 "%32"
#define A1 "%33"
#define A2 "%34"
#define A3 "%35"
#define B0 "%36"
#define K0 "%37"
#else
#define REGISTERS(d) REGISTERS32(d), EIGHT(d, 32), EIGHT(d, 40), EIGHT(d, 48), EIGHT(d, 56)
#define INTO \
  "m64n128k16.f32.f16.f16 {" NAMES32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49," \
  "%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63}"
#define A0 "%64"
#define A1 "%65"
#define A2 "%66"
#define A3 "%67"
#define B0 "%68"
#define K0 "%69"
#endif

#if HELD
typedef unsigned Candidates[STEPS][4];  // in registers
#else
typedef unsigned Candidates;            // in shared memory
#endif

#if HOPPER
// Hopper: asynchronous, so that one tile's scores are looked at while the next are made.
// Lower word of the descriptor of a swizzled tile: its address, and a field that this layout ignores.
__device__ __forceinline__ unsigned descriptor(unsigned address) { return address / 16 | 1 << 16; }

#define UPPER "0x40000040"  // of a descriptor: groups of eight rows lie 1024 bytes apart, swizzle of 128 bytes

__device__ __forceinline__ void multiply(float (&d)[SCORES], const Candidates& a, unsigned stage) {
  const unsigned b = descriptor(stage);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
#if HELD
    asm volatile(
        "{.reg .pred p; .reg .b64 b; setp.ne.b32 p, " K0 ", 0; mov.b64 b, {" B0 ", " UPPER "};\n"
        "wgmma.mma_async.sync.aligned." INTO ", {" A0 "," A1 "," A2 "," A3 "}, b, p, 1, 1, 0;}"
        : REGISTERS(d)
        : "r"(a[k][0]), "r"(a[k][1]), "r"(a[k][2]), "r"(a[k][3]), "r"(b + k / 4 * COLUMNS * 8 + k % 4 * 2), "r"(k));
#else
    asm volatile(
        "{.reg .pred p; .reg .b64 a, b; setp.ne.b32 p, " A2 ", 0;\n"
        "mov.b64 a, {" A0 ", " UPPER "}; mov.b64 b, {" A1 ", " UPPER "};\n"
        "wgmma.mma_async.sync.aligned." INTO ", a, b, p, 1, 1, 0, 0;}"
        : REGISTERS(d)
        : "r"(descriptor(a) + k / 4 * ROWS * 8 + k % 4 * 2), "r"(b + k / 4 * COLUMNS * 8 + k % 4 * 2), "r"(k));
#endif
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void ready(float (&d)[SCORES]) {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  asm volatile("" : REGISTERS(d)::"memory");
}
#else
// Every other card: warp by warp.
__device__ __forceinline__ void multiply(float (&d)[SCORES], const Candidates& a, unsigned stage) {
  const int t = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < SCORES; i++) d[i] = 0;
#pragma unroll
  for (int k = 0; k < STEPS; k++) {
#if HELD
    const unsigned(&x)[4] = a[k];
#else
    unsigned x[4];
    const int row = threadIdx.x / 32 * 16 + t % 16;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(a + swizzled(row, k * 2 + t / 16, ROWS)));
#endif
#pragma unroll
    for (int j = 0; j < COLUMNS / 8; j += 2) {
      unsigned b[4];
      const int column = j * 8 + t % 8 + t / 16 * 8;
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                   : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                   : "r"(stage + swizzled(column, k * 2 + t / 8 % 2, COLUMNS)));
#pragma unroll
      for (int n = 0; n < 2; n++) {
        float* c = d + (j + n) * 4;
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
            "{%0,%1,%2,%3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(b[n * 2]), "r"(b[n * 2 + 1]));
      }
    }
  }
}
__device__ __forceinline__ void ready(float (&d)[SCORES]) {}
#endif

// A tile's scales, in the order of a thread's behaviours.
__device__ __forceinline__ void load_scales(float (&s)[COLUMNS / 4], unsigned scales) {
#pragma unroll
  for (int j = 0; j < COLUMNS / 8; j++)
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];"
                 : "=f"(s[2 * j]), "=f"(s[2 * j + 1])
                 : "r"(scales + (8 * j + threadIdx.x % 4 * 2) * 4));
}

// Behaviours that a candidate does not see become NaN, which is never larger nor reaches anything.
__device__ __forceinline__ void hide(const int (&seen)[2], int tile, float (&d)[SCORES]) {
  const int first = tile * COLUMNS + threadIdx.x % 4 * 2, left[2] = {seen[0] - first, seen[1] - first};
#pragma unroll
  for (int i = 0; i < SCORES; i++)
    if (left[i / 2 % 2] <= i / 4 * 8 + i % 2) d[i] = __int_as_float(0x7FC00000);
}

// One pass over all tiles (a multiple of ROUND): `look(tile, its place in a round, products, scales)`, products of
// other warps under way meanwhile. `turn`: tiles of earlier passes.
template <typename Look>
__device__ __forceinline__ void each_tile(
    const Tiles& t, const Candidates& a, int turn, int tiles, const int (&seen)[2], int shortest, Look look) {
  float d[SCORES], scales[COLUMNS / 4];
  for (int round = 0; round < tiles; round += ROUND) {
#pragma unroll
    for (int step = 0; step < ROUND; step++) {
      const int tile = round + step, stage = (turn + tile) % STAGES;
      await(t.full + stage * 8, (turn + tile) / STAGES % 2);
      multiply(d, a, t.tile(stage));
      load_scales(scales, t.scale(stage));
      ready(d);
      __syncwarp();
      if (threadIdx.x % 32 == 0) arrive(t.empty + stage * 8);
      if ((tile + 1) * COLUMNS > shortest) hide(seen, tile, d);
      look(tile, step, d, scales);
    }
  }
}
