// What the GPU kernels of the search share: stored numbers, half-precision words, the exact cosine.
// Compiled at run time for one width (WIDTH dims, zero-padded) and one stored type (RAW: 0 float32, 1 float16,
// 2 int8). M candidates, N behaviours of all groups, D = WIDTH dims.

typedef unsigned short half_bits;
typedef unsigned long long u64;
typedef long long i64;

#if RAW == 0
typedef float raw;
#elif RAW == 1
typedef half_bits raw;
#else
typedef signed char raw;
#endif

__device__ __forceinline__ float half_value(half_bits x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x));
  return y;
}

__device__ __forceinline__ half_bits to_half(float x) {
  half_bits y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ double stored(raw x) {
#if RAW == 1
  return (double)half_value(x);
#else
  return (double)x;
#endif
}

// Exact in float64 for every stored type, and for the shorter ones already in float32.
__device__ __forceinline__ double product(raw x, raw y) {
#if RAW == 0
  return (double)x * (double)y;
#elif RAW == 1
  return (double)(half_value(x) * half_value(y));
#else
  return (double)((float)x * (float)y);
#endif
}

// `cosine.lane_dots` by 16 neighbouring threads: lane d % 16 adds up dimension d, lanes are added by halves.
__device__ __forceinline__ double add_lanes(double lane_sum) {
  for (int half = 8; half > 0; half /= 2) lane_sum += __shfl_xor_sync(~0u, lane_sum, half);
  return lane_sum;
}

__device__ __forceinline__ double exact_dot(const raw* x, const raw* y) {
  const int lane = threadIdx.x % 16;
  double sum = 0;
#pragma unroll 8
  for (int d = lane; d < WIDTH; d += 16) sum += product(x[d], y[d]);
  return add_lanes(sum);
}

// The same by four neighbouring threads, each with four lanes.
struct __align__(4 * sizeof(raw)) Four {
  raw of[4];
};

__device__ __forceinline__ double exact_dot_by_four(const raw* x, const raw* y) {
  const int first = threadIdx.x % 4 * 4;
  double sum[4] = {0, 0, 0, 0};
#pragma unroll 8
  for (int d = first; d < WIDTH; d += 16) {
    const Four a = *(const Four*)(x + d), b = *(const Four*)(y + d);
    for (int i = 0; i < 4; i++) sum[i] += product(a.of[i], b.of[i]);
  }
  for (int i = 0; i < 4; i++) sum[i] += __shfl_xor_sync(~0u, sum[i], 2);
  for (int i = 0; i < 4; i++) sum[i] += __shfl_xor_sync(~0u, sum[i], 1);
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}
