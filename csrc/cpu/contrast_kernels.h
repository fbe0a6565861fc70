// The two passes over a tile of similarities, 16 columns at a time. contrast.cpp includes this file once for each
// instruction set, inside a namespace compiled for it (hence no include guard); the tile's description is Tile there.
//
// statistics: rows i of the tile, columns of one stripe -> partial row maxima and sums (one slot a stripe, merged by
//   the caller in a fixed order, so the bits do not depend on the number of threads), column maxima and sums.
//   Bounded: one sweep, one exponential an element. Otherwise: a sweep for the maxima, one for two exponentials.
// gradient: every element x becomes dloss/dx / (the term's common factor), in place.

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef float F16u __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t I16u __attribute__((vector_size(64), aligned(4), may_alias));

#define RIME_IN static inline __attribute__((always_inline))

RIME_IN F16 fill(float value) { return F16{} + value; }
RIME_IN F16 load(const float* at) { return *reinterpret_cast<const F16u*>(at); }
RIME_IN I16 load(const int32_t* at) { return *reinterpret_cast<const I16u*>(at); }
RIME_IN void store(float* at, F16 value) { *reinterpret_cast<F16u*>(at) = value; }

// exp by 2^n 2^f: n by the rounding of a large addend, f by a polynomial of degree 6 (relative error 2e-7). Below -87
// it is 0, above 88 it stays at exp(88); NaN stays NaN because a comparison with it is false.
RIME_IN F16 exponential(F16 x) {
  F16 y = x < -87.0f ? fill(-87.0f) : x;
  y = y > 88.0f ? fill(88.0f) : y;
  const F16 shifted = y * 1.44269504f + 12582912.0f;
  const F16 n = shifted - 12582912.0f;
  F16 r = y - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  F16 p = fill(1.3981999e-3f);
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666666e-1f;
  p = p * r + 0.5f;
  p = p * r * r + r + 1.0f;
  const F16 scaled = (F16)((I16)p + ((I16)shifted << 23));
  return x < -87.0f ? fill(0.0f) : scaled;
}

RIME_IN float sum_of(F16 v) {
  float total = 0.0f;
  for (int lane = 0; lane < 16; ++lane) total += v[lane];
  return total;
}
RIME_IN float max_of(F16 v) {
  float best = v[0];
  for (int lane = 1; lane < 16; ++lane) best = larger(best, v[lane]);
  return best;
}

// Sixteen elements of a row; past the row's end the hole (logit -inf) stands in.
RIME_IN F16 load_row(const float* row, int64_t left, float hole) {
  if (left >= 16) return load(row);
  F16 v = fill(hole);
  for (int64_t lane = 0; lane < left; ++lane) v[lane] = row[lane];
  return v;
}

template <bool Ids, bool Margin>
struct Masks {
  I16 row, col;
};

template <bool Ids, bool Margin>
RIME_IN Masks<Ids, Margin> masks(const Tile& t, F16 x, int64_t i, int64_t j) {
  Masks<Ids, Margin> m{I16{}, I16{}};
  if constexpr (Ids) m.row = m.col = load(t.col_id + j) == (I16{} + t.row_id[i]);
  if constexpr (Margin) {
    m.row |= x > fill(t.row_limit[i]);
    m.col |= x > load(t.col_limit + j);
  }
  return m;
}

// Lifts the positives of a row out of the tile (for good: nobody reads a tile after its statistics).
RIME_IN void lift(const Tile& t, int64_t i, int64_t j0, int64_t j1) {
  for (int64_t p = i * t.positives; p < (i + 1) * t.positives; ++p) {
    const int64_t own = t.label[p];
    if (own < j0 || own >= j1) continue;
    float* at = t.x + i * t.cols + own;
    t.positive[p] = *at * t.scale;
    *at = t.hole;
  }
}

