// CPU kernels of score_rewrites_ around the library's fp32 product of a block of rollouts with a tile of the bank.
//
//   rank_own    exact similarities of each rollout to its own anchors (fp64 dot products), and the rollouts' norms
//   rank_tile   one pass over the product: ranks, count, and sum / softmax / maximum of the negatives into the state
//   rank_finish states -> reward terms, group mean and standard deviation, advantages
//
// The rank is exact although the product is fp32: only a similarity within the product's own error bound of the
// threshold can be on the wrong side, and those few (about one in 10^4) are formed again as fp64 dot products. A small
// bank comes as an fp64 product and needs no second look. Work: 2 to 3
// passes over a row of the tile while it is in L1, vectorised by the compiler for several instruction sets.
#include <rime/math.h>
#include <rime/rank_reward.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define RIME_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define RIME_CLONES
#endif

namespace {
using torch::stable::Tensor;
using namespace rime;

constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int64_t kChunk = 1024;  // columns looked at together: 4 KiB, so every pass but the first reads L1

// Sum of x_i y_i in fp64; the order is fixed, so equal vectors give equal bits.
RIME_CLONES double dot(const float* x, const float* y, int64_t n) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  return total;
}

// The loops over a chunk take plain pointers and counts: GCC vectorises a reduction only when its bounds are locals.
// values[j] where it is finite and the mask (null: all) lets it be a negative's, else NaN, which no comparison finds;
// returns how many are left.
RIME_CLONES int32_t clean(const float* __restrict values, const uint8_t* __restrict mask, int64_t n,
                          float* __restrict out) {
  int32_t count = 0;
  if (mask != nullptr) {
    for (int64_t j = 0; j < n; ++j) out[j] = mask[j] != 0 ? values[j] : kNaN;
  } else {
    for (int64_t j = 0; j < n; ++j) out[j] = values[j];
  }
#pragma omp simd reduction(+ : count)
  for (int64_t j = 0; j < n; ++j) {
    const bool finite = std::fabs(out[j]) <= kLargest;
    out[j] = finite ? out[j] : kNaN;
    count += finite ? 1 : 0;
  }
  return count;
}

struct Counts {
  int32_t above, from_low;
};

RIME_CLONES Counts count_above(const float* v, int64_t n, float high, float low) {
  int32_t above = 0, from_low = 0;
#pragma omp simd reduction(+ : above, from_low)
  for (int64_t j = 0; j < n; ++j) {
    above += v[j] > high ? 1 : 0;
    from_low += v[j] >= low ? 1 : 0;
  }
  return {above, from_low};
}

RIME_CLONES double sum(const float* v, int64_t n) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) total += static_cast<double>(v[j] == v[j] ? v[j] : 0.0f);
  return total;
}

RIME_CLONES float maximum(const float* v, int64_t n) {
  float best = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : best)
  for (int64_t j = 0; j < n; ++j) best = v[j] > best ? v[j] : best;
  return best;
}

struct Weights {
  double sum, weighted;
};

RIME_CLONES Weights softmax_weights(const float* v, int64_t n, float peak, float scale) {
  double sum = 0.0, weighted = 0.0;
#pragma omp simd reduction(+ : sum, weighted)
  for (int64_t j = 0; j < n; ++j) {
    const bool negative = v[j] == v[j];
    const float s = negative ? v[j] : 0.0f;
    const float w = negative ? exp32((s - peak) * scale) : 0.0f;
    sum += static_cast<double>(w);
    weighted += static_cast<double>(w) * static_cast<double>(s);
  }
  return {sum, weighted};
}

// A piece of a row of similarities, everything that is not a negative's made NaN, and the vectors they came from.
struct Run {
  const float* values;
  int64_t size;
  const float* row;
  const float* anchors;  // the run's first anchor
  int64_t width;

  double exact(int64_t j) const { return dot(row, anchors + j * width, width); }
};

// 1 for each negative above the threshold and 1/2 for each equal to it.
double count_rank(const Run& run, float threshold, float band) {
  const float high = threshold + band, low = threshold - band;
  const Counts counts = count_above(run.values, run.size, high, low);
  double rank = counts.above;
  for (int64_t j = 0, left = counts.from_low - counts.above; left > 0; ++j) {
    if (!(run.values[j] >= low && run.values[j] <= high)) continue;
    rank += rank_step(static_cast<float>(run.exact(j)), threshold);
    --left;
  }
  return rank;
}

// The exact maximum: whatever the fp32 product puts within its error of the top is formed again.
void add_max(const Run& run, float band, double* state) {
  const float peak = maximum(run.values, run.size);
  if (static_cast<double>(peak) + band < state[1]) return;
  const float low = peak - 2.0f * band;
  for (int64_t j = 0; j < run.size; ++j) {
    if (!(run.values[j] >= low) || static_cast<double>(run.values[j]) + band < state[1]) continue;
    const double exact = run.exact(j);
    if (exact > state[1]) state[1] = exact;
  }
}

