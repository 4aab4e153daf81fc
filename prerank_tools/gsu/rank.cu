// One candidate's list in order, a warp each: sorted by the scores in hand; where those cannot tell who comes
// first, who is among the K or which tier it is, by exact cosines of the few in question.

#define WARPS 4

// A key sorts as a score, to its upper bits, and tells the slot that holds the score.
#define SLOT_BITS (LISTED == 128 ? 7 : 8)
__device__ __forceinline__ unsigned key_of(float score, int slot) {
  const unsigned bits = __float_as_uint(score), ordered = bits & 0x80000000 ? ~bits : bits | 0x80000000;
  return ordered >> SLOT_BITS << SLOT_BITS | slot;
}

// Bitonic, largest first; key i of a warp's 32 * EACH is `keys[i % EACH]` of lane i / EACH.
template <int EACH>
__device__ __forceinline__ void sort(unsigned (&keys)[EACH]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int size = 2; size <= 32 * EACH; size *= 2) {
#pragma unroll
    for (int step = size / 2; step > 0; step /= 2) {
      if (step >= EACH) {
        const bool down = ((lane * EACH & size) == 0) == ((lane * EACH & step) == 0);
#pragma unroll
        for (int i = 0; i < EACH; i++) {
          const unsigned other = __shfl_xor_sync(~0u, keys[i], step / EACH);
          keys[i] = down ? max(keys[i], other) : min(keys[i], other);
        }
      } else {
#pragma unroll
        for (int i = 0; i < EACH; i++)
          if ((i & step) == 0) {
            const bool down = ((lane * EACH + i) & size) == 0;
            const unsigned high = max(keys[i], keys[i | step]), low = min(keys[i], keys[i | step]);
            keys[i] = down ? high : low;
            keys[i | step] = down ? low : high;
          }
      }
    }
  }
}

struct Memory {  // of a warp
  int2 found[LISTED];  // score and position as listed, then by place
  float score[LISTED];
  int at[LISTED];
  double exact[LISTED];          // -4 for a behaviour that cannot win
  unsigned char linked[LISTED];  // whether the order with the next is in doubt
  unsigned char asked[LISTED];   // places whose cosine must be exact
  unsigned char sure[LISTED];    // whether it is so
  int tier[32];
};

struct Rows {
  const raw *candidates, *histories;
  const double *inverse_m, *inverse_n;
  const float *scale, *slack;
  const int *group, *visible, *with_vector;
  const i64* offset;
  const int2* lists;
  const int* counts;
  const float* floors;
  int *position, *n_valid, *waiting;
  float* sim;
  unsigned char* tier;
  int rows, k, bits;
  float rounding;
};

// Leave a row to `settle`: a list that overflowed, or that need not hold all of the K best.
__device__ __forceinline__ void wait(const Rows& in, int row) {
  if (threadIdx.x % 32 == 0) in.waiting[1 + atomicAdd(in.waiting, 1)] = row;
}

