// The reward's device code over a bank: similarities to states; states to rewards, and a small bank's whole call, are in
// reward_finish.cuh. Included by reward.cu, and by tests/ops/reward_on_host.cpp, which runs it on the CPU.
#pragma once
#include <rime/reward.h>

#include "reward_numbers.cuh"

namespace rime::reward {
namespace {

constexpr int kThreads = 256;
constexpr float kLargest = 3.402823466e38f;

struct Larger {
  __device__ double operator()(double a, double b) const { return a > b ? a : b; }
};

// A call's beginning, a warp to a rollout's norm and first state, and to each of its own anchors; anchors [columns, D].
struct Begin {
  Numbers gen, anchors;
  const int64_t* positive;
  double* own;
  float* norms;
  double* state;  // may be null
  int64_t rows, group_size, positives, columns, width;
  int negative;
};

__global__ void begin_kernel(Begin b) {
  const int64_t task = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (task >= b.rows * (b.positives + 1)) return;
  const int64_t row = task / (b.positives + 1), p = task % (b.positives + 1);
  const bool leader = threadIdx.x % kWarp == 0;
  if (p == b.positives) {
    const double square = warp_dot<4>(b.gen, row * b.width, b.gen, row * b.width, b.width);
    if (leader) b.norms[row] = static_cast<float>(sqrt(square));
    if (leader && b.state != nullptr)
      state_init(b.state + row * (kRanks + b.positives), b.negative, b.positives);
    return;
  }
  const int64_t column = b.positive[row / b.group_size] + p;
  const bool inside = column >= 0 && column < b.columns;
  const double value = warp_dot<4>(b.gen, row * b.width, b.anchors, inside ? column * b.width : 0, b.width);
  if (leader) b.own[row * b.positives + p] = inside ? value : static_cast<double>(NAN);
}

struct Tile {
  Numbers gen, anchors;
  const float* anchor_norm;
  const float* norms;
  const double* own;
  const int64_t* positive;
  const bool* mask;
  double* state;
  int64_t columns, stride, width, group_size, positives, first, mask_stride;  // stride: of the similarities' rows
  double inverse_tau;
  float slack;  // of the band, beyond a product's of fp32 numbers
};

constexpr int64_t kMostColumns = 1 << 29;  // of a tile; sums and differences of two of them are int

// One row of the tile as its block sees it. Columns are int: of 64 bits they would cost the sweeps their registers.
template <class S>
struct Row {
  const Tile& t;
  const S* sims;
  const bool* mask;
  int row, columns, own_begin, positives;
  float band;

  // The similarity where column j is a negative's, else NaN, which no comparison finds.
  __device__ S value(int j) const {
    if (j >= columns || (j >= own_begin && j < own_begin + positives)) return NAN;
    const S v = sims[j];
    const bool finite = fabsf(static_cast<float>(v)) <= kLargest;
    return finite && (mask == nullptr || mask[j]) ? v : static_cast<S>(NAN);
  }

  // Four columns from j on, a multiple of 4, as they lie in memory: no load waits for what another has brought.
  struct Four {
    float v[4];
    uint32_t mask;  // a byte each
  };
  __device__ Four load(int j) const {
    Four x{{NAN, NAN, NAN, NAN}, 0x01010101u};
    if (j + 4 <= columns && at_sixteen(sims)) {
      get_four(sims + j, x.v);
    } else {
RIME_UNROLL
      for (int c = 0; c < 4; ++c)
        if (j + c < columns) x.v[c] = sims[j + c];
    }
    if (mask == nullptr) return x;
    if (j + 4 <= columns && reinterpret_cast<uintptr_t>(mask) % 4 == 0) {
      x.mask = *reinterpret_cast<const uint32_t*>(mask + j);
    } else {
RIME_UNROLL
      for (int c = 0; c < 4; ++c)
        if (j + c < columns && !mask[j + c]) x.mask &= ~(0xffu << 8 * c);
    }
    return x;
  }

  // The similarities of those that are negatives, NaN for the others.
  __device__ void keep(int j, Four& x) const {
    const auto place = static_cast<unsigned>(j - own_begin);
RIME_UNROLL
    for (int c = 0; c < 4; ++c) {
      const bool negative = place + c >= static_cast<unsigned>(positives) && (x.mask >> 8 * c & 1u) != 0;
      x.v[c] = negative && fabsf(x.v[c]) <= kLargest ? x.v[c] : NAN;
    }
  }

