// The two passes over a tile of similarities, Lanes of columns at a time. contrastive.cpp has simd.h compile this file
// once for each instruction set; the tile's description is contrastive::Tile there.
//
// statistics: rows i of the tile, columns of one stripe -> partial row maxima and sums (one slot a stripe, merged by
//   the caller in a fixed order, so the bits do not depend on the number of threads), column maxima and sums.
//   Bounded: one sweep, one exponential an element. Otherwise: a sweep for the maxima, one for two exponentials.
// gradient: every element x becomes dloss/dx / (the term's common factor), in place.
#include <rime/contrastive.h>

namespace RIME_NAMESPACE {
namespace {

using contrastive::StripePart;
using contrastive::Tile;

template <bool Ids, bool Margin>
struct Masks {
  LaneBits row, col;
};

template <bool Ids, bool Margin>
RIME_FN Masks<Ids, Margin> masks(const Tile& t, Lanes x, int64_t i, int64_t j) {
  Masks<Ids, Margin> m{LaneBits{}, LaneBits{}};
  if constexpr (Ids) m.row = m.col = load_lanes(t.col_id + j) == (LaneBits{} + t.row_id[i]);
  if constexpr (Margin) {
    m.row |= x > fill(t.row_limit[i]);
    m.col |= x > load_lanes(t.col_limit + j);
  }
  return m;
}

// Lifts the positives of a row out of the tile (for good: nobody reads a tile after its statistics).
RIME_FN void lift(const Tile& t, int64_t i, int64_t j0, int64_t j1) {
  for (int64_t p = i * t.positives; p < (i + 1) * t.positives; ++p) {
    const int64_t own = t.label[p];
    if (own < j0 || own >= j1) continue;
    float* at = t.x + i * t.cols + own;
    t.positive[p] = *at * t.scale;
    *at = t.hole;
  }
}

template <bool Bounded, bool Ids, bool Margin>
RIME_FN void statistics_stripe(const Tile& t, int64_t j0, int64_t j1, StripePart* part) {
  const Lanes scale = fill(t.scale), low = fill(-INFINITY), zero = fill(0.0f);
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* row = t.x + i * t.cols;
    lift(t, i, j0, j1);
    Lanes rival = low, sum = zero;
    for (int64_t j = j0; j < j1; j += kLanes) {
      const Lanes x = load_lanes(row + j, j1 - j, t.hole), s = x * scale;
      const auto m = masks<Ids, Margin>(t, x, i, j);
      rival = larger(rival, pick(m.row, low, s));
      if constexpr (Bounded) {
        const Lanes e = exp32(s);
        sum += pick(m.row, zero, e);
        store_lanes(t.col_sum + j, load_lanes(t.col_sum + j) + pick(m.col, zero, e));
      } else {
        store_lanes(t.col_max + j, larger(load_lanes(t.col_max + j), pick(m.col, low, s)));
      }
    }
    part[i].rival = lane_max(rival);
    part[i].max = Bounded ? 0.0f : part[i].rival;
    part[i].sum = lane_sum(sum);
  }
}

// The second sweep of the unbounded case: sums of exponentials below the stripe's own maxima.
template <bool Ids, bool Margin>
RIME_FN void sums_stripe(const Tile& t, int64_t j0, int64_t j1, StripePart* part) {
  const Lanes scale = fill(t.scale), zero = fill(0.0f);
  for (int64_t i = 0; i < t.rows; ++i) {
    const float* row = t.x + i * t.cols;
    const float shift = part[i].max == -INFINITY ? 0.0f : part[i].max;  // nothing kept: every exponential is 0
    Lanes sum = zero;
    for (int64_t j = j0; j < j1; j += kLanes) {
      const Lanes x = load_lanes(row + j, j1 - j, t.hole), s = x * scale;
      const auto m = masks<Ids, Margin>(t, x, i, j);
      const Lanes best = load_lanes(t.col_max + j);
      const Lanes base = best == -INFINITY ? zero : best;
      sum += pick(m.row, zero, exp32(s - shift));
      store_lanes(t.col_sum + j, load_lanes(t.col_sum + j) + pick(m.col, zero, exp32(s - base)));
    }
    part[i].sum = lane_sum(sum);
  }
}

template <bool Bounded, bool Ids, bool Margin>
RIME_FN void gradient_row(const Tile& t, int64_t i) {
  float* row = t.x + i * t.cols;
  const Lanes scale = fill(t.scale), factor = fill(t.factor), a = fill(t.row_coef[i]), shift = fill(t.row_shift[i]);
  auto at = [&](Lanes x, int64_t j) __attribute__((always_inline)) {
    const Lanes s = x * scale;
    const auto m = masks<Ids, Margin>(t, x, i, j);
    const Lanes e = exp32(Bounded ? s : s - shift);
    const Lanes f = Bounded ? e : exp32(s - load_lanes(t.col_shift + j));
    return slope(e, f, a, load_lanes(t.col_coef + j), m.row, m.col) * factor;
  };
  const int64_t whole = t.cols / kLanes * kLanes;
  for (int64_t j = 0; j < whole; j += kLanes) store_lanes(row + j, at(load_lanes(row + j), j));
  if (whole < t.cols) {
    const Lanes g = at(load_lanes(row + whole, t.cols - whole, t.hole), whole);
    for (int64_t j = whole; j < t.cols; ++j) row[j] = g[j - whole];
  }
  for (int64_t p = i * t.positives; p < (i + 1) * t.positives; ++p) {
    const int64_t own = t.label[p];
    if (own >= 0 && own < t.cols) row[own] = t.positive_slope[p] * t.factor;
  }
}

template <bool Bounded, bool Ids, bool Margin>
void statistics(const Tile& t, int64_t j0, int64_t j1, StripePart* part) {
  statistics_stripe<Bounded, Ids, Margin>(t, j0, j1, part);
  if constexpr (!Bounded) sums_stripe<Ids, Margin>(t, j0, j1, part);
}

template <bool Bounded, bool Ids, bool Margin>
void gradient(const Tile& t, int64_t i0, int64_t i1) {
  for (int64_t i = i0; i < i1; ++i) gradient_row<Bounded, Ids, Margin>(t, i);
}

constexpr contrastive::Kernels kernels = {
    {statistics<false, false, false>, statistics<false, false, true>, statistics<false, true, false>,
     statistics<false, true, true>, statistics<true, false, false>, statistics<true, false, true>,
     statistics<true, true, false>, statistics<true, true, true>},
    {gradient<false, false, false>, gradient<false, false, true>, gradient<false, true, false>,
     gradient<false, true, true>, gradient<true, false, false>, gradient<true, false, true>,
     gradient<true, true, false>, gradient<true, true, true>},
};

}  // namespace
}  // namespace RIME_NAMESPACE