template <int EACH>
__device__ void put_in_order(const Rows& in, int row, Memory& m, const int (&start)[5]) {
  const int lane = threadIdx.x % 32, n = start[4], k = in.k;
  const float error = in.slack[row], scale = in.scale[row], floor = in.floors[row];
  unsigned keys[EACH];
  float largest = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int slot = i * 32 + lane;
    const int part = (slot >= start[1]) + (slot >= start[2]) + (slot >= start[3]);
    const int before = part == 0 ? 0 : part == 1 ? start[1] : part == 2 ? start[2] : start[3];
    keys[i] = 0;
    if (slot < n) {
      const int2 listed = in.lists[((i64)row * 4 + part) * SLOTS + slot - before];
      const float score = __int_as_float(listed.x) * scale;
      keys[i] = key_of(score, slot);
      largest = fmaxf(largest, fabsf(score));
      m.found[slot] = make_int2(__float_as_int(score), listed.y);
    }
  }
  sort<EACH>(keys);
  __syncwarp();
  bool zero = false;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int place = lane * EACH + i;
    const int2 found = place < n ? m.found[keys[i] & ((1 << SLOT_BITS) - 1)] : make_int2(0xC0800000, 0);
    zero |= fabsf(__int_as_float(found.x)) <= error;
    m.score[place] = __int_as_float(found.x);
    m.at[place] = found.y;
  }
  __syncwarp();
  // An exact zero and a missing vector must be known as such: then everything is settled exactly.
  const bool all = __any_sync(~0u, zero);
  // Scores that lie apart by less may be in the wrong order: both err, and the sort left out their lower bits.
  largest = __uint_as_float(__reduce_max_sync(~0u, __float_as_uint(largest)));
  const float apart = 2 * error + largest * (4.0f / (1 << (23 - SLOT_BITS)));
  const float last = n >= k ? m.score[k - 1] : -4.0f, next = n > k ? m.score[k] : -4.0f;
  const bool held = floor < -3.0f || (n >= k && last - apart >= floor * scale);
  if (!held) return wait(in, row);

  const bool rough = LISTS && (in.bits || error > 1.5f * in.rounding);
  const float possible = all ? -8.0f : last - apart;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int place = lane * EACH + i;
    const float score = m.score[place], below = place + 1 < n ? m.score[place + 1] : -8.0f;
    bool linked = score - below <= apart && below >= possible;
    if (!LISTS) linked = linked && score <= next + apart;
    m.linked[place] = place + 1 < n && (all || linked);
  }
  __syncwarp();
  int asked = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int place = lane * EACH + i;
    const float tenths = m.score[place] * 10.0f;
    const bool edge = fabsf(tenths - rintf(tenths)) <= 10.0f * error + 2e-6f;
    const bool ask = place < n && m.score[place] >= possible &&
                     (all || rough || edge || m.linked[place] || (place > 0 && m.linked[place - 1]));
    const unsigned lanes = __ballot_sync(~0u, ask);
    if (ask) m.asked[asked + __popc(lanes & ((1u << lane) - 1))] = place;
    m.sure[place] = ask;
    asked += __popc(lanes);
  }
  __syncwarp();
  const i64 base = in.offset[in.group[row]];
  for (int i = lane / 4; i < (asked + 7) / 8 * 8; i += 8) {
    const int place = m.asked[min(i, asked - 1)];
    const i64 at = base + m.at[place];
    const double dot = exact_dot_by_four(in.histories + at * WIDTH, in.candidates + (i64)row * WIDTH);
    const double inverse = in.inverse_n[at], sim = dot * in.inverse_m[row] * inverse;
    if (lane % 4 == 0) m.exact[place] = inverse > 0 && sim != 0 ? sim : -4.0;
  }
  if (TIERS) m.tier[lane] = 0;
  __syncwarp();

  // Better than another: a higher cosine, then the later behaviour. Only linked neighbours can change places.
  auto better = [&](int x, int y) {
    return m.exact[x] > m.exact[y] || (m.exact[x] == m.exact[y] && m.at[x] > m.at[y]);
  };
  int kept = 0;
#pragma unroll
  for (int i = 0; i < EACH; i++) {
    const int here = lane * EACH + i;
    int place = here;
    for (int j = here; j > 0 && m.linked[j - 1]; j--) place -= better(here, j - 1);
    for (int j = here; m.linked[j]; j++) place += better(j + 1, here);
    const float sim = m.sure[here] ? (float)m.exact[here] : m.score[here];
    const bool best = here < n && place < k && sim > -3.0f;
    kept += __popc(__ballot_sync(~0u, best));
    if (LISTS && best) {
      in.position[(i64)row * k + place] = m.at[here];
      in.sim[(i64)row * k + place] = sim;
    }
    if (TIERS && best) atomicAdd(&m.tier[(int)ceilf(__fmul_rn(sim, 10.0f)) + 10], 1);
  }
  if (LISTS)
    for (int place = kept + lane; place < k; place += 32) {
      in.position[(i64)row * k + place] = -1;
      in.sim[(i64)row * k + place] = -1.1f;
    }
  const int visible = in.visible[row];
  if (lane == 0) in.n_valid[row] = kept < k ? kept : in.with_vector[base + visible - 1];
  __syncwarp();
  if (TIERS && lane < 22) in.tier[(i64)row * 22 + lane] = m.tier[lane];
}

extern "C" __global__ void __launch_bounds__(WARPS * 32, 8) rank(
    const raw* candidates, const raw* histories, const double* inverse_m, const double* inverse_n,
    const float* scale, const float* slack, const int* group, const int* visible, const int* with_vector,
    const i64* offset, const int2* lists, const int* counts, const float* floors, int* waiting, int* position,
    float* sim, int* n_valid, unsigned char* tier, int rows, int k, int bits, float rounding) {
  const Rows in = {candidates, histories, inverse_m, inverse_n, scale,    slack,   group,   visible,
                   with_vector, offset,   lists,     counts,    floors,   position, n_valid, waiting,
                   sim,        tier,      rows,      k,         bits,     rounding};
  extern __shared__ __align__(16) unsigned char memory[];
  const int row = blockIdx.x * WARPS + threadIdx.x / 32;
  if (row >= in.rows) return;
  Memory& m = ((Memory*)memory)[threadIdx.x / 32];
  const int4 count = ((const int4*)in.counts)[row];
  const int start[5] = {
      0, count.x, count.x + count.y, count.x + count.y + count.z, count.x + count.y + count.z + count.w};
  const int n = start[4];
  if (max(max(count.x, count.y), max(count.z, count.w)) > SLOTS || n > LISTED) return wait(in, row);
  if (n <= 64) put_in_order<2>(in, row, m, start);
  else if (n <= 128) put_in_order<4>(in, row, m, start);
  else put_in_order<LISTED / 32>(in, row, m, start);
}
