// The reward's device code. Included by reward.cu, and by tests/ops/reward_on_host.cpp, which runs it on the CPU.
#pragma once
#include <rime/reward.h>

#include "common.cuh"

namespace rime::reward {
namespace {

constexpr int kThreads = 256;
constexpr float kLargest = 3.402823466e38f;

struct Larger {
  __device__ double operator()(double a, double b) const { return a > b ? a : b; }
};

// fp32, bf16, fp16, fp64, int64 or int32 numbers in memory.
enum Kind : int { kFloat = 0, kBrain = 1, kHalf = 2, kDouble = 3, kLong = 4, kInt = 5 };

struct Numbers {
  const void* data;
  int kind;

  __device__ double operator[](int64_t i) const {
    if (kind == kFloat) return static_cast<const float*>(data)[i];
    if (kind == kBrain) return as_bits<float>(static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16);
    if (kind == kHalf) return from_half(static_cast<const uint16_t*>(data)[i]);
    if (kind == kDouble) return static_cast<const double*>(data)[i];
    if (kind == kLong) return static_cast<double>(static_cast<const int64_t*>(data)[i]);
    return static_cast<double>(static_cast<const int32_t*>(data)[i]);
  }

  // Sum of x_i y_i over every kWarp-th feature from this lane's on, y from `start`, four in flight; kind known at once.
  template <class T, class F>
  __device__ static double part(const float* x, const T* y, int64_t n, F wide) {
    double sums[4] = {};
    int64_t i = threadIdx.x % kWarp;
    for (; i + 3 * kWarp < n; i += 4 * kWarp)
RIME_UNROLL
      for (int t = 0; t < 4; ++t) sums[t] += static_cast<double>(x[i + t * kWarp]) * wide(y[i + t * kWarp]);
    for (; i < n; i += kWarp) sums[0] += static_cast<double>(x[i]) * wide(y[i]);
    return (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }

  __device__ double part(const float* x, int64_t start, int64_t n) const {
    if (kind == kFloat)
      return part(x, static_cast<const float*>(data) + start, n, [](float v) { return static_cast<double>(v); });
    const auto* bits = static_cast<const uint16_t*>(data) + start;  // a tile is fp32, bf16 or fp16
    if (kind == kBrain)
      return part(x, bits, n, [](uint16_t v) {
        return static_cast<double>(as_bits<float>(static_cast<uint32_t>(v) << 16));
      });
    return part(x, bits, n, [](uint16_t v) { return static_cast<double>(from_half(v)); });
  }

  __device__ static float from_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, power = (half >> 10) & 31u, rest = half & 0x3ffu;
    if (power == 0) return (sign != 0 ? -0x1p-24f : 0x1p-24f) * static_cast<float>(rest);
    return as_bits<float>(sign | (power == 31 ? 0x7f800000u : (power + 112) << 23) | rest << 13);
  }
};

// Sum of x_i y_i in fp64 by one warp, on every lane; y begins at `start`.
__device__ double warp_dot(const float* x, const Numbers& y, int64_t start, int64_t n) {
  return warp_reduce(y.part(x, start, n), Add{});
}

__global__ void own_kernel(const float* gen, const float* own_anchors, double* own, float* norms, int64_t rows,
                           int64_t group_size, int64_t positives, int64_t width) {
  const int64_t task = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (task >= rows * (positives + 1)) return;
  const int64_t row = task / (positives + 1), p = task % (positives + 1);
  const float* g = gen + row * width;
  const bool is_norm = p == positives;
  const Numbers other{is_norm ? g : own_anchors + ((row / group_size) * positives + p) * width, kFloat};
  const double value = warp_dot(g, other, 0, width);
  if (threadIdx.x % kWarp != 0) return;
  if (is_norm)
    norms[row] = static_cast<float>(sqrt(value));
  else
    own[row * positives + p] = value;
}

struct Tile {
  const float* gen;
  Numbers anchors;
  const float* anchor_norm;
  const float* norms;
  const double* own;
  const int64_t* positive;
  const bool* mask;
  double* state;
  int64_t columns, width, group_size, positives, first, mask_stride;
  double inverse_tau;
};

// One row of the tile as its block sees it.
template <class S>
struct Row {
  const Tile& t;
  const S* sims;
  const bool* mask;
  int64_t row, own_begin;
  float band;

  // The similarity where column j is a negative's, else NaN, which no comparison finds.
  __device__ S value(int64_t j) const {
    if (j >= t.columns || (j >= own_begin && j < own_begin + t.positives)) return NAN;
    const S v = sims[j];
    const bool finite = fabsf(static_cast<float>(v)) <= kLargest;
    return finite && (mask == nullptr || mask[j]) ? v : static_cast<S>(NAN);
  }

