// The two passes over a tile of similarities, Lanes of columns at a time. contrastive.cpp has simd.h compile this file
// once for each instruction set; the tile's description is contrastive::Tile there.
//
// statistics: rows i of the tile, columns of one stripe -> partial row maxima and sums (one slot a stripe, merged by
//   the caller in a fixed order, so the bits do not depend on the number of threads), column maxima and sums.
//   Bounded: one sweep, one exponential an element. Otherwise: a sweep for the maxima, one for two exponentials.
// gradient: every element x becomes dloss/dx / (the term's common factor), in place.
// Nested widths: the same over partial products, whose sums are the similarities of every width, all widths in one pass;
//   `prefix` writes these similarities where the statistics need two sweeps.
#include <rime/contrastive.h>

namespace RIME_NAMESPACE {
namespace {

using contrastive::Nested;
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
      const Lanes x = load_lanes(row + j, j1 - j, t.hole), s = rounded_product(x, scale);
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
      const Lanes x = load_lanes(row + j, j1 - j, t.hole), s = rounded_product(x, scale);
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
    const Lanes s = rounded_product(x, scale);
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

// Nested widths. x_w of columns j0 .. j1 - 1 of row i <- (x_0 + .. + x_w) a_w b_w. sum: room for a tile's columns.
void prefix(const Nested& n, int64_t i, int64_t j0, int64_t j1, float* sum) {
  for (int64_t w = 0; w < n.widths; ++w) {
    float* row = n.tile[w].x + i * n.tile[w].cols;
    const float* b = n.col_norm[w];
    const Lanes a = fill(n.row_norm[w][i]);
    for (int64_t j = j0; j < j1; j += kLanes) {
      Lanes x = load_lanes(row + j, j1 - j, 0.0f);
      if (w > 0) x += load_lanes(sum + j);
      store_lanes(sum + j, x);
      store_lanes(row + j, j1 - j, x * (load_lanes(b + j) * a));  // as the gradients multiply
    }
  }
}

// Takes a positive out of row i's products: `hole` in the narrowest makes all widths' exponentials 0. Its similarity at
// each width goes into `x`.
RIME_FN void lift_nested(const Nested& n, int64_t i, int64_t own, float hole, float* x) {
  float sum = 0.0f;
  for (int64_t w = 0; w < n.widths; ++w) {
    sum += n.tile[w].x[i * n.tile[w].cols + own];
    x[w] = sum * (n.col_norm[w][own] * n.row_norm[w][i]);
  }
  n.tile[0].x[i * n.tile[0].cols + own] = hole;
}

// Calls step(j, true) for whole vectors of columns j0 .. j1 - 1, step(j, false) for the rest.
template <class Step>
RIME_FN void over_lanes(int64_t j0, int64_t j1, Step step) {
  int64_t j = j0;
  for (; j + kLanes <= j1; j += kLanes) step(j, std::true_type{});
  if (j < j1) step(j, std::false_type{});
}

// The bounded statistics of all widths of a stripe in one pass.
template <bool Ids, bool Margin>
void nested_stripe(const Nested& n, int64_t j0, int64_t j1, StripePart* part) {
  const Tile& first = n.tile[0];
  const Lanes scale = fill(first.scale), low = fill(-INFINITY), zero = fill(0.0f);
  float lifted[contrastive::kMostWidths];
  for (int64_t i = 0; i < first.rows; ++i) {
    for (int64_t p = i * first.positives; p < (i + 1) * first.positives; ++p) {
      if (first.label[p] < j0 || first.label[p] >= j1) continue;
      lift_nested(n, i, first.label[p], first.hole, lifted);
      for (int64_t w = 0; w < n.widths; ++w) n.tile[w].positive[p] = lifted[w] * first.scale;
    }
    float running[contrastive::kStripe];
    for (int64_t w = 0; w < n.widths; ++w) {
      const Tile& t = n.tile[w];
      const float *row = t.x + i * t.cols, *norm = n.col_norm[w];
      const Lanes a = fill(n.row_norm[w][i]);
      Lanes rival = low, sum = zero;
      over_lanes(j0, j1, [&](int64_t j, auto whole) __attribute__((always_inline)) {
        __builtin_prefetch(row + j + 2 * t.cols);  // a stripe's rows lie on pages of their own
        Lanes total = whole ? load_lanes(row + j) : load_lanes(row + j, j1 - j, w == 0 ? first.hole : 0.0f);
        if (w > 0) total += load_lanes(running + j - j0);
        store_lanes(running + j - j0, total);
        const Lanes x = total * (load_lanes(norm + j) * a), s = rounded_product(x, scale);
        const auto m = masks<Ids, Margin>(t, x, i, j);
        const Lanes e = exp32(s), before = load_lanes(t.col_sum + j);
        if constexpr (Ids || Margin) {
          rival = larger(rival, pick(m.row, low, s));
          sum += pick(m.row, zero, e);
          store_lanes(t.col_sum + j, before + pick(m.col, zero, e));
        } else {
          rival = larger(rival, s);
          sum += e;
          store_lanes(t.col_sum + j, before + e);
        }
      });
      part[w * n.stride + i] = {0.0f, lane_sum(sum), lane_max(rival)};
    }
  }
}

// Row i's partial products become the gradients to themselves, suffix sums included; sum G S of the inner widths goes to
// `by_row` and is added to `by_col`. lifted: room for positives x widths. The columns' coefficients hold the factor.
template <bool Bounded, bool Ids, bool Margin>
void nested_gradient(const Nested& n, int64_t i, float* by_row, float* const* by_col, float* lifted) {
  const Tile& first = n.tile[0];
  const int64_t cols = first.cols, inner = n.widths - 1, place = i * first.positives;
  const Lanes scale = fill(first.scale), zero = fill(0.0f);
  const float hole = first.scale < 0 ? 1e10f : -1e10f;  // finite: 0 exponentials times it are 0
  for (int64_t p = 0; p < first.positives; ++p) {
    const int64_t own = first.label[place + p];
    if (own >= 0 && own < cols) lift_nested(n, i, own, hole, lifted + p * n.widths);
  }
  float* row[contrastive::kMostWidths];
  for (int64_t w = 0; w < n.widths; ++w) row[w] = n.tile[w].x + i * cols;
  std::fill(by_row, by_row + inner, 0.0f);
  for (int64_t j0 = 0; j0 < cols; j0 += contrastive::kStripe) {
    const int64_t j1 = std::min(cols, j0 + contrastive::kStripe);
    float running[contrastive::kStripe];
    for (int64_t w = 0; w < n.widths; ++w) {
      const Tile& t = n.tile[w];
      const float* norm = n.col_norm[w];
      float *own = row[w], *sums = by_col[w];
      const Lanes left = fill(n.row_norm[w][i]), coef = fill(t.row_coef[i] * t.factor);
      Lanes product = zero;
      over_lanes(j0, j1, [&](int64_t j, auto whole) __attribute__((always_inline)) {
        __builtin_prefetch(own + j + cols, 1);  // the next row's page, which hardware does not foresee
        Lanes total = whole ? load_lanes(own + j) : load_lanes(own + j, j1 - j, w == 0 ? hole : 0.0f);
        if (w > 0) total += load_lanes(running + j - j0);
        store_lanes(running + j - j0, total);
        const Lanes norms = load_lanes(norm + j) * left, x = total * norms, s = rounded_product(x, scale);
        const auto m = masks<Ids, Margin>(t, x, i, j);
        Lanes a = coef, c = load_lanes(t.col_coef + j), g;
        if constexpr (Ids || Margin) a = pick(m.row, zero, a), c = pick(m.col, zero, c);
        if constexpr (Bounded)
          g = exp32(s) * (a + c);
        else
          g = exp32(s - t.row_shift[i]) * a + exp32(s - load_lanes(t.col_shift + j)) * c;
        if (w < inner) {  // the widest's own norms are 1
          const Lanes y = g * x;
          product += y;
          store_lanes(sums + j, load_lanes(sums + j) + y);
          g *= norms;
        }
        whole ? store_lanes(own + j, g) : store_lanes(own + j, j1 - j, g);
      });
      if (w < inner) by_row[w] += lane_sum(product);
    }
    for (int64_t w = inner; w > 0; --w) {
      const float* from = row[w];
      float* into = row[w - 1];
      over_lanes(j0, j1, [&](int64_t j, auto whole) __attribute__((always_inline)) {
        if (whole)
          store_lanes(into + j, load_lanes(into + j) + load_lanes(from + j));
        else
          store_lanes(into + j, j1 - j, load_lanes(into + j, j1 - j, 0.0f) + load_lanes(from + j, j1 - j, 0.0f));
      });
    }
  }
  for (int64_t p = 0; p < first.positives; ++p) {
    const int64_t own = first.label[place + p];
    if (own < 0 || own >= cols) continue;
    float suffix = 0.0f;
    for (int64_t w = inner; w >= 0; --w) {
      const Tile& t = n.tile[w];
      const float slope_here = t.positive_slope[place + p] * t.factor;
      if (w < inner) {
        const float y = slope_here * lifted[p * n.widths + w];
        by_row[w] += y;
        by_col[w][own] += y;
      }
      suffix += slope_here * n.row_norm[w][i] * n.col_norm[w][own];
      row[w][own] = suffix;
    }
  }
}

constexpr contrastive::Kernels kernels = {
    {statistics<false, false, false>, statistics<false, false, true>, statistics<false, true, false>,
     statistics<false, true, true>, statistics<true, false, false>, statistics<true, false, true>,
     statistics<true, true, false>, statistics<true, true, true>},
    {gradient<false, false, false>, gradient<false, false, true>, gradient<false, true, false>,
     gradient<false, true, true>, gradient<true, false, false>, gradient<true, false, true>,
     gradient<true, true, false>, gradient<true, true, true>},
    prefix,
    {nested_stripe<false, false>, nested_stripe<false, true>, nested_stripe<true, false>, nested_stripe<true, true>},
    {nested_gradient<false, false, false>, nested_gradient<false, false, true>, nested_gradient<false, true, false>,
     nested_gradient<false, true, true>, nested_gradient<true, false, false>, nested_gradient<true, false, true>,
     nested_gradient<true, true, false>, nested_gradient<true, true, true>},
};

}  // namespace
}  // namespace RIME_NAMESPACE