void add_softmax(const Run& run, double inverse_tau, double* state) {
  const float peak = maximum(run.values, run.size);
  const Weights found = softmax_weights(run.values, run.size, peak, static_cast<float>(inverse_tau));
  softmax_merge(state, peak, found.sum, found.weighted, inverse_tau);
}

struct Tile {
  const float* sims;
  const float* gen;
  const float* anchors;
  const float* norms;
  const double* own;
  const int64_t* positive;
  const uint8_t* mask;
  double* state;
  float anchor_norm;
  double inverse_tau;
  int64_t columns, width, group_size, positives, first, mask_stride;
  int negative;
};

void add_chunk(const Tile& t, int64_t row, int64_t begin, int64_t size, float band) {
  alignas(64) float values[kChunk];
  const uint8_t* mask = t.mask == nullptr ? nullptr : t.mask + (row / t.group_size) * t.mask_stride + begin;
  const int32_t count = clean(t.sims + row * t.columns + begin, mask, size, values);
  if (count == 0) return;
  const Run run{values, size, t.gen + row * t.width, t.anchors + begin * t.width, t.width};
  double* state = t.state + row * (kRanks + t.positives);
  // Of several own anchors most beat the whole chunk, which one pass for its maximum shows.
  const float peak = t.positives > 1 ? maximum(values, size) : kLargest;
  for (int64_t p = 0; p < t.positives; ++p) {
    const float threshold = static_cast<float>(t.own[row * t.positives + p]);
    if (!(peak < threshold - band)) state[kRanks + p] += count_rank(run, threshold, band);
  }
  state[0] += count;
  if (t.negative == kMean) state[1] += sum(run.values, run.size);
  if (t.negative == kMax) add_max(run, band, state);
  if (t.negative == kSoftmax) add_softmax(run, t.inverse_tau, state);
}

// A row's columns without its own anchors: the part before them and the part behind.
void add_row(const Tile& t, int64_t row) {
  const int64_t item = row / t.group_size;
  const int64_t own_begin = std::min(std::max<int64_t>(t.positive[item] - t.first, 0), t.columns);
  const int64_t own_end = std::min(std::max<int64_t>(t.positive[item] + t.positives - t.first, 0), t.columns);
  const float band = similarity_band(t.width, t.norms[row], t.anchor_norm);
  const int64_t ends[2][2] = {{0, own_begin}, {own_end, t.columns}};
  for (const auto& [begin, end] : ends) {
    if (begin >= end) continue;
    for (int64_t j = begin; j < end; j += kChunk) add_chunk(t, row, j, std::min(kChunk, end - j), band);
  }
}

// The same from an fp64 product, for small banks; plain loops.
void add_row_exact(const Tile& t, const double* sims, int64_t row) {
  double* state = t.state + row * (kRanks + t.positives);
  const int64_t item = row / t.group_size;
  for (int64_t j = 0; j < t.columns; ++j) {
    const int64_t offset = t.first + j - t.positive[item];
    const double s = sims[row * t.columns + j];
    const float rounded = static_cast<float>(s);
    if ((offset >= 0 && offset < t.positives) || !(rounded - rounded == 0.0f)) continue;
    if (t.mask != nullptr && t.mask[item * t.mask_stride + j] == 0) continue;
    for (int64_t p = 0; p < t.positives; ++p)
      state[kRanks + p] += rank_step(rounded, static_cast<float>(t.own[row * t.positives + p]));
    state[0] += 1.0;
    if (t.negative == kMean) state[1] += s;
    if (t.negative == kMax && s > state[1]) state[1] = s;
    if (t.negative == kSoftmax) softmax_merge(state, s, 1.0, s, t.inverse_tau);
  }
}

void rank_own(const Tensor& gen, const Tensor& own_anchors, Tensor own, Tensor norms) {
  const int64_t rows = gen.size(0), width = gen.size(1), positives = own.size(1);
  const int64_t group_size = rows / own_anchors.size(0);
  const float* x = gen.const_data_ptr<float>();
  const float* a = own_anchors.const_data_ptr<float>();
  double* out = own.mutable_data_ptr<double>();
  float* norm = norms.mutable_data_ptr<float>();
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const float* g = x + row * width;
      norm[row] = static_cast<float>(std::sqrt(dot(g, g, width)));
      for (int64_t p = 0; p < positives; ++p)
        out[row * positives + p] = dot(g, a + ((row / group_size) * positives + p) * width, width);
    }
  });
}

