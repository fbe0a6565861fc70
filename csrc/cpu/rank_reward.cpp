// CPU kernels of score_rewrites_ around the scan of the bank (rank_reward_scan.cpp).
//
//   rank_own    exact similarities of each rollout to its own anchors (fp64 dot products), and the rollouts' norms
//   rank_tile   ranks, count, and sum / softmax / maximum of the negatives from an fp64 product, for small banks
//   rank_merge  states of disjoint parts of a bank -> one
//   rank_finish states -> reward terms, group mean and standard deviation, advantages
#include "rank_reward_dot.h"

#include <rime/rank_reward.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <vector>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define RIME_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define RIME_CLONES
#endif

RIME_CLONES double rime::exact_dot(const float* x, const float* y, int64_t n) {
  double total = 0.0;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  return total;
}

namespace {
using torch::stable::Tensor;
using namespace rime;

struct Tile {
  const double* own;
  const int64_t* positive;
  const uint8_t* mask;
  double* state;
  double inverse_tau;
  int64_t columns, group_size, positives, first, mask_stride;
  int negative;
};

void add_row(const Tile& t, const double* sims, int64_t row) {
  double* state = t.state + row * (kRanks + t.positives);
  const int64_t item = row / t.group_size;
  for (int64_t j = 0; j < t.columns; ++j) {
    const int64_t offset = t.first + j - t.positive[item];
    if (offset >= 0 && offset < t.positives) continue;
    if (t.mask != nullptr && t.mask[item * t.mask_stride + j] == 0) continue;
    state_add(state, t.own + row * t.positives, t.positives, sims[row * t.columns + j], t.negative, t.inverse_tau);
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
      norm[row] = static_cast<float>(std::sqrt(exact_dot(g, g, width)));
      for (int64_t p = 0; p < positives; ++p)
        out[row * positives + p] = exact_dot(g, a + ((row / group_size) * positives + p) * width, width);
    }
  });
}

void rank_tile(const Tensor& sims, const Tensor& gen, const Tensor& /* tile */, const Tensor& /* tile_norm */,
               const Tensor& /* norms */, const Tensor& own, const Tensor& positive, std::optional<Tensor> mask,
               int64_t first, int64_t negative, double tau, Tensor state) {
  Tile t{};
  t.own = own.const_data_ptr<double>();
  t.positive = positive.const_data_ptr<int64_t>();
  t.state = state.mutable_data_ptr<double>();
  t.columns = sims.size(1);
  t.group_size = gen.size(0) / positive.size(0);
  t.positives = own.size(1);
  t.first = first;
  t.negative = static_cast<int>(negative);
  t.inverse_tau = 1.0 / tau;
  if (mask.has_value()) {
    t.mask = reinterpret_cast<const uint8_t*>(mask->const_data_ptr<bool>());
    t.mask_stride = mask->stride(0);
  }
  const double* exact = sims.const_data_ptr<double>();
  torch::stable::parallel_for(0, gen.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) add_row(t, exact, row);
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
