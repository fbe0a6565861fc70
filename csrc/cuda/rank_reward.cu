// CUDA kernels of score_rewrites_, the counterparts of csrc/cpu/rank_reward.cpp with the same arithmetic
// (rime/rank_reward.h) around cuBLAS's fp32 product of all rollouts with a tile of the bank.
//
//   rank_own     one warp a rollout and own anchor: fp64 dot product                         reads 2 D floats
//   rank_tile    one block a rollout: P + 1 (mean) or P + 2 sweeps over its row of the tile, in L2 after the first;
//                columns within the product's error of a threshold are formed again in fp64, a warp to a column
//   rank_merge   one thread a rollout            rank_finish   one block an item
//
// Sums go through a fixed tree, nothing is added atomically: the same input gives the same bits.
#include <rime/rank_reward.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cuda_runtime.h>

#include <optional>

namespace {
using torch::stable::Tensor;
using namespace rime;

constexpr int kThreads = 256;
constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;
constexpr float kLargest = 3.402823466e38f;

struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};
struct Larger {
  __device__ double operator()(double a, double b) const { return a > b ? a : b; }
};

// The block's total of `value` on every thread.
template <class Op>
__device__ double block_reduce(double value, Op op) {
  __shared__ double parts[kThreads / kWarp];
  for (int step = kWarp / 2; step > 0; step /= 2) value = op(value, __shfl_xor_sync(kAll, value, step));
  __syncthreads();  // the last call's parts have been read
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = parts[0];
  for (int w = 1; w < kThreads / kWarp; ++w) value = op(value, parts[w]);
  return value;
}

// Sum of x_i y_i in fp64 by one warp, on every lane.
__device__ double warp_dot(const float* x, const float* y, int64_t n) {
  double total = 0.0;
  for (int64_t i = threadIdx.x % kWarp; i < n; i += kWarp)
    total += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  for (int step = kWarp / 2; step > 0; step /= 2) total += __shfl_xor_sync(kAll, total, step);
  return total;
}

__global__ void own_kernel(const float* gen, const float* own_anchors, double* own, float* norms, int64_t rows,
                           int64_t group_size, int64_t positives, int64_t width) {
  const int64_t task = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / kWarp;
  if (task >= rows * (positives + 1)) return;
  const int64_t row = task / (positives + 1), p = task % (positives + 1);
  const float* g = gen + row * width;
  const bool is_norm = p == positives;
  const double value = warp_dot(g, is_norm ? g : own_anchors + ((row / group_size) * positives + p) * width, width);
  if (threadIdx.x % kWarp != 0) return;
  if (is_norm)
    norms[row] = static_cast<float>(sqrt(value));
  else
    own[row * positives + p] = value;
}

struct Tile {
  const float* gen;
  const float* anchors;
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
      f(warp_dot(t.gen + row * t.width, t.anchors + column * t.width, t.width));
    }
  }
};

template <class S>
__device__ double count_rank(const Row<S>& row, float threshold) {
  const float high = threshold + row.band, low = threshold - row.band;
  const bool leader = threadIdx.x % kWarp == 0;
  double rank = 0.0;
  for (int64_t base = 0; base < row.t.columns; base += kThreads) {
    const int64_t j = base + threadIdx.x;
    const S v = row.value(j);
    if constexpr (sizeof(S) == sizeof(double)) {
      rank += v == v ? rank_step(static_cast<float>(v), threshold) : 0.0;
    } else {
      rank += v > high ? 1.0 : 0.0;
      row.exact(v >= low && v <= high, j, [&](double s) {
        if (leader) rank += rank_step(static_cast<float>(s), threshold);
      });
    }
  }
  return block_reduce(rank, Add{});
}

template <class S>
__device__ void add_mean(const Row<S>& row, double* state) {
  double count = 0.0, sum = 0.0;
  for (int64_t j = threadIdx.x; j < row.t.columns; j += kThreads) {
    const S v = row.value(j);
    count += v == v ? 1.0 : 0.0;
    sum += v == v ? static_cast<double>(v) : 0.0;
  }
  count = block_reduce(count, Add{});
  sum = block_reduce(sum, Add{});
  if (threadIdx.x == 0) {
    state[0] += count;
    state[1] += sum;
  }
}

template <class S>
__device__ double find_peak(const Row<S>& row, double* count) {
  double seen = 0.0, best = -HUGE_VAL;
  for (int64_t j = threadIdx.x; j < row.t.columns; j += kThreads) {
    const S v = row.value(j);
    seen += v == v ? 1.0 : 0.0;
    best = v > best ? static_cast<double>(v) : best;
  }
  *count = block_reduce(seen, Add{});
  return block_reduce(best, Larger{});
}

