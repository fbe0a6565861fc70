// CPU kernels of score_rewrites_.
//
//   rank_own    exact similarities of each rollout to its own anchors (fp64 dot products), and the rollouts' norms
//   rank_scan   rollouts against a bank of anchors, product and statistics in one pass that keeps no similarities
//   rank_tile   ranks, count, and sum / softmax / maximum of the negatives from an fp64 product, for small banks
//   rank_merge  states of disjoint parts of a bank -> one
//   rank_finish states -> reward terms, group mean and standard deviation, advantages
//
// rank_scan: rollouts are packed once into panels of 32, feature by feature; anchors stay as they lie in the bank. A
// task takes four panels and a segment of the bank, block by block: a block's similarities to a panel, at most 24 KiB,
// are used up while they are in L1 (reward_kernels.h). A task owns its states, tasks merge in their order, and which
// tasks there are depends on the shapes alone: the bits are the same for any number of threads. There are enough of
// them to keep threads busy where a few rollouts meet a bank (64 x 4,096 was one task, and had one thread).
//
// The rank is exact although the product is fp32: only a similarity within the product's own error bound of the
// threshold can be on the wrong side, and those few (about one in 10^4) are formed again as fp64 dot products.
#include <rime/reward.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <vector>

namespace rime::reward {
namespace {

constexpr float kLargest = std::numeric_limits<float>::max();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr int kPanel = 32;            // rollouts of a panel
constexpr int64_t kTaskPanels = 4;        // panels of a task: each block of anchors is read from memory once for them
constexpr int64_t kSegment = 512;     // anchors a task has at least
constexpr int64_t kTurn = 64;         // features that are packed at a time: so much of a panel stays in L1
constexpr int64_t kTasks = 64;        // as many as that, more only for more rollouts
constexpr int64_t kSteps = 24;        // a multiple of every kStep (reward_kernels.h)
constexpr int64_t kBlock = 192;       // anchors of a block at most, whole kSteps
constexpr int64_t kBlockFloats = 65536;  // and no more than 256 KiB of them: they stay in L2 for the task's panels

// The exact similarity of two fp32 vectors, one function for all of this file: equal vectors give equal bits.
double exact_dot(const float* x, const float* y, int64_t n);

// Memory that begins with a cache line: a vector load that lies across two of them takes the time of two.
constexpr std::align_val_t kLine{64};
struct FreeLines {
  void operator()(float* p) const { ::operator delete[](p, kLine); }
};
using Lines = std::unique_ptr<float[], FreeLines>;

Lines lines(int64_t count) {
  return Lines(static_cast<float*>(::operator new[](static_cast<size_t>(count) * sizeof(float), kLine)));
}

struct Block {
  const float* anchors;
  int64_t size;
};

// The lanes' thresholds, and what they have gathered so far; the states of rime/reward.h, lane by lane.
struct Panel {
  const float* packed;  // [width][kPanel]
  const float* gen;     // [rows][width]
  const float* norms;
  const double* own;
  int64_t row, rows, width, positives;
  int negative;
  double inverse_tau;
  std::vector<float> high, low;   // [positives][kPanel]
  std::vector<int32_t> above;     // [positives][kPanel]
  std::vector<double> equal;      // [positives][kPanel]: what the exact second look added
  alignas(64) float lowest[kPanel], band[kPanel];
  alignas(64) int32_t count[kPanel] = {};
  alignas(64) double sum[kPanel] = {}, weighted[kPanel] = {}, top[kPanel] = {};

  // Thresholds for anchors of norms up to anchor_norm. A lane without a rollout, or a NaN of its own, is never above.
  void set_bands(float anchor_norm) {
    for (int l = 0; l < kPanel; ++l) {
      band[l] = l < rows ? similarity_band(width, norms[row + l], anchor_norm) : 0.0f;
      lowest[l] = std::numeric_limits<float>::infinity();
      for (int64_t p = 0; p < positives; ++p) {
        const float threshold = l < rows ? static_cast<float>(own[(row + l) * positives + p]) : kNaN;
        high[p * kPanel + l] = threshold + band[l];
        low[p * kPanel + l] = threshold - band[l];
        lowest[l] = std::fmin(lowest[l], low[p * kPanel + l]);
      }
    }
  }

