// Device code of the log-prob operator: rows of logits [R, V] -> statistics, and -> their gradient over them. Logits are
// fp32, or bf16 or fp16 (each rounded once, by the product that made it); everything computed from them is fp32.
// Included by logprob.cu, and by tests/ops/logprob_on_host.cpp, which runs it on the CPU.
//
// One block of 512 threads a row; a thread takes 8 columns a trip, in groups of 16 bytes. Forward: every thread keeps an
// online (top, sum, weighted sum), one exponential a column and one more where its maximum rises, merged through
// shuffles and shared memory in a fixed order: one read of the row. Backward: one read, one write. Where the gradient
// follows the statistics at once these are two reads of the logits, at 92 to 95 % of an H200's bandwidth; one kernel that
// kept the row in shared memory between them, with one read, took 10 % longer. The gradient of fp32
// logits may be bf16 or fp16, written into the first half of the row's own memory: each trip of 4,096 columns is read by
// all threads before any of it is written, and a trip's narrow results end before the columns that are still to be read.
// That of narrow logits has their type and takes their places, each thread its own. Temperature and softcap are read on the device.
//
// kPlain: no bias, no softcap, no entropy gradient. kAligned: rows, and bias, are whole groups at multiples of 16 bytes,
// so that loads take 16 bytes and stores 16 (8 where the gradient of fp32 logits is narrow); otherwise column by column.
#pragma once

#include <rime/logprob.h>

#include "common.cuh"

namespace rime::logprob {
namespace {

// What a block takes of its row at once: every thread kColumns, in groups of 16 bytes of logits.
struct Trip {
  static constexpr int kThreads = 512, kColumns = 8, kSize = kThreads * kColumns;

  template <class L>
  static constexpr int kGroup = 16 / sizeof(L);

  // First of the columns of a group of this thread, `first` being the trip's.
  template <class L>
  static __device__ __forceinline__ int column(int first, int group) {
    return first + (group * kThreads + static_cast<int>(threadIdx.x)) * kGroup<L>;
  }
};

// What all rows share; bias and softcap may be null.
struct Head {
  int vocabulary;
  const float *bias, *temperature, *softcap;