template <class S>
__device__ void add_max(const Row<S>& row, double* state) {
  double count;
  double best = find_peak(row, &count);
  if (count == 0.0) return;
  if constexpr (sizeof(S) == sizeof(float)) {
    const double low = best - 2.0 * row.band;
    best = -HUGE_VAL;
    for (int64_t base = 0; base < row.t.columns; base += kThreads) {
      const int64_t j = base + threadIdx.x;
      row.exact(row.value(j) >= low, j, [&](double s) { best = s > best ? s : best; });
    }
    best = block_reduce(best, Larger{});
  }
  if (threadIdx.x == 0) {
    state[0] += count;
    if (best > state[1]) state[1] = best;
  }
}

template <class S>
__device__ void add_softmax(const Row<S>& row, double* state) {
  double count, weight = 0.0, weighted = 0.0;
  const double peak = find_peak(row, &count);
  if (count == 0.0) return;
  for (int64_t j = threadIdx.x; j < row.t.columns; j += kThreads) {
    const S v = row.value(j);
    if (!(v == v)) continue;
    const double w = static_cast<double>(expf(static_cast<float>((v - peak) * row.t.inverse_tau)));
    weight += w;
    weighted += w * static_cast<double>(v);
  }
  weight = block_reduce(weight, Add{});
  weighted = block_reduce(weighted, Add{});
  if (threadIdx.x == 0) {
    state[0] += count;
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
  for (int64_t p = 0; p < t.positives; ++p) {
    const double rank = count_rank(view, static_cast<float>(t.own[row * t.positives + p]));
    if (threadIdx.x == 0) state[kRanks + p] += rank;
  }
  if constexpr (kNegative == kMean) add_mean(view, state);
  if constexpr (kNegative == kMax) add_max(view, state);
  if constexpr (kNegative == kSoftmax) add_softmax(view, state);
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

constexpr int64_t kPlanes = 12, kAdvantage = 1, kDeviation = 10;  // as in csrc/cpu/rank_reward.cpp

__device__ RewardTerms terms_of(const Finish& f, const RewardSpec& spec, int64_t r) {
  return reward_terms(f.states + r * (kRanks + f.positives), f.own + r * f.positives, f.positives, f.format_ok[r],
                      f.lengths == nullptr ? nullptr : f.lengths + r, f.disc == nullptr ? nullptr : f.disc + r, spec);
}

__global__ void __launch_bounds__(kThreads, 1) finish_kernel(Finish f, RewardSpec spec) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * f.group_size, end = begin + f.group_size;
  double sum = 0.0, squares = 0.0;
  for (int64_t r = begin + threadIdx.x; r < end; r += kThreads) {
    const RewardTerms t = terms_of(f, spec, r);
    const double values[kPlanes] = {t.reward(), 0.0,   t.format,   t.score,    t.refine, t.length,
                                    t.rank,     t.hit, t.positive, t.negative, 0.0,      t.missing ? 1.0 : 0.0};
    for (int plane = 0; plane < kPlanes; ++plane) f.out[plane * f.rows + r] = static_cast<float>(values[plane]);
    sum += t.reward();
  }
  const double mean = block_reduce(sum, Add{}) / static_cast<double>(f.group_size);
  for (int64_t r = begin + threadIdx.x; r < end; r += kThreads) {
    const double centred = terms_of(f, spec, r).reward() - mean;
    squares += centred * centred;
  }
  const double deviation = group_deviation(block_reduce(squares, Add{}), f.group_size);
  for (int64_t r = begin + threadIdx.x; r < end; r += kThreads) {
    f.out[kAdvantage * f.rows + r] = static_cast<float>(advantage(terms_of(f, spec, r).reward() - mean, deviation, spec));
    f.out[kDeviation * f.rows + r] = static_cast<float>(deviation);
  }
}

cudaStream_t stream_of(const Tensor& tensor) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

unsigned blocks(int64_t tasks) { return static_cast<unsigned>((tasks + kThreads - 1) / kThreads); }

void rank_own(const Tensor& gen, const Tensor& own_anchors, Tensor own, Tensor norms) {
  const torch::stable::accelerator::DeviceGuard guard(gen.get_device());
  const int64_t rows = gen.size(0), positives = own.size(1);
  own_kernel<<<blocks(rows * (positives + 1) * kWarp), kThreads, 0, stream_of(gen)>>>(
      gen.const_data_ptr<float>(), own_anchors.const_data_ptr<float>(), own.mutable_data_ptr<double>(),
      norms.mutable_data_ptr<float>(), rows, rows / own_anchors.size(0), positives, gen.size(1));
  check_launch("rank_own");
}

template <class S>
void launch_tile(const Tile& t, const S* sims, int64_t rows, int64_t negative, cudaStream_t stream) {
  const auto grid = static_cast<unsigned>(rows);
  if (negative == kMean)
    tile_kernel<S, kMean><<<grid, kThreads, 0, stream>>>(t, sims);
  else if (negative == kSoftmax)
    tile_kernel<S, kSoftmax><<<grid, kThreads, 0, stream>>>(t, sims);
  else
    tile_kernel<S, kMax><<<grid, kThreads, 0, stream>>>(t, sims);
  check_launch("rank_tile");
}

void rank_tile(const Tensor& sims, const Tensor& gen, const Tensor& tile, const Tensor& tile_norm,
               const Tensor& norms, const Tensor& own, const Tensor& positive, std::optional<Tensor> mask,
               int64_t first, int64_t negative, double tau, Tensor state) {
  const torch::stable::accelerator::DeviceGuard guard(gen.get_device());
  Tile t{};
  t.gen = gen.const_data_ptr<float>();
  t.anchors = tile.const_data_ptr<float>();
  t.anchor_norm = tile_norm.const_data_ptr<float>();
  t.norms = norms.const_data_ptr<float>();
  t.own = own.const_data_ptr<double>();
  t.positive = positive.const_data_ptr<int64_t>();
  t.state = state.mutable_data_ptr<double>();
  t.columns = sims.size(1);
  t.width = gen.size(1);
  t.group_size = gen.size(0) / positive.size(0);
  t.positives = own.size(1);
  t.first = first;
  t.inverse_tau = 1.0 / tau;
  if (mask.has_value()) {
    t.mask = mask->const_data_ptr<bool>();
    t.mask_stride = mask->stride(0);
  }
  if (sims.element_size() == sizeof(double))
    launch_tile(t, sims.const_data_ptr<double>(), gen.size(0), negative, stream_of(gen));
  else
    launch_tile(t, sims.const_data_ptr<float>(), gen.size(0), negative, stream_of(gen));
}

void rank_merge(const Tensor& parts, int64_t negative, double tau, Tensor state) {
  const torch::stable::accelerator::DeviceGuard guard(parts.get_device());
  merge_kernel<<<blocks(parts.size(1)), kThreads, 0, stream_of(parts)>>>(
      parts.const_data_ptr<double>(), state.mutable_data_ptr<double>(), parts.size(0), parts.size(1), parts.size(2),
      static_cast<int>(negative), 1.0 / tau);
  check_launch("rank_merge");
}

void rank_finish(const Tensor& state, const Tensor& own, const Tensor& format_ok, std::optional<Tensor> lengths,
                 std::optional<Tensor> disc_similarity, int64_t score, int64_t hit_k, int64_t negative, bool normalize,
                 double w_fmt, double w_rank, double w_refine, double w_len, double length_limit, double eps,
                 Tensor out) {
  const torch::stable::accelerator::DeviceGuard guard(state.get_device());
  const RewardSpec spec{w_fmt, w_rank, w_refine, w_len, length_limit, eps,
                        static_cast<int>(score), static_cast<int>(negative), hit_k, normalize};
  const Finish f{state.const_data_ptr<double>(),
                 own.const_data_ptr<double>(),
                 format_ok.const_data_ptr<bool>(),
                 lengths.has_value() ? lengths->const_data_ptr<double>() : nullptr,
                 disc_similarity.has_value() ? disc_similarity->const_data_ptr<double>() : nullptr,
                 out.mutable_data_ptr<float>(),
                 own.size(0),
                 format_ok.size(1),
                 own.size(1)};
  finish_kernel<<<static_cast<unsigned>(format_ok.size(0)), kThreads, 0, stream_of(state)>>>(f, spec);
  check_launch("rank_finish");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rime_fast_C, CUDA, m) {
  m.impl("rank_own", TORCH_BOX(&rank_own));
  m.impl("rank_tile", TORCH_BOX(&rank_tile));
  m.impl("rank_merge", TORCH_BOX(&rank_merge));
  m.impl("rank_finish", TORCH_BOX(&rank_finish));
}