  // f(exact similarity) for every lane's column that `wanted` picks, a warp to a column; lane 0 acts.
  template <class F>
  __device__ void exact(bool wanted, int64_t j, F f) const {
    unsigned left = __ballot_sync(kAll, wanted);
    while (left != 0) {
      const int lane = __ffs(left) - 1;
      left &= left - 1;
      const int64_t column = __shfl_sync(kAll, j, lane);
      f(warp_dot(t.gen + row * t.width, t.anchors, column * t.width, t.width));
    }
  }
};

constexpr int kAhead = 8;  // columns that a thread has in flight

// What one sweep over a row finds: what it adds to the rank against a threshold; count, sum and maximum of its negatives.
struct Found {
  double rank, count, sum, best;
};

template <class S>
__device__ Found sweep(const Row<S>& row, float threshold) {
  const float high = threshold + row.band, low = threshold - row.band;
  const bool leader = threadIdx.x % kWarp == 0;
  double rank = 0.0, sum = 0.0;
  int above = 0, count = 0;
  S best = static_cast<S>(-HUGE_VAL);
  for (int64_t base = 0; base < row.t.columns; base += kThreads * kAhead) {
    S v[kAhead];
    bool close = false;
RIME_UNROLL
    for (int i = 0; i < kAhead; ++i) v[i] = row.value(base + i * kThreads + threadIdx.x);
RIME_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const bool counts = v[i] == v[i];
      count += counts;
      sum += counts ? static_cast<double>(v[i]) : 0.0;
      best = v[i] > best ? v[i] : best;
      if constexpr (sizeof(S) == sizeof(double)) {
        rank += counts ? rank_step(static_cast<float>(v[i]), threshold) : 0.0;
      } else {
        above += v[i] > high;
        close = close || (v[i] >= low && v[i] <= high);
      }
    }
    if constexpr (sizeof(S) == sizeof(float)) {
      if (__ballot_sync(kAll, close) == 0) continue;
      for (int i = 0; i < kAhead; ++i)
        row.exact(v[i] >= low && v[i] <= high, base + i * kThreads + threadIdx.x, [&](double s) {
          if (leader) rank += rank_step(static_cast<float>(s), threshold);
        });
    }
  }
  return {block_reduce<kThreads>(rank + above, Add{}), block_reduce<kThreads>(static_cast<double>(count), Add{}),
          block_reduce<kThreads>(sum, Add{}), block_reduce<kThreads>(static_cast<double>(best), Larger{})};
}

template <class S>
__device__ void add_max(const Row<S>& row, const Found& found, double* state) {
  double best = found.best;
  if (found.count == 0.0) return;
  if constexpr (sizeof(S) == sizeof(float)) {
    const double low = best - 2.0 * row.band;
    best = -HUGE_VAL;
    for (int64_t base = 0; base < row.t.columns; base += kThreads) {
      const int64_t j = base + threadIdx.x;
      row.exact(row.value(j) >= low, j, [&](double s) { best = s > best ? s : best; });
    }
    best = block_reduce<kThreads>(best, Larger{});
  }
  if (threadIdx.x == 0) {
    state[0] += found.count;
    if (best > state[1]) state[1] = best;
  }
}

template <class S>
__device__ void add_softmax(const Row<S>& row, const Found& found, double* state) {
  double weight = 0.0, weighted = 0.0;
  const double peak = found.best;
  if (found.count == 0.0) return;
  for (int64_t j = threadIdx.x; j < row.t.columns; j += kThreads) {
    const S v = row.value(j);
    if (!(v == v)) continue;
    const double w = static_cast<double>(expf(static_cast<float>((v - peak) * row.t.inverse_tau)));
    weight += w;
    weighted += w * static_cast<double>(v);
  }
  weight = block_reduce<kThreads>(weight, Add{});
  weighted = block_reduce<kThreads>(weighted, Add{});
  if (threadIdx.x == 0) {
    state[0] += found.count;
    softmax_merge(state, peak, weight, weighted, row.t.inverse_tau);
  }
}

template <class S, int kNegative>
__global__ void __launch_bounds__(kThreads, 1) tile_kernel(Tile t, const S* sims) {
  const int64_t row = blockIdx.x, item = row / t.group_size;
  double* state = t.state + row * (kRanks + t.positives);
  const Row<S> view{t,
                    sims + row * t.columns,
                    t.mask == nullptr ? nullptr : t.mask + item * t.mask_stride,
                    row,
                    t.positive[item] - t.first,
                    similarity_band(t.width, t.norms[row], *t.anchor_norm)};
  Found found{};
  for (int64_t p = 0; p < t.positives; ++p) {
    found = sweep(view, static_cast<float>(t.own[row * t.positives + p]));
    if (threadIdx.x == 0) state[kRanks + p] += found.rank;
  }
  if constexpr (kNegative == kMean) {
    if (threadIdx.x == 0) {
      state[0] += found.count;
      state[1] += found.sum;
    }
  }
  if constexpr (kNegative == kMax) add_max(view, found, state);
  if constexpr (kNegative == kSoftmax) add_softmax(view, found, state);
}

__global__ void merge_kernel(const double* parts, double* state, int64_t n_parts, int64_t rows, int64_t size,
                             int negative, double inverse_tau) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  for (int64_t part = 0; part < n_parts; ++part)
    state_merge(state + row * size, parts + (part * rows + row) * size, negative, size - kRanks, inverse_tau);
}