  __device__ Scale scale(bool plain) const {
    return make_scale(*temperature, plain || softcap == nullptr ? 0.0f : *softcap);
  }
};

template <bool kAligned, int kCount, class L>
__device__ __forceinline__ void load_group(const L* from, int v, int end, float other, float* x) {
  RIME_UNROLL
  for (int i = 0; i < kCount; ++i) x[i] = other;
  if constexpr (kAligned) {
    if (v >= end) return;
    constexpr int kStep = 16 / sizeof(L);  // 8 columns of a bias are two loads
    RIME_UNROLL
    for (int i = 0; i < kCount; i += kStep) get_vector<kStep>(from + v + i, x + i);
  } else {
    RIME_UNROLL
    for (int i = 0; i < kCount; ++i)
      if (v + i < end) x[i] = wide(from[v + i]);
  }
}

// A trip's scores; -inf past the row's end.
template <bool kPlain, bool kAligned, class L>
__device__ __forceinline__ void load_scores(const L* row, const Head& head, const Scale& scale, int first, float* z) {
  constexpr int kGroup = Trip::kGroup<L>;
  RIME_UNROLL
  for (int group = 0; group < Trip::kColumns / kGroup; ++group) {
    const int v = Trip::column<L>(first, group);
    float* own = z + kGroup * group;
    load_group<kAligned, kGroup>(row, v, head.vocabulary, -HUGE_VALF, own);
    if constexpr (kPlain) {
      RIME_UNROLL
      for (int i = 0; i < kGroup; ++i) own[i] = rounded_product(own[i], scale.inv_temperature);
    } else {
      float b[kGroup] = {};
      if (head.bias) load_group<kAligned, kGroup>(head.bias, v, head.vocabulary, 0.0f, b);
      RIME_UNROLL
      for (int i = 0; i < kGroup; ++i)  // softcap(-inf) is finite
        own[i] = v + i < head.vocabulary ? scale.score(own[i] + b[i]) : -HUGE_VALF;
    }
  }
}

struct Merge {
  __device__ Partial operator()(Partial a, Partial b) const { return merge(a, b); }
};

// Adds kColumns scores to a running Partial.
template <bool kEntropy, int kColumns>
__device__ __forceinline__ void add_scores(Partial& mine, const float* z) {
  float top = z[0];
  RIME_UNROLL
  for (int i = 1; i < kColumns; ++i) top = fmaxf(top, z[i]);
  if (top > mine.top) {
    const float d = mine.top - top, shrink = exp32(d);
    if (kEntropy) mine.weighted = product(shrink, mine.weighted + d * mine.sum);
    mine.sum *= shrink;
    mine.top = top;
  }
  const float base = mine.top == -HUGE_VALF ? 0.0f : mine.top;
  RIME_UNROLL
  for (int i = 0; i < kColumns; ++i) {
    const float e = exp32(z[i] - base);
    mine.sum += e;
    if (kEntropy) mine.weighted += product(e, z[i] - base);
  }
}

struct Statistics {
  float *lse, *target_logit, *entropy;  // lse [2, R]
};

// The target's score, 0 where the target is not in the row.
template <bool kPlain, class L>
__device__ __forceinline__ float target_score(const L* row, const Head& head, const Scale& scale, int64_t target) {
  if (target < 0 || target >= head.vocabulary) return 0.0f;
  const float bias = !kPlain && head.bias ? head.bias[target] : 0.0f;
  return scale.score(wide(row[target]) + bias);
}

template <class L, bool kEntropy, bool kPlain, bool kAligned>
__global__ void __launch_bounds__(Trip::kThreads) forward_kernel(
    const L* logits, int64_t stride, Head head, const int64_t* targets, Statistics out) {
  const int64_t r = blockIdx.x;
  const L* row = logits + r * stride;
  const Scale scale = head.scale(kPlain);
  Partial mine{-HUGE_VALF, 0.0f, 0.0f};
  for (int first = 0; first < head.vocabulary; first += Trip::kSize) {
    float z[Trip::kColumns];
    load_scores<kPlain, kAligned>(row, head, scale, first, z);
    add_scores<kEntropy, Trip::kColumns>(mine, z);
  }
  mine = block_reduce<Trip::kThreads, true>(mine, Merge{});
  if (threadIdx.x != 0) return;
  out.target_logit[r] = target_score<kPlain>(row, head, scale, targets[r]);
  const Pair pair = two_sum(mine.top, logf(mine.sum));
  out.lse[r] = pair.high;
  out.lse[gridDim.x + r] = pair.low;
  if (kEntropy) out.entropy[r] = logf(mine.sum) - mine.weighted / mine.sum;
}

struct Upstream {
  const float *lse, *target_logit, *entropy, *grad_logp, *grad_entropy;  // the entropies may be null
};

// What a row's gradient is made from.
struct Slope {
  int target;
  Pair lse;
  float g, h, centre, entropy;  // h: of the entropy
};

// Makes a trip's gradient from its scores; returns this thread's sum of dz (z - z[target]).
template <class L, bool kPlain, bool kAligned, class T>
__device__ __forceinline__ float put_gradient(
    const Slope& row, const Head& head, const Scale& scale, int first, const float* z, T* results) {
  constexpr int kGroup = Trip::kGroup<L>;
  float sum = 0.0f;
  RIME_UNROLL
  for (int group = 0; group < Trip::kColumns / kGroup; ++group) {
    const int v = Trip::column<L>(first, group);
    float dx[kGroup];
    RIME_UNROLL
    for (int i = 0; i < kGroup; ++i) {
      const float score = z[kGroup * group + i];
      float dz = kPlain ? exp32((score - row.lse.high) - row.lse.low) * -row.g
                        : dscore(score, row.lse, row.entropy, row.g, row.h);
      if (v + i == row.target) dz += row.g;
      sum += product(dz, score - row.centre);
      dx[i] = kPlain ? dz * scale.inv_temperature : product(dz, scale.slope(score));
    }
    if constexpr (kAligned) {
      if (v < head.vocabulary) put_vector<kGroup>(results + v, dx);
    } else {
      RIME_UNROLL
      for (int i = 0; i < kGroup; ++i)
        if (v + i < head.vocabulary) put(results + v + i, dx[i]);
    }
  }
  return sum;
}

__device__ __forceinline__ int column_of(int64_t target, int vocabulary) {
  return target >= 0 && target < vocabulary ? static_cast<int>(target) : -1;
}

// out: `logits`' own memory, out_stride in elements of T. products [R]: sum of dz (z - z[target]).
template <class L, class T, bool kPlain, bool kAligned>
__global__ void __launch_bounds__(Trip::kThreads) backward_kernel(
    const L* logits, int64_t stride, Head head, const int64_t* targets, Upstream up, T* out, int64_t out_stride,
    float* products) {
  const int64_t r = blockIdx.x;
  const L* row = logits + r * stride;
  const Scale scale = head.scale(kPlain);
  const Slope slope{column_of(targets[r], head.vocabulary), Pair{up.lse[r], up.lse[gridDim.x + r]}, up.grad_logp[r],
                    !kPlain && up.grad_entropy ? up.grad_entropy[r] : 0.0f, up.target_logit[r],
                    !kPlain && up.entropy ? up.entropy[r] : 0.0f};
  float sum = 0.0f;
  for (int first = 0; first < head.vocabulary; first += Trip::kSize) {
    float z[Trip::kColumns];
    load_scores<kPlain, kAligned>(row, head, scale, first, z);
    // Narrow results overlap columns that other threads read in this trip or in an earlier one.
    if (sizeof(T) < sizeof(L)) __syncthreads();
    sum += put_gradient<L, kPlain, kAligned>(slope, head, scale, first, z, out + r * out_stride);
  }
  sum = block_reduce<Trip::kThreads, true>(sum, Add{});
  if (threadIdx.x == 0) products[r] = sum;
}

}  // namespace
}  // namespace rime::logprob
