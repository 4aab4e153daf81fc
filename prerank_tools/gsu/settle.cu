// The definition itself, for the rows that wait: every cosine of a candidate in float64, and the K best of them
// by radix selection on (cosine, position). A row comes here when its list overflowed, as where one item was
// seen hundreds of times, or when its K-th best is not clear of zero. A block a row; blocks take rows in turn.

__device__ __forceinline__ u64 ordered(double x) {
  const u64 bits = (u64)__double_as_longlong(x);
  return bits >> 63 ? ~bits : bits | 1ull << 63;
}
__device__ __forceinline__ double unordered(u64 bits) {
  return __longlong_as_double((i64)(bits >> 63 ? bits & ~(1ull << 63) : ~bits));
}

struct Best {
  u64 key;
  int at;
};
__device__ __forceinline__ bool better(const Best& x, const Best& y) {
  return x.key > y.key || (x.key == y.key && x.at > y.at);
}

// The next eight bits of the `left`-th best of those that share the bits found so far; `left` among its equals.
__device__ __forceinline__ int next_digit(const int* counts, int& left) {
  int digit = 255;
  while (left > counts[digit]) left -= counts[digit--];
  return digit;
}

extern "C" __global__ void __launch_bounds__(256) settle(
    const raw* candidates, const raw* histories, const double* inverse_m, const double* inverse_n,
    const int* group, const int* visible, const int* with_vector, const i64* offset, const int* waiting,
    u64* scratch, int longest, int* position, float* sim, int* n_valid, unsigned char* tier, int k) {
  __shared__ int counts[256], tiers[32], usable, left, kept;
  __shared__ Best edge, best[128];
  u64* keys = scratch + (i64)blockIdx.x * longest;  // of cosines; 0 for a behaviour that cannot win
  for (int i = blockIdx.x; i < waiting[0]; i += gridDim.x) {
    const int row = waiting[1 + i], seen = visible[row], mine = threadIdx.x;
    const i64 base = offset[group[row]];
    if (mine == 0) usable = kept = 0, edge = {0, 0};
    if (mine < 32) tiers[mine] = 0;
    __syncthreads();
    for (int from = 0; from < seen; from += 64) {
      const int at = min(from + mine / 4, seen - 1);
      const double dot = exact_dot_by_four(histories + (base + at) * WIDTH, candidates + (i64)row * WIDTH);
      const double inverse = inverse_n[base + at], cosine = dot * inverse_m[row] * inverse;
      const bool wins = inverse > 0 && cosine != 0;
      if (mine % 4 == 0 && from + mine / 4 < seen) {
        keys[at] = wins ? ordered(cosine) : 0;
        if (wins) atomicAdd(&usable, 1);
      }
    }
    __syncthreads();
    const int wanted = min(k, usable);
    if (mine == 0) left = wanted;
    for (int digit = 0; wanted && digit < 12; digit++) {  // eight of the cosine, four of the position
      counts[mine] = 0;
      __syncthreads();
      const int shift = digit < 8 ? 56 - 8 * digit : 24 - 8 * (digit - 8);
      for (int at = mine; at < seen; at += 256) {
        const u64 key = keys[at];
        const u64 bits = digit < 8 ? key : (u64)at, found = digit < 8 ? edge.key : (u64)edge.at;
        const bool same = digit % 8 == 0 || bits >> (shift + 8) == found >> (shift + 8);
        if (key && same && (digit < 8 || key == edge.key)) atomicAdd(&counts[bits >> shift & 255], 1);
      }
      __syncthreads();
      if (mine == 0) {
        int rest = left;
        const u64 bits = (u64)next_digit(counts, rest) << shift;
        if (digit < 8) edge.key |= bits; else edge.at |= (int)bits;
        left = rest;
      }
      __syncthreads();
    }
    for (int at = mine; wanted && at < seen; at += 256) {
      const Best one = {keys[at], at};
      if (one.key && !better(edge, one)) best[atomicAdd(&kept, 1)] = one;
    }
    __syncthreads();
    if (mine < wanted) {
      int place = 0;
      for (int other = 0; other < wanted; other++) place += better(best[other], best[mine]);
      const float cosine = (float)unordered(best[mine].key);
      if (LISTS) position[(i64)row * k + place] = best[mine].at, sim[(i64)row * k + place] = cosine;
      if (TIERS) atomicAdd(&tiers[(int)ceilf(__fmul_rn(cosine, 10.0f)) + 10], 1);
    }
    if (LISTS && mine >= wanted && mine < k)
      position[(i64)row * k + mine] = -1, sim[(i64)row * k + mine] = -1.1f;
    if (mine == 0) n_valid[row] = wanted < k ? wanted : with_vector[base + seen - 1];
    __syncthreads();
    if (TIERS && mine < 22) tier[(i64)row * 22 + mine] = tiers[mine];
    __syncthreads();
  }
}