  double exact(const Block& block, int lane, int64_t j) const {
    return exact_dot(gen + (row + lane) * width, block.anchors + j * width, width);
  }

  void add_near(const Block& block, int64_t p, int lane, int64_t j) {
    const float threshold = static_cast<float>(own[(row + lane) * positives + p]);
    equal[p * kPanel + lane] += rank_step(static_cast<float>(exact(block, lane, j)), threshold);
  }

  void write(double* states) const {
    const int64_t size = kRanks + positives;
    for (int64_t l = 0; l < rows; ++l) {
      double* state = states + l * size;
      state[0] = count[l];
      state[1] = negative == kMean ? sum[l] : top[l];
      state[2] = negative == kSoftmax ? sum[l] : 0.0;
      state[3] = weighted[l];
      for (int64_t p = 0; p < positives; ++p) state[kRanks + p] = above[p * kPanel + l] + equal[p * kPanel + l];
    }
  }
};

struct Kernels {
  void (*meet)(Panel&, const Block&, const uint32_t*, float*);
  float (*largest_square)(const float*, int64_t, int64_t);
  double (*exact_dot)(const float*, const float*, int64_t);
};

}  // namespace
}  // namespace rime::reward

#define RIME_KERNELS "reward_kernels.h"
#include "simd.h"

namespace rime::reward {
namespace {

using torch::stable::Tensor;

double exact_dot(const float* x, const float* y, int64_t n) { return RIME_FOR_CPU(kernels).exact_dot(x, y, n); }

struct Scan {
  const float* gen;
  const float* anchors;
  const float* norms;
  const double* own;
  const int64_t* positive;
  const uint8_t* mask;
  const float* packed;
  int64_t rows, columns, width, group_size, positives, first, mask_stride;
  int negative;
  double inverse_tau;
  float largest_norm;
  const Kernels& kernels;
};

// Bit l of open[j]: the block's anchor j may be a negative of the panel's rollout l.
void open_lanes(const Scan& s, const Panel& panel, int64_t begin, int64_t size, uint32_t* open) {
  std::fill(open, open + size, panel.rows == kPanel ? ~0u : (1u << panel.rows) - 1u);
  const int64_t first_item = panel.row / s.group_size, last_item = (panel.row + panel.rows - 1) / s.group_size;
  for (int64_t item = first_item; item <= last_item; ++item) {
    const int64_t from = std::max<int64_t>(item * s.group_size - panel.row, 0);
    const int64_t to = std::min<int64_t>((item + 1) * s.group_size - panel.row, kPanel);
    const uint32_t lanes = (to - from == kPanel ? ~0u : (1u << (to - from)) - 1u) << from;
    if (s.mask != nullptr) {
      const uint8_t* mask = s.mask + item * s.mask_stride + begin;
#pragma omp simd
      for (int64_t j = 0; j < size; ++j) open[j] &= mask[j] != 0 ? ~0u : ~lanes;
    }
    const int64_t own = s.positive[item] - s.first - begin;
    const int64_t own_end = std::min(own + s.positives, size);
    for (int64_t j = std::max<int64_t>(own, 0); j < own_end; ++j) open[j] &= ~lanes;
  }
}

// The largest norm of n finite anchors, each part of them by a thread.
float largest_norm(const float* anchors, int64_t n, int64_t width) {
  constexpr int64_t kPart = 256;
  std::vector<float> norms(static_cast<size_t>((n + kPart - 1) / kPart));
  torch::stable::parallel_for(0, static_cast<int64_t>(norms.size()), 1, [&](int64_t from, int64_t to) {
    for (int64_t part = from; part < to; ++part) {
      const float* first = anchors + part * kPart * width;
      const int64_t size = std::min(kPart, n - part * kPart);
      const float square = RIME_FOR_CPU(kernels).largest_square(first, size, width);
      norms[part] = std::sqrt(square);
      if (square <= kLargest) continue;
      double largest = 0.0;  // past fp32, or an anchor that is not finite: anchor by anchor
      for (int64_t j = 0; j < size; ++j) {
        const double exact = exact_dot(first + j * width, first + j * width, width);
        if (is_finite(exact)) largest = std::max(largest, exact);
      }
      norms[part] = static_cast<float>(std::sqrt(largest));
    }
  });
  return *std::max_element(norms.begin(), norms.end());
}

// The states [rows of the task][kRanks + positives] of up to kTaskPanels panels over one segment.
void run_task(const Scan& s, int64_t first_panel, int64_t begin, int64_t end, double* states) {
  std::vector<Panel> panels;
  for (int64_t row = first_panel * kPanel; row < std::min(s.rows, (first_panel + kTaskPanels) * kPanel); row += kPanel) {
    const size_t slots = static_cast<size_t>(s.positives) * kPanel;
    Panel panel{s.packed + row * s.width, s.gen, s.norms, s.own, row, std::min<int64_t>(kPanel, s.rows - row), s.width,
                s.positives, s.negative, s.inverse_tau, std::vector<float>(slots), std::vector<float>(slots),
                std::vector<int32_t>(slots), std::vector<double>(slots), {}, {}};
    std::fill(panel.top, panel.top + kPanel, -HUGE_VAL);
    panel.set_bands(s.largest_norm);
    panels.push_back(std::move(panel));
  }
  const int64_t room = std::clamp<int64_t>(kBlockFloats / s.width / kSteps * kSteps, kSteps, kBlock);
  const Lines sims = lines(room * kPanel);
  std::vector<uint32_t> open(static_cast<size_t>(room));
  for (int64_t at = begin; at < end; at += room) {
    const Block block{s.anchors + at * s.width, std::min(room, end - at)};
    for (Panel& panel : panels) {
      open_lanes(s, panel, at, block.size, open.data());
      s.kernels.meet(panel, block, open.data(), sims.get());
    }
  }
  for (const Panel& panel : panels) panel.write(states + (panel.row - first_panel * kPanel) * (kRanks + s.positives));
}

// [rows, width] -> [panels][width][kPanel]; lanes without a rollout are 0.
Lines packed(const float* gen, int64_t rows, int64_t width) {
  const int64_t panels = (rows + kPanel - 1) / kPanel;
  Lines out = lines(panels * kPanel * width);
  torch::stable::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t panel = begin; panel < end; ++panel) {
      float* to = out.get() + panel * kPanel * width;
      const int64_t lanes = std::min<int64_t>(kPanel, rows - panel * kPanel);
      if (lanes < kPanel) std::fill(to, to + kPanel * width, 0.0f);
      for (int64_t first = 0; first < width; first += kTurn) {
        const int64_t last = std::min(width, first + kTurn);
        for (int64_t l = 0; l < lanes; ++l) {
          const float* from = gen + (panel * kPanel + l) * width;
          for (int64_t k = first; k < last; ++k) to[k * kPanel + l] = from[k];
        }
      }
    }
  });
  return out;
}