  // f(exact similarity) for every lane's column that `wanted` picks, a warp to a column; lane 0 acts.
  template <class F>
  __device__ void exact(bool wanted, int j, F f) const {
    unsigned left = __ballot_sync(kAll, wanted);
    while (left != 0) {
      const int lane = __ffs(left) - 1;
      left &= left - 1;
      const int64_t column = __shfl_sync(kAll, j, lane);
      f(warp_dot<2>(t.gen, int64_t{row} * t.width, t.anchors, column * t.width, t.width));
    }
  }
};

// What one sweep over a row finds: what it adds to the rank against a threshold; count, sum and maximum of its negatives;
// the softmax's weights e^((s - best) / tau) and the sum of the weighted.
struct Found {
  double rank = 0.0, count = 0.0, sum = 0.0, best = -HUGE_VAL, weight = 0.0, weighted = 0.0;
};

struct Join {
  __device__ Found operator()(const Found& a, const Found& b) const {
    return {a.rank + b.rank, a.count + b.count,   a.sum + b.sum,
            a.best > b.best ? a.best : b.best, a.weight + b.weight, a.weighted + b.weighted};
  }
};

// What all threads have found, on every thread; weights come relative to each thread's best.
template <int kNegative>
__device__ Found joined(Found mine, double inverse_tau) {
  if (kNegative == kSoftmax) {
    const double best = block_reduce<kThreads>(mine.best, Larger{});
    const double shrink = mine.weight == 0.0 ? 0.0 : exp((mine.best - best) * inverse_tau);
    mine.weight *= shrink, mine.weighted *= shrink;
  }
  return block_reduce<kThreads>(mine, Join{});
}

template <int kNegative>
__device__ Found sweep(const Row<double>& row, float threshold, float&) {
  Found found;
  const double inverse_tau = row.t.inverse_tau;
  for (int j = static_cast<int>(threadIdx.x); j < row.columns; j += kThreads) {
    const double v = row.value(j);
    if (!(v == v)) continue;
    found.rank += rank_step(static_cast<float>(v), threshold);
    found.count += 1.0;
    found.sum += v;
    if (kNegative == kSoftmax && v > found.best) {
      const double shrink = exp((found.best - v) * inverse_tau);
      found.weight *= shrink, found.weighted *= shrink;
    }
    found.best = v > found.best ? v : found.best;
    if (kNegative != kSoftmax) continue;
    const double w = exp((v - found.best) * inverse_tau);
    found.weight += w;
    found.weighted += w * v;
  }
  return joined<kNegative>(found, inverse_tau);
}

constexpr int kFours = 4;                      // loads of four columns that a thread has in flight
constexpr int kStep = 4 * kFours * kThreads;   // columns that a block takes at a time

__device__ __forceinline__ int column_of(int base, int f) {
  return base + 4 * (f * kThreads + static_cast<int>(threadIdx.x));
}

// What a thread has met of its row; weights are relative to `best`.
struct Met {
  double sum = 0.0, weight = 0.0, weighted = 0.0;
  int above = 0, count = 0;
  float best = -HUGE_VALF;

  // Raises `best`, and with it what the weights refer to.
  __device__ __forceinline__ void raise(float to, float inverse_tau) {
    if (to <= best) return;
    const double shrink = exp32((best - to) * inverse_tau);
    weight *= shrink, weighted *= shrink;
    best = to;
  }

  // Adds the weights of numbers of which none is above `best`, 0 for NaN.
  template <int kCount>
  __device__ __forceinline__ void weigh(const float* v, float inverse_tau) {
    float sum = 0.0f, product = 0.0f;
RIME_UNROLL
    for (int c = 0; c < kCount; ++c) {
      const bool counts = v[c] == v[c];
      const float w = counts ? exp32((v[c] - best) * inverse_tau) : 0.0f;
      sum += w;
      product += counts ? w * v[c] : 0.0f;
    }
    weight += static_cast<double>(sum);
    weighted += static_cast<double>(product);
  }
};

// A threshold of ranks, and how far from it a product must lie to be on its side for certain.
struct Threshold {
  float middle, band;

