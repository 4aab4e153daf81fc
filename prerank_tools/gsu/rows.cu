// Stored rows made ready for products, and the exact cosines with the latest behaviours.

// Rows in float16 scaled by a power of two to a length in [1/2, 1), exact inverse lengths, and what is left to
// do: `scale` makes such a row a unit row, `loss` is how far rounding moved it. Float16 and int8 lose nothing.
// A zero or non-finite row becomes zeros with inverse length 0. 16 threads a row.
extern "C" __global__ void prepare(
    const raw* rows, half_bits* halves, double* inverse, float* scale, float* loss, int count) {
  const int row = blockIdx.x * (blockDim.x / 16) + threadIdx.x / 16, lane = threadIdx.x % 16;
  const bool real = row < count;
  const raw* x = rows + (i64)(real ? row : 0) * WIDTH;
  const double square = exact_dot(x, x);
  const bool usable = square > 0 && square < 1e300 * 1e8;
  int exponent = 0;
  const double length = usable ? sqrt(square) : 1.0;
  frexp(length, &exponent);
  const double shift = usable ? scalbn(1.0, -exponent) : 0.0;
  double lost = 0;
  for (int d = lane; d < WIDTH; d += 16) {
    const double wanted = usable ? stored(x[d]) * shift : 0.0;
    const half_bits rounded = to_half((float)wanted);
    const double away = (double)half_value(rounded) - wanted;
    lost += away * away;
    if (real) halves[(i64)row * WIDTH + d] = rounded;
  }
  lost = add_lanes(lost);
  if (real && lane == 0) {
    inverse[row] = usable ? 1.0 / length : 0.0;
    scale[row] = usable ? (float)(1.0 / (length * shift)) : 0.0f;
    loss[row] = usable ? (float)(sqrt(lost) / (length * shift) * 1.000001) : 0.0f;
  }
}

// Exact cosines of each candidate with the latest behaviours it sees, newest first, -1.1 for none.
// 16 threads a candidate and behaviour.
extern "C" __global__ void latest(
    const raw* candidates, const raw* histories, const double* inverse_m, const double* inverse_n,
    const int* group, const i64* offset, const int* visible, float* sims, int rows, int recent) {
  const i64 pair = (i64)blockIdx.x * (blockDim.x / 16) + threadIdx.x / 16;
  const bool real = pair < (i64)rows * recent;
  const int row = real ? pair / recent : 0, back = real ? pair % recent : 0;
  const i64 base = offset[group[row]];
  const bool seen = real && back < visible[row];
  const i64 at = seen ? base + visible[row] - 1 - back : base;
  double sim = 0;
  const double dot = exact_dot(histories + (seen ? at : 0) * WIDTH, candidates + (i64)row * WIDTH);
  if (seen && inverse_m[row] > 0 && inverse_n[at] > 0) sim = dot * inverse_m[row] * inverse_n[at];
  if (real && threadIdx.x % 16 == 0) sims[pair] = sim != 0 ? (float)sim : -1.1f;
}