template <bool Bounded, bool Ids, bool Margin>
RIME_IN void statistics_stripe(const Tile& t, int64_t j0, int64_t j1, Partial* part) {
  const F16 scale = fill(t.scale), low = fill(-INFINITY), zero = fill(0.0f);
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* row = t.x + i * t.cols;
    lift(t, i, j0, j1);
    F16 rival = low, sum = zero;
    for (int64_t j = j0; j < j1; j += 16) {
      const F16 x = load_row(row + j, j1 - j, t.hole), s = x * scale;
      const auto m = masks<Ids, Margin>(t, x, i, j);
      rival = larger(rival, keep(m.row, s, low));
      if constexpr (Bounded) {
        const F16 e = exponential(s);
        sum += keep(m.row, e, zero);
        store(t.col_sum + j, load(t.col_sum + j) + keep(m.col, e, zero));
      } else {
        store(t.col_max + j, larger(load(t.col_max + j), keep(m.col, s, low)));
      }
    }
    part[i].rival = max_of(rival);
    part[i].max = Bounded ? 0.0f : part[i].rival;
    part[i].sum = sum_of(sum);
  }
}

// The second sweep of the unbounded case: sums of exponentials below the stripe's own maxima.
template <bool Ids, bool Margin>
RIME_IN void sums_stripe(const Tile& t, int64_t j0, int64_t j1, Partial* part) {
  const F16 scale = fill(t.scale), zero = fill(0.0f);
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* row = t.x + i * t.cols;
    const float shift = part[i].max == -INFINITY ? 0.0f : part[i].max;  // nothing kept: every exponential is 0
    F16 sum = zero;
    for (int64_t j = j0; j < j1; j += 16) {
      const F16 x = load_row(row + j, j1 - j, t.hole), s = x * scale;
      const auto m = masks<Ids, Margin>(t, x, i, j);
      const F16 best = load(t.col_max + j);
      const F16 base = best == -INFINITY ? zero : best;
      sum += keep(m.row, exponential(s - shift), zero);
      store(t.col_sum + j, load(t.col_sum + j) + keep(m.col, exponential(s - base), zero));
    }
    part[i].sum = sum_of(sum);
  }
}

template <bool Bounded, bool Ids, bool Margin>
RIME_IN void gradient_row(const Tile& t, int64_t i) {
  float* row = t.x + i * t.cols;
  const F16 scale = fill(t.scale), factor = fill(t.factor), a = fill(t.row_coef[i]), shift = fill(t.row_shift[i]);
  auto at = [&](F16 x, int64_t j) __attribute__((always_inline)) {
    const F16 s = x * scale;
    const auto m = masks<Ids, Margin>(t, x, i, j);
    const F16 e = exponential(Bounded ? s : s - shift);
    const F16 f = Bounded ? e : exponential(s - load(t.col_shift + j));
    return slope(e, f, a, load(t.col_coef + j), m.row, m.col) * factor;
  };
  const int64_t whole = t.cols / 16 * 16;
  for (int64_t j = 0; j < whole; j += 16) store(row + j, at(load(row + j), j));
  if (whole < t.cols) {
    const F16 g = at(load_row(row + whole, t.cols - whole, t.hole), whole);
    for (int64_t j = whole; j < t.cols; ++j) row[j] = g[j - whole];
  }
  for (int64_t p = i * t.positives; p < (i + 1) * t.positives; ++p) {
    const int64_t own = t.label[p];
    if (own >= 0 && own < t.cols) row[own] = t.positive_slope[p] * t.factor;
  }
}

template <bool Bounded, bool Ids, bool Margin>
static void statistics(const Tile& t, int64_t j0, int64_t j1, Partial* part) {
  statistics_stripe<Bounded, Ids, Margin>(t, j0, j1, part);
  if constexpr (!Bounded) sums_stripe<Ids, Margin>(t, j0, j1, part);
}

template <bool Bounded, bool Ids, bool Margin>
static void gradient(const Tile& t, int64_t i0, int64_t i1) {
  for (int64_t i = i0; i < i1; ++i) gradient_row<Bounded, Ids, Margin>(t, i);
}

static const Kernels kernels = {
    {statistics<false, false, false>, statistics<false, false, true>, statistics<false, true, false>,
     statistics<false, true, true>, statistics<true, false, false>, statistics<true, false, true>,
     statistics<true, true, false>, statistics<true, true, true>},
    {gradient<false, false, false>, gradient<false, false, true>, gradient<false, true, false>,
     gradient<false, true, true>, gradient<true, false, false>, gradient<true, false, true>,
     gradient<true, true, false>, gradient<true, true, true>},
};

#undef RIME_IN
