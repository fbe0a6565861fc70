// The contrastive loss, element by element: what happens to one similarity of one tile. Shared by the CPU kernels
// (V = Lanes, M = their comparison mask) and the CUDA kernels (V = float, M = bool); written once, tested on the CPU.
//
// One similarity x = q_i . k_j with logit s = x / tau enters two softmaxes, that of its row and that of its column:
//   row_i    = sum_j exp(s_ij - row_shift_i)   over columns that are not masked for the row
//   column_j = sum_i exp(s_ij - col_shift_j)   over rows that are not masked for the column
// A candidate is masked in both when ids are equal, and in one direction when x exceeds that direction's limit (the
// positive's similarity plus the margin). The labelled positive itself never passes through here: kernels lift it out
// of the tile first (a hole of -inf logit, whose exponential is 0) and report its logit; sums are those of its rivals.
// So no mask can hit it, and a loss near 0 keeps its digits: loss = log1p(rivals / exp(positive)), taken in fp64.
//
// When |s| <= 60 for a whole call (BOUNDED in rime_fast/ops/contrastive), both shifts are 0: ONE exponential then serves both directions, and the
// gradient exp(s - row_lse) a + exp(s - col_lse) b becomes exp(s) (a' + b').
//
// Without a guard and in RIME_NAMESPACE, as math.h.
#include <rime/math.h>

namespace RIME_NAMESPACE {

// Larger of the running rival and this logit, NaN ignored (a NaN row is recognised by its sum).
template <class V>
RIME_FN V larger(V running, V logit) {
  return pick(logit > running, logit, running);
}

// Gradient of the loss to one logit, up to the term's factor: both softmaxes' shares.
template <class V, class M>
RIME_FN V slope(V exp_row, V exp_col, V row_coef, V col_coef, M row_masked, M col_masked) {
  return exp_row * pick(row_masked, V{}, row_coef) + exp_col * pick(col_masked, V{}, col_coef);
}

// One thread's share of a tile on CUDA, without anything that needs a GPU: cuda/contrastive_kernels.cuh adds the loads,
// the shuffles and the barriers.
//
// A block of 8 warps takes a patch of 256 rows x 256 columns. A warp takes every eighth row; a lane holds 8 columns (two
// groups of 4, so that a load is 16 bytes and a warp's loads are whole lines) and keeps their running column softmax in
// registers while it walks down its rows. Rows are merged through shuffles, columns through shared memory, patches by
// `accumulate` in fp64: always in the same order, so the bits are always the same.

constexpr float kLargestLogit = 60.0f;  // BOUNDED of rime_fast/ops/contrastive/softmax.py
constexpr int kPatchWarps = 8;
constexpr int kPatchRows = 256;
constexpr int kPatchCols = 256;
constexpr int kLaneCols = 8;

RIME_FN int lane_column(int lane, int c) { return c / 4 * 128 + lane * 4 + c % 4; }

// A softmax's running maximum and its sum of exponentials below it; while `bounded`, a column's maximum stays 0, and a
// row's is its largest rival logit, which the sum does not refer to.
struct Online {
  float top, sum;
};

// One more logit with one exponential: either the sum shrinks and the logit counts 1, or the sum stays.
RIME_FN void add(Online& to, float s) {
  const bool higher = s > to.top;
  const float e = exp32(higher ? to.top - s : s - to.top);
  to.sum = higher ? to.sum * e + 1.0f : to.sum + e;
  to.top = larger(to.top, s);
}

RIME_FN Online join(Online a, Online b) {
  const float top = larger(a.top, b.top);
  const float base = top == -HUGE_VALF ? 0.0f : top;
  return {top, a.sum * exp32(a.top - base) + b.sum * exp32(b.top - base)};
}

// While `bounded` no exponential is needed.
RIME_FN Online add_bounded(Online a, Online b) { return {larger(a.top, b.top), a.sum + b.sum}; }

// Adds (top, sum) of a part to a running (maximum, fp64 sum).
RIME_FN void accumulate(float part_top, double part_sum, float& running_top, double& running_sum) {
  if (part_top > running_top) {
    running_sum = running_top == -HUGE_VALF ? 0.0 * running_sum : running_sum * exp(double(running_top) - part_top);
    running_top = part_top;
  }
  const bool same = part_top == running_top || part_top == -HUGE_VALF;
  running_sum += same ? part_sum : part_sum * exp(double(part_top) - running_top);
}

// What a lane knows of its columns.
struct LaneColumns {
  Online all[kLaneCols];
  int32_t id[kLaneCols];
  float limit[kLaneCols];
};

struct RowMasks {
  int32_t id;
  float limit;
};

// A lane's 8 similarities of one row: adds them to its columns, returns their part of the row. lifted: bit c is set
// where column c is a positive of the row or lies past the end.
template <bool kBounded, bool kIds, bool kMargin>
RIME_FN Online lane_row(const float* x, float scale, unsigned lifted, RowMasks row, LaneColumns& cols) {
  float s[kLaneCols];
  bool out[kLaneCols];
  Online part{-HUGE_VALF, 0.0f};
RIME_UNROLL
  for (int c = 0; c < kLaneCols; ++c) {
    const bool both = (lifted >> c & 1u) || (kIds && row.id == cols.id[c]);
    const bool out_of_col = both || (kMargin && x[c] > cols.limit[c]);
    out[c] = both || (kMargin && x[c] > row.limit);
    s[c] = rounded_product(x[c], scale);
    part.top = larger(part.top, pick(out[c], -HUGE_VALF, s[c]));
    if (kBounded) {  // selections only: a branch an element would cost more than the exponential
      const float e = exp32(pick(both, -HUGE_VALF, s[c]));
      cols.all[c].sum += kMargin ? pick(out_of_col, 0.0f, e) : e;
      part.sum += kMargin ? pick(out[c], 0.0f, e) : e;
    } else if (!out_of_col) {
      add(cols.all[c], s[c]);
    }
  }
  if (!kBounded) {
    const float base = part.top == -HUGE_VALF ? 0.0f : part.top;
RIME_UNROLL
    for (int c = 0; c < kLaneCols; ++c)
      if (!out[c]) part.sum += exp32(s[c] - base);
  }
  return part;
}

// What the gradient needs of a row or of a column.
struct Side {
  float shift, coef, limit;
  int32_t id;
};

// Gradient of the loss to one similarity that is no positive, up to the term's factor. A masked exponential may
// overflow, so it is left out, not multiplied by 0.
template <bool kBounded, bool kIds, bool kMargin>
RIME_FN float lane_slope(float x, float scale, const Side& row, const Side& col) {
  const bool both = kIds && row.id == col.id;
  const bool row_out = both || (kMargin && x > row.limit) || row.coef == 0.0f;
  const bool col_out = both || (kMargin && x > col.limit) || col.coef == 0.0f;
  const float s = rounded_product(x, scale);
  if (kBounded) return exp32(s) * ((row_out ? 0.0f : row.coef) + (col_out ? 0.0f : col.coef));
  return (row_out ? 0.0f : exp32(s - row.shift) * row.coef) + (col_out ? 0.0f : exp32(s - col.shift) * col.coef);
}

}  // namespace RIME_NAMESPACE