  __device__ __forceinline__ float low() const { return middle - band; }
  __device__ __forceinline__ float high() const { return middle + band; }
  // low and high are rounded: whatever lies between them is no further from the middle than this
  __device__ __forceinline__ float reach() const { return band + 0x1p-22f * fabsf(middle); }
};

// Adds a step of columns, whatever they are; returns whether one of this thread's is close to the threshold. Sums of four
// go to fp64 as one: a conversion costs as much as eight additions, and four fp32 numbers round by less than the product did.
template <int kNegative>
__device__ __forceinline__ bool add_step(const Row<float>& row, int base, const Threshold& at, Met& met) {
  Row<float>::Four fours[kFours];
  const float inverse_tau = static_cast<float>(row.t.inverse_tau);
  float best = met.best;
  bool close = false;
RIME_UNROLL
  for (int f = 0; f < kFours; ++f) fours[f] = row.load(column_of(base, f));
RIME_UNROLL
  for (int f = 0; f < kFours; ++f) {
    float part[4];
    row.keep(column_of(base, f), fours[f]);
RIME_UNROLL
    for (int c = 0; c < 4; ++c) {
      const float x = fours[f].v[c];
      const bool counts = x == x;
      met.count += counts;
      part[c] = counts ? x : 0.0f;
      if constexpr (kNegative != kMean) best = x > best ? x : best;
      met.above += x > at.high();
      close = close || (x >= at.low() && x <= at.high());
    }
    if constexpr (kNegative == kMean) met.sum += static_cast<double>((part[0] + part[1]) + (part[2] + part[3]));
  }
  if constexpr (kNegative == kSoftmax) {
    met.raise(best, inverse_tau);
RIME_UNROLL
    for (int f = 0; f < kFours; ++f) met.weigh<4>(fours[f].v, inverse_tau);
  } else {
    met.best = best;
  }
  return close;
}

// The same of a step that lies whole in memory and away from the positives, in a third of the instructions. Nothing is
// added, and the answer is no, where a column of the warp's is masked or not finite.
template <int kNegative>
__device__ __forceinline__ bool add_whole_step(
    const Row<float>& row, int base, const Threshold& at, Met& met, bool& close) {
  float x[4 * kFours], parts[kFours], best = met.best, distance = HUGE_VALF;
  int above = 0;
  bool odd = false;
RIME_UNROLL
  for (int f = 0; f < kFours; ++f) get_four(row.sims + column_of(base, f), x + 4 * f);
  if (row.mask != nullptr) {
RIME_UNROLL
    for (int f = 0; f < kFours; ++f)
      odd = odd || *reinterpret_cast<const uint32_t*>(row.mask + column_of(base, f)) != 0x01010101u;
  }
RIME_UNROLL
  for (int f = 0; f < kFours; ++f) {
    const float* v = x + 4 * f;
    parts[f] = (v[0] + v[1]) + (v[2] + v[3]);
RIME_UNROLL
    for (int c = 0; c < 4; ++c) {
      if constexpr (kNegative != kMean) best = fmaxf(best, v[c]);
      distance = fminf(distance, fabsf(v[c] - at.middle));
      above += v[c] > at.high();
    }
  }
  odd = odd || !(fabsf((parts[0] + parts[1]) + (parts[2] + parts[3])) <= kLargest);
  if (__ballot_sync(kAll, odd) != 0) return false;
  met.above += above;
  met.count += 4 * kFours;
RIME_UNROLL
  for (int f = 0; f < kFours; ++f)
    if constexpr (kNegative == kMean) met.sum += static_cast<double>(parts[f]);
  if constexpr (kNegative == kSoftmax) {
    const float inverse_tau = static_cast<float>(row.t.inverse_tau);
    met.raise(best, inverse_tau);
    met.weigh<4 * kFours>(x, inverse_tau);
  } else {
    met.best = best;
  }
  close = distance <= at.reach();
  return true;
}

// f(exact similarity) for a step's columns whose products lie in [low, high]; they are read again: an index known at run
// time would move them out of registers.
template <class F>
__device__ void exact_step(const Row<float>& row, int base, float low, float high, F f) {
RIME_ROLLED
  for (int i = 0; i < 4 * kFours; ++i) {
    const int j = column_of(base, i / 4) + i % 4;
    const float x = row.value(j);
    row.exact(x >= low && x <= high, j, f);
  }
}

// mine: this thread's maximum.
template <int kNegative>
__device__ Found sweep(const Row<float>& row, float threshold, float& mine) {
  const Threshold at{threshold, row.band};
  const bool leader = threadIdx.x % kWarp == 0;
  const bool whole = at_sixteen(row.sims) && reinterpret_cast<uintptr_t>(row.mask) % 4 == 0;
  double rank = 0.0;
  Met met;
  // From the end: a product's last columns are still in L2.
  for (int base = (row.columns - 1) / kStep * kStep; base >= 0; base -= kStep) {
    const bool away = base >= row.own_begin + row.positives || base + kStep <= row.own_begin;
    bool close = false;
    if (!(whole && away && base + kStep <= row.columns && add_whole_step<kNegative>(row, base, at, met, close)))
      close = add_step<kNegative>(row, base, at, met);
    if (__ballot_sync(kAll, close) == 0) continue;
    exact_step(row, base, at.low(), at.high(), [&](double s) {
      if (leader) rank += rank_step(static_cast<float>(s), threshold);
    });
  }
  mine = met.best;
  const Found found{rank + met.above, static_cast<double>(met.count), met.sum, static_cast<double>(met.best),
                    met.weight,       met.weighted};
  return joined<kNegative>(found, row.t.inverse_tau);
}

// The largest exact similarity of a row whose largest product is `best`: on every thread. mine: this thread's product.
__device__ double exact_best(const Row<double>&, double best, float) { return best; }
__device__ double exact_best(const Row<float>& row, double best, float mine) {
  const float low = static_cast<float>(best) - 2.0f * row.band;
  double found = -HUGE_VAL;
  // Only a warp that holds such a column looks at its columns again.
  const int end = __ballot_sync(kAll, mine >= low) == 0 ? 0 : row.columns;
  for (int base = 0; base < end; base += kStep) {
    Row<float>::Four fours[kFours];
    bool close = false;
RIME_UNROLL
    for (int f = 0; f < kFours; ++f) fours[f] = row.load(column_of(base, f));
RIME_UNROLL
    for (int f = 0; f < kFours; ++f) {
      const float* v = fours[f].v;
      row.keep(column_of(base, f), fours[f]);
      close = close || v[0] >= low || v[1] >= low || v[2] >= low || v[3] >= low;
    }
    if (__ballot_sync(kAll, close) == 0) continue;
    exact_step(row, base, low, kLargest, [&](double s) { found = s > found ? s : found; });
  }
  return block_reduce<kThreads>(found, Larger{});
}

// A block to a row and one of its own anchors. Four blocks a multiprocessor, so that an H100 holds the 512 rows of a usual batch at once.
template <class S, int kNegative>
__global__ void __launch_bounds__(kThreads, 4) tile_kernel(Tile t, const S* sims) {
  const int64_t row = blockIdx.x, item = row / t.group_size;
  const int64_t own = t.positive[item] - t.first;
  const Row<S> view{t,
                    sims + row * t.stride,
                    t.mask == nullptr ? nullptr : t.mask + item * t.mask_stride,
                    static_cast<int>(row),
                    static_cast<int>(t.columns),
                    static_cast<int>(own < -kMostColumns ? -kMostColumns : own > kMostColumns ? kMostColumns : own),
                    static_cast<int>(t.positives),
                    similarity_band(t.width, t.norms[row], t.slack * *t.anchor_norm)};
  double* state = t.state + row * (kRanks + t.positives);
  float mine;
  Found found = sweep<kNegative>(view, static_cast<float>(t.own[row * t.positives + blockIdx.y]), mine);
  if (threadIdx.x == 0) state[kRanks + blockIdx.y] += found.rank;
  if (blockIdx.y != 0 || found.count == 0.0) return;  // all else is the same for every own anchor
  if constexpr (kNegative == kMax) found.best = exact_best(view, found.best, mine);
  if (threadIdx.x != 0) return;
  state[0] += found.count;
  if constexpr (kNegative == kMean) state[1] += found.sum;
  if constexpr (kNegative == kMax) state[1] = found.best > state[1] ? found.best : state[1];
  if constexpr (kNegative == kSoftmax) softmax_merge(state, found.best, found.weight, found.weighted, t.inverse_tau);
}

__global__ void merge_kernel(const double* parts, double* state, int64_t n_parts, int64_t rows, int64_t size,
                             int negative, double inverse_tau) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (row >= rows) return;
  for (int64_t part = 0; part < n_parts; ++part)
    state_merge(state + row * size, parts + (part * rows + row) * size, negative, size - kRanks, inverse_tau);
}

}  // namespace
}  // namespace rime::reward