struct Finish {
  const double* states;
  const double* own;
  const bool* format_ok;
  const double* lengths;
  const double* disc;
  float* out;
  int64_t rows, group_size, positives;
};

__device__ RewardTerms terms_of(const Finish& f, const RewardSpec& spec, int64_t r) {
  return reward_terms(f.states + r * (kRanks + f.positives), f.own + r * f.positives, f.positives, f.format_ok[r],
                      f.lengths == nullptr ? nullptr : f.lengths + r, f.disc == nullptr ? nullptr : f.disc + r, spec);
}

__global__ void __launch_bounds__(kThreads, 1) finish_kernel(Finish f, RewardSpec spec) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * f.group_size, end = begin + f.group_size;
  double sum = 0.0, squares = 0.0;
  for (int64_t r = begin + threadIdx.x; r < end; r += kThreads) {
    const RewardTerms t = terms_of(f, spec, r);
    double values[kPlanes];
    fill_planes(t, values);
    for (int plane = 0; plane < kPlanes; ++plane) f.out[plane * f.rows + r] = static_cast<float>(values[plane]);
    sum += t.reward();
  }
  const double mean = block_reduce<kThreads>(sum, Add{}) / static_cast<double>(f.group_size);
  for (int64_t r = begin + threadIdx.x; r < end; r += kThreads) {
    const double centred = terms_of(f, spec, r).reward() - mean;
    squares += centred * centred;
  }
  const double deviation = group_deviation(block_reduce<kThreads>(squares, Add{}), f.group_size);
  for (int64_t r = begin + threadIdx.x; r < end; r += kThreads) {
    f.out[kAdvantage * f.rows + r] = static_cast<float>(advantage(terms_of(f, spec, r).reward() - mean, deviation, spec));
    f.out[kDeviation * f.rows + r] = static_cast<float>(deviation);
  }
}

// A whole call over a bank of one tile; lengths.data, disc.data, mask and terms may be null.
struct Small {
  Numbers gen, anchors, lengths, disc;
  const int64_t* positive;
  const bool* mask;
  const bool* format_ok;
  float *rewards, *advantages;  // [B, G] with these strides
  float* terms;                 // [12, B, G]
  int64_t reward_strides[2], advantage_strides[2];
  int64_t items, group_size, columns, width, positives, mask_stride;
  int negative;
  double inverse_tau;
};

constexpr int kTogether = 8;  // rollouts that meet an anchor's features once they are read
constexpr int kWarps = kThreads / kWarp;

// Exact similarities of `count` <= kTogether rollouts [count][width] to one anchor by one warp; lane t returns the t-th.
__device__ double similarities(const double* rows, int count, const Numbers& anchors, int64_t start, int64_t width) {
  const int lane = threadIdx.x % kWarp;
  double sums[kTogether] = {};
  for (int64_t k = lane; k < width; k += kWarp) {
    const double feature = anchors[start + k];
RIME_UNROLL
    for (int t = 0; t < kTogether; ++t) sums[t] = fma(rows[(t < count ? t : 0) * width + k], feature, sums[t]);
  }
  double mine = 0.0;
RIME_UNROLL
  for (int t = 0; t < kTogether; ++t) {
    sums[t] = warp_reduce(sums[t], Add{});
    mine = lane == t ? sums[t] : mine;
  }
  return mine;
}

// Numbers of fp64 that small_kernel keeps in shared memory: rollouts, own similarities, states of every warp, rewards.
__host__ __device__ inline int64_t small_room(int64_t group_size, int64_t width, int64_t positives) {
  return group_size * (width + positives + kWarps * (kRanks + positives) + 1) + 2;
}

