// Device code of the log-prob operator: rows of logits [R, V] -> statistics, and -> their gradient over them. Logits are
// fp32, or bf16 or fp16 (each rounded once, by the product that made it); everything computed from them is fp32.
// Included by logprob.cu, and by tests/ops/logprob_on_host.cpp, which runs it on the CPU.
//
// One block of 512 threads a row; a thread takes 8 columns a trip, in two groups of 4. Forward: every thread keeps an
// online (top, sum, weighted sum), one exponential a column and one more where its maximum rises, merged through
// shuffles and shared memory in a fixed order: one read of the row. Backward: one read, one write. The gradient of fp32
// logits may be bf16 or fp16, written into the first half of the row's own memory: each trip of 4,096 columns is read by
// all threads before any of it is written, and a trip's narrow results end before the columns that are still to be read.
// That of narrow logits has their type and takes their places, each thread its own. Temperature and softcap are read on the device.
//
// kPlain: no bias, no softcap, no entropy gradient. kAligned: rows, and bias, are whole groups of 4 at multiples of 16
// bytes, so that loads take 16 bytes and stores 16 or 8; otherwise column by column.
#pragma once

#include <rime/logprob.h>

#include "common.cuh"

namespace rime::logprob {
namespace {

constexpr int kThreads = 512;
constexpr int kGroups = 2;  // of 4 columns, a trip
constexpr int kColumns = 4 * kGroups;
constexpr int kTrip = kThreads * kColumns;

// What all rows share; bias and softcap may be null.
struct Head {
  int vocabulary;
  const float *bias, *temperature, *softcap;

  __device__ Scale scale(bool plain) const {
    return make_scale(*temperature, plain || softcap == nullptr ? 0.0f : *softcap);
  }
};

// First of the 4 columns of a group of this thread, `first` being the trip's.
__device__ __forceinline__ int group_column(int first, int group) {
  return first + (group * kThreads + static_cast<int>(threadIdx.x)) * 4;
}

template <bool kAligned, class L>
__device__ __forceinline__ void load_four(const L* from, int v, int end, float other, float* x) {
  RIME_UNROLL
  for (int i = 0; i < 4; ++i) x[i] = other;
  if constexpr (kAligned) {
    if (v < end) get_four(from + v, x);
  } else {
    RIME_UNROLL
    for (int i = 0; i < 4; ++i)
      if (v + i < end) x[i] = wide(from[v + i]);
  }
}

// A trip's scores; -inf past the row's end.
template <bool kPlain, bool kAligned, class L>
__device__ __forceinline__ void load_scores(const L* row, const Head& head, const Scale& scale, int first, float* z) {
  RIME_UNROLL
  for (int group = 0; group < kGroups; ++group) {
    const int v = group_column(first, group);
    float* own = z + 4 * group;
    load_four<kAligned>(row, v, head.vocabulary, -HUGE_VALF, own);
    float b[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (!kPlain && head.bias) load_four<kAligned>(head.bias, v, head.vocabulary, 0.0f, b);
    RIME_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float score = kPlain ? own[i] * scale.inv_temperature : scale.score(own[i] + b[i]);
      own[i] = v + i < head.vocabulary ? score : -HUGE_VALF;  // softcap(-inf) is finite
    }
  }
}

struct Merge {
  __device__ Partial operator()(Partial a, Partial b) const { return merge(a, b); }
};

// Adds kColumns scores to a running Partial.
template <bool kEntropy>
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

template <class L, bool kEntropy, bool kPlain, bool kAligned>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    const L* logits, int64_t stride, Head head, const int64_t* targets, Statistics out) {
  const int64_t r = blockIdx.x;
  const L* row = logits + r * stride;
  const Scale scale = head.scale(kPlain);
  Partial mine{-HUGE_VALF, 0.0f, 0.0f};
  for (int first = 0; first < head.vocabulary; first += kTrip) {
    float z[kColumns];
    load_scores<kPlain, kAligned>(row, head, scale, first, z);
    add_scores<kEntropy>(mine, z);
  }
  mine = block_reduce<kThreads, true>(mine, Merge{});
  if (threadIdx.x != 0) return;
  const int64_t target = targets[r];
  const bool there = target >= 0 && target < head.vocabulary;
  const float bias = !kPlain && head.bias && there ? head.bias[target] : 0.0f;
  out.target_logit[r] = there ? scale.score(wide(row[target]) + bias) : 0.0f;
  const Pair pair = two_sum(mine.top, logf(mine.sum));
  out.lse[r] = pair.high;
  out.lse[gridDim.x + r] = pair.low;
  if (kEntropy) out.entropy[r] = logf(mine.sum) - mine.weighted / mine.sum;
}

struct Upstream {
  const float *lse, *target_logit, *entropy, *grad_logp, *grad_entropy;  // the entropies may be null
};

// out: `logits`' own memory, out_stride in elements of T. products [R]: sum of dz (z - z[target]).
template <class L, class T, bool kPlain, bool kAligned>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    const L* logits, int64_t stride, Head head, const int64_t* targets, Upstream up, T* out, int64_t out_stride,
    float* products) {
  const int64_t r = blockIdx.x;
  const L* row = logits + r * stride;
  T* results = out + r * out_stride;
  const Scale scale = head.scale(kPlain);
  const int64_t wanted = targets[r];
  const int target = wanted >= 0 && wanted < head.vocabulary ? static_cast<int>(wanted) : -1;
  const Pair lse{up.lse[r], up.lse[gridDim.x + r]};
  const float g = up.grad_logp[r], centre = up.target_logit[r];
  const float h = !kPlain && up.grad_entropy ? up.grad_entropy[r] : 0.0f;
  const float entropy = !kPlain && up.entropy ? up.entropy[r] : 0.0f;
  float sum = 0.0f;
  for (int first = 0; first < head.vocabulary; first += kTrip) {
    float z[kColumns];
    load_scores<kPlain, kAligned>(row, head, scale, first, z);
    // Narrow results overlap columns that other threads read in this trip or in an earlier one.
    if (sizeof(T) < sizeof(L)) __syncthreads();
    RIME_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      const int v = group_column(first, group);
      float dx[4];
      RIME_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float score = z[4 * group + i];
        float dz = kPlain ? exp32((score - lse.high) - lse.low) * -g : dscore(score, lse, entropy, g, h);
        if (v + i == target) dz += g;
        sum += product(dz, score - centre);
        dx[i] = kPlain ? dz * scale.inv_temperature : product(dz, scale.slope(score));
      }
      if constexpr (kAligned) {
        if (v < head.vocabulary) put_four(results + v, dx);
      } else {
        RIME_UNROLL
        for (int i = 0; i < 4; ++i)
          if (v + i < head.vocabulary) put(results + v + i, dx[i]);
      }
    }
  }
  sum = block_reduce<kThreads, true>(sum, Add{});
  if (threadIdx.x == 0) products[r] = sum;
}

}  // namespace
}  // namespace rime::logprob