void rank_tile(const Tensor& sims, const Tensor& gen, const Tensor& tile, const Tensor& tile_norm,
               const Tensor& norms, const Tensor& own, const Tensor& positive, std::optional<Tensor> mask,
               int64_t first, int64_t negative, double tau, Tensor state) {
  Tile t{};
  t.gen = gen.const_data_ptr<float>();
  t.anchors = tile.const_data_ptr<float>();
  t.norms = norms.const_data_ptr<float>();
  t.own = own.const_data_ptr<double>();
  t.positive = positive.const_data_ptr<int64_t>();
  t.state = state.mutable_data_ptr<double>();
  t.columns = sims.size(1);
  t.width = gen.size(1);
  t.group_size = gen.size(0) / positive.size(0);
  t.positives = own.size(1);
  t.first = first;
  t.negative = static_cast<int>(negative);
  t.inverse_tau = 1.0 / tau;
  if (mask.has_value()) {
    t.mask = reinterpret_cast<const uint8_t*>(mask->const_data_ptr<bool>());
    t.mask_stride = mask->stride(0);
  }
  if (sims.element_size() == sizeof(double)) {
    const double* exact = sims.const_data_ptr<double>();
    torch::stable::parallel_for(0, gen.size(0), 16, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) add_row_exact(t, exact, row);
    });
    return;
  }
  t.sims = sims.const_data_ptr<float>();
  t.anchor_norm = *tile_norm.const_data_ptr<float>();
  torch::stable::parallel_for(0, gen.size(0), 4, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) add_row(t, row);
  });
}

void rank_merge(const Tensor& parts, int64_t negative, double tau, Tensor state) {
  const int64_t n_parts = parts.size(0), rows = parts.size(1), size = parts.size(2);
  const double* from = parts.const_data_ptr<double>();
  double* into = state.mutable_data_ptr<double>();
  for (int64_t part = 0; part < n_parts; ++part)
    for (int64_t row = 0; row < rows; ++row)
      state_merge(into + row * size, from + (part * rows + row) * size, static_cast<int>(negative), size - kRanks,
                  1.0 / tau);
}

// Planes of `out` [12, B, G]: reward, advantage, then TERM_NAMES, of which group_std is the last but one.
constexpr int64_t kPlanes = 12, kAdvantage = 1, kDeviation = 10;

void rank_finish(const Tensor& state, const Tensor& own, const Tensor& format_ok, std::optional<Tensor> lengths,
                 std::optional<Tensor> disc_similarity, int64_t score, int64_t hit_k, int64_t negative, bool normalize,
                 double w_fmt, double w_rank, double w_refine, double w_len, double length_limit, double eps,
                 Tensor out) {
  const RewardSpec spec{w_fmt, w_rank, w_refine, w_len, length_limit, eps,
                        static_cast<int>(score), static_cast<int>(negative), hit_k, normalize};
  const int64_t n_items = format_ok.size(0), group_size = format_ok.size(1), positives = own.size(1);
  const double* states = state.const_data_ptr<double>();
  const double* own_values = own.const_data_ptr<double>();
  const bool* ok = format_ok.const_data_ptr<bool>();
  const double* length = lengths.has_value() ? lengths->const_data_ptr<double>() : nullptr;
  const double* disc = disc_similarity.has_value() ? disc_similarity->const_data_ptr<double>() : nullptr;
  float* planes = out.mutable_data_ptr<float>();
  const int64_t rows = n_items * group_size;
  torch::stable::parallel_for(0, n_items, 16, [&](int64_t begin, int64_t end) {
    std::vector<double> rewards(static_cast<size_t>(group_size));  // the group's, in full precision
    for (int64_t item = begin; item < end; ++item) {
      double sum = 0.0, squares = 0.0;
      for (int64_t g = 0; g < group_size; ++g) {
        const int64_t r = item * group_size + g;
        const RewardTerms t =
            reward_terms(states + r * (kRanks + positives), own_values + r * positives, positives, ok[r],
                         length == nullptr ? nullptr : length + r, disc == nullptr ? nullptr : disc + r, spec);
        const double values[kPlanes] = {t.reward(), 0.0,   t.format,   t.score,    t.refine, t.length,
                                        t.rank,     t.hit, t.positive, t.negative, 0.0,      t.missing ? 1.0 : 0.0};
        for (int64_t plane = 0; plane < kPlanes; ++plane) planes[plane * rows + r] = static_cast<float>(values[plane]);
        rewards[g] = t.reward();
        sum += t.reward();
      }
      const double mean = sum / static_cast<double>(group_size);
      for (const double reward : rewards) squares += (reward - mean) * (reward - mean);
      const double deviation = group_deviation(squares, group_size);
      for (int64_t g = 0; g < group_size; ++g) {
        const int64_t r = item * group_size + g;
        planes[kAdvantage * rows + r] = static_cast<float>(advantage(rewards[g] - mean, deviation, spec));
        planes[kDeviation * rows + r] = static_cast<float>(deviation);
      }
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rime_fast_C, CPU, m) {
  m.impl("rank_own", TORCH_BOX(&rank_own));
  m.impl("rank_tile", TORCH_BOX(&rank_tile));
  m.impl("rank_merge", TORCH_BOX(&rank_merge));
  m.impl("rank_finish", TORCH_BOX(&rank_finish));
}