// From embeddings to rewards and advantages in one launch, one block an item. Every similarity is an fp64 dot product,
// so no second look is needed; warp w meets anchors w, w + kWarps, ..., and lane t keeps the state of the rollouts
// g = t (mod kTogether). States merge in the warps' order.
__global__ void __launch_bounds__(kThreads, 1) small_kernel(Small s, RewardSpec spec) {
  RIME_DYNAMIC_SHARED(double, memory);
  const int64_t item = blockIdx.x, group = s.group_size, size = kRanks + s.positives, own_begin = s.positive[item];
  double* rows = memory;                             // [group][width]
  double* own = rows + group * s.width;              // [group][positives]
  double* states = own + group * s.positives;        // [kWarps][group][size]
  double* rewards = states + kWarps * group * size;  // [group]
  double* shared = rewards + group;                  // mean, deviation
  const int64_t warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  for (int64_t i = threadIdx.x; i < group * s.width; i += kThreads) rows[i] = s.gen[item * group * s.width + i];
  for (int64_t i = threadIdx.x; i < kWarps * group; i += kThreads) state_init(states + i * size, s.negative, s.positives);
  __syncthreads();
  for (int64_t task = warp; task < s.positives * group; task += kWarps) {
    const int64_t g = task / s.positives, column = own_begin + task % s.positives;
    const bool inside = column >= 0 && column < s.columns;
    const double found = similarities(rows + g * s.width, 1, s.anchors, inside ? column * s.width : 0, s.width);
    if (lane == 0) own[task] = inside ? found : static_cast<double>(NAN);
  }
  __syncthreads();
  for (int64_t j = warp; j < s.columns; j += kWarps) {
    if (j >= own_begin && j < own_begin + s.positives) continue;
    if (s.mask != nullptr && !s.mask[item * s.mask_stride + j]) continue;
    for (int64_t first = 0; first < group; first += kTogether) {
      const int count = static_cast<int>(group - first < kTogether ? group - first : kTogether);
      const double found = similarities(rows + first * s.width, count, s.anchors, j * s.width, s.width);
      const int64_t g = first + lane;
      if (lane < count)
        state_add(states + (warp * group + g) * size, own + g * s.positives, s.positives, found, s.negative,
                  s.inverse_tau);
    }
  }
  __syncthreads();
  const int64_t planes = s.items * group;
  for (int64_t g = threadIdx.x; g < group; g += kThreads) {
    double* state = states + g * size;
    for (int64_t w = 1; w < kWarps; ++w)
      state_merge(state, state + w * group * size, s.negative, s.positives, s.inverse_tau);
    const int64_t r = item * group + g;
    const double length = s.lengths.data == nullptr ? 0.0 : s.lengths[r];
    const double disc = s.disc.data == nullptr ? 0.0 : s.disc[r];
    const RewardTerms t = reward_terms(state, own + g * s.positives, s.positives, s.format_ok[r],
                                       s.lengths.data == nullptr ? nullptr : &length,
                                       s.disc.data == nullptr ? nullptr : &disc, spec);
    rewards[g] = t.reward();
    s.rewards[item * s.reward_strides[0] + g * s.reward_strides[1]] = static_cast<float>(t.reward());
    if (s.terms == nullptr) continue;
    double values[kPlanes];
    fill_planes(t, values);
    for (int plane = 0; plane < kPlanes; ++plane)
      if (plane != kAdvantage && plane != kDeviation) s.terms[plane * planes + r] = static_cast<float>(values[plane]);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    double sum = 0.0, squares = 0.0;
    for (int64_t g = 0; g < group; ++g) sum += rewards[g];
    shared[0] = sum / static_cast<double>(group);
    for (int64_t g = 0; g < group; ++g) squares += (rewards[g] - shared[0]) * (rewards[g] - shared[0]);
    shared[1] = group_deviation(squares, group);
  }
  __syncthreads();
  for (int64_t g = threadIdx.x; g < group; g += kThreads) {
    const float value = static_cast<float>(advantage(rewards[g] - shared[0], shared[1], spec));
    s.advantages[item * s.advantage_strides[0] + g * s.advantage_strides[1]] = value;
    if (s.terms == nullptr) continue;
    s.terms[kAdvantage * planes + item * group + g] = value;
    s.terms[kDeviation * planes + item * group + g] = static_cast<float>(shared[1]);
  }
}

}  // namespace
}  // namespace rime::reward
