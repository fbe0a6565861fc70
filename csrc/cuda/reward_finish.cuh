// The reward's device code that ends a call: states to rewards and advantages; and the whole call over a small bank.
#pragma once
#include "reward_kernels.cuh"

namespace rime::reward {
namespace {

struct Finish {
  const double* states;
  const double* own;
  const bool* format_ok;
  Numbers lengths, disc;  // [B, G]; data may be null
  float* out;             // [12, B, G]
  float *rewards, *advantages;  // [B, G] with these strides
  int64_t reward_strides[2], advantage_strides[2];
  int64_t rows, group_size, positives;
};

__device__ RewardTerms terms_of(const Finish& f, const RewardSpec& spec, int64_t r) {
  const double length = f.lengths.data == nullptr ? 0.0 : f.lengths[r], disc = f.disc.data == nullptr ? 0.0 : f.disc[r];
  return reward_terms(f.states + r * (kRanks + f.positives), f.own + r * f.positives, f.positives, f.format_ok[r],
                      f.lengths.data == nullptr ? nullptr : &length, f.disc.data == nullptr ? nullptr : &disc, spec);
}

__global__ void __launch_bounds__(kThreads, 1) finish_kernel(Finish f, RewardSpec spec) {
  const int64_t begin = static_cast<int64_t>(blockIdx.x) * f.group_size, end = begin + f.group_size;
  double sum = 0.0, squares = 0.0, first = 0.0;  // of a thread's rollouts, the reward of the first
  const auto reward = [&](int64_t r) { return r < begin + kThreads ? first : terms_of(f, spec, r).reward(); };
  for (int64_t r = begin + threadIdx.x; r < end; r += kThreads) {
    const RewardTerms t = terms_of(f, spec, r);
    if (r < begin + kThreads) first = t.reward();
    double values[kPlanes];
    fill_planes(t, values);
    for (int plane = 0; plane < kPlanes; ++plane) f.out[plane * f.rows + r] = static_cast<float>(values[plane]);
    f.rewards[blockIdx.x * f.reward_strides[0] + (r - begin) * f.reward_strides[1]] = static_cast<float>(t.reward());
    sum += t.reward();
  }
  const double mean = block_reduce<kThreads>(sum, Add{}) / static_cast<double>(f.group_size);
  for (int64_t r = begin + threadIdx.x; r < end; r += kThreads) {
    const double centred = reward(r) - mean;
    squares += centred * centred;
  }
  const double deviation = group_deviation(block_reduce<kThreads>(squares, Add{}), f.group_size);
  for (int64_t r = begin + threadIdx.x; r < end; r += kThreads) {
    const float value = static_cast<float>(advantage(reward(r) - mean, deviation, spec));
    f.advantages[blockIdx.x * f.advantage_strides[0] + (r - begin) * f.advantage_strides[1]] = value;
    f.out[kAdvantage * f.rows + r] = value;
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