void rank_scan(const Tensor& gen, const Tensor& anchors, const Tensor& norms, const Tensor& own,
               const Tensor& positive, std::optional<Tensor> mask, std::optional<Tensor> norm, int64_t first,
               int64_t negative, double tau, Tensor state) {
  const int64_t rows = gen.size(0), width = gen.size(1), columns = anchors.size(0), positives = own.size(1);
  const Lines panels = packed(gen.const_data_ptr<float>(), rows, width);
  const Scan s{gen.const_data_ptr<float>(),
               anchors.const_data_ptr<float>(),
               norms.const_data_ptr<float>(),
               own.const_data_ptr<double>(),
               positive.const_data_ptr<int64_t>(),
               mask.has_value() ? reinterpret_cast<const uint8_t*>(mask->const_data_ptr<bool>()) : nullptr,
               panels.get(),
               rows,
               columns,
               width,
               rows / positive.size(0),
               positives,
               first,
               mask.has_value() ? mask->stride(0) : 0,
               static_cast<int>(negative),
               1.0 / tau,
               norm.has_value() ? *norm->const_data_ptr<float>()
                                : largest_norm(anchors.const_data_ptr<float>(), columns, width),
               RIME_FOR_CPU(kernels)};
  const int64_t stripe = kTaskPanels * kPanel, stripes = (rows + stripe - 1) / stripe;
  const int64_t wanted = std::max<int64_t>(1, kTasks / stripes);
  const int64_t segments = std::min(wanted, (columns + kSegment - 1) / kSegment);
  const int64_t steps = (columns + kSteps - 1) / kSteps, size = kRanks + positives;
  const int64_t length = (steps + segments - 1) / segments * kSteps;  // whole steps: no slower rest in each task
  std::vector<double> states(static_cast<size_t>(segments * rows * size));
  torch::stable::parallel_for(0, stripes * segments, 1, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const int64_t segment = task / stripes, row = task % stripes * stripe;
      run_task(s, row / kPanel, std::min(columns, segment * length), std::min(columns, (segment + 1) * length),
               states.data() + (segment * rows + row) * size);
    }
  });
  double* into = state.mutable_data_ptr<double>();
  for (int64_t segment = 0; segment < segments; ++segment)
    for (int64_t row = 0; row < rows; ++row)
      state_merge(into + row * size, states.data() + (segment * rows + row) * size, s.negative, positives,
                  s.inverse_tau);
}

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
               int64_t first, int64_t negative, double tau, double /* slack */, Tensor state) {
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

void rank_finish(const Tensor& state, const Tensor& own, const Tensor& format_ok, std::optional<Tensor> lengths,
                 std::optional<Tensor> disc_similarity, int64_t score, int64_t hit_k, int64_t negative, bool normalize,
                 double w_fmt, double w_rank, double w_refine, double w_len, double length_limit, double eps,
                 Tensor out, Tensor rewards_out, Tensor advantages_out) {
  const RewardSpec spec{w_fmt, w_rank, w_refine, w_len, length_limit, eps,
                        static_cast<int>(score), static_cast<int>(negative), hit_k, normalize};
  const int64_t n_items = format_ok.size(0), group_size = format_ok.size(1), positives = own.size(1);
  const double* states = state.const_data_ptr<double>();
  const double* own_values = own.const_data_ptr<double>();
  const bool* ok = format_ok.const_data_ptr<bool>();
  const double* length = lengths.has_value() ? lengths->const_data_ptr<double>() : nullptr;
  const double* disc = disc_similarity.has_value() ? disc_similarity->const_data_ptr<double>() : nullptr;
  float* planes = out.mutable_data_ptr<float>();
  float *rewards_at = rewards_out.mutable_data_ptr<float>(), *advantages_at = advantages_out.mutable_data_ptr<float>();
  const int64_t reward_strides[] = {rewards_out.stride(0), rewards_out.stride(1)};
  const int64_t advantage_strides[] = {advantages_out.stride(0), advantages_out.stride(1)};
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
        double values[kPlanes];
        fill_planes(t, values);
        for (int64_t plane = 0; plane < kPlanes; ++plane) planes[plane * rows + r] = static_cast<float>(values[plane]);
        rewards[g] = t.reward();
        rewards_at[item * reward_strides[0] + g * reward_strides[1]] = static_cast<float>(t.reward());
        sum += t.reward();
      }
      const double mean = sum / static_cast<double>(group_size);
      for (const double reward : rewards) squares += (reward - mean) * (reward - mean);
      const double deviation = group_deviation(squares, group_size);
      for (int64_t g = 0; g < group_size; ++g) {
        const int64_t r = item * group_size + g;
        const auto value = static_cast<float>(advantage(rewards[g] - mean, deviation, spec));
        planes[kAdvantage * rows + r] = value;
        advantages_at[item * advantage_strides[0] + g * advantage_strides[1]] = value;
        planes[kDeviation * rows + r] = static_cast<float>(deviation);
      }
    }
  });
}

}  // namespace
}  // namespace rime::reward

STABLE_TORCH_LIBRARY_IMPL(rime_fast_C, CPU, m) {
  m.impl("rank_own", TORCH_BOX(&rime::reward::rank_own));
  m.impl("rank_scan", TORCH_BOX(&rime::reward::rank_scan));
  m.impl("rank_tile", TORCH_BOX(&rime::reward::rank_tile));
  m.impl("rank_merge", TORCH_BOX(&rime::reward::rank_merge));
  m.impl("rank_finish", TORCH_BOX(&rime::reward::rank_finish));
}
