// Row kernels of the log-prob operator on CUDA: logits [R, V] fp32 -> statistics per row, and -> their gradient over them.
//
// One block of 512 threads a row. Forward: every thread keeps an online (top, sum, weighted sum) over its columns, four
// at a time (16-byte loads where the row is aligned), merged through shuffles and shared memory in a fixed order: one
// read of the row, 4V bytes. Backward: one read, one write. The gradient may be bf16 or fp16, written into the first
// half of the row's own fp32 memory: each step of 2,048 columns is read by all threads before any of it is
// written, and a step's narrow results end before the columns that are still to be read. Temperature and softcap
// are read on the device; nothing waits for the host.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <rime/row_softmax.h>
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>

#include "launch.h"

namespace rime {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr int kVector = 4;
constexpr unsigned kAll = 0xffffffffu;

// Four columns from `v` of a row of V; those past the end are `other`.
__device__ __forceinline__ void load_four(const float* row, int64_t v, int64_t V, bool aligned, float other, float* x) {
  if (aligned && v + kVector <= V) {
    const float4 four = *reinterpret_cast<const float4*>(row + v);
    x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
  } else {
#pragma unroll
    for (int i = 0; i < kVector; ++i) x[i] = v + i < V ? row[v + i] : other;
  }
}

__device__ __forceinline__ void load_scores(
    const float* row, const float* bias, const Scale& scale, int64_t v, int64_t V, bool aligned, float* z) {
  load_four(row, v, V, aligned, 0.0f, z);
  float b[kVector] = {0.0f, 0.0f, 0.0f, 0.0f};
  if (bias) load_four(bias, v, V, V % kVector == 0, 0.0f, b);
#pragma unroll
  for (int i = 0; i < kVector; ++i) z[i] = v + i < V ? scale.score(z[i] + b[i]) : -HUGE_VALF;
}

__device__ __forceinline__ Partial shuffle(Partial p, int step) {
  return {__shfl_xor_sync(kAll, p.top, step), __shfl_xor_sync(kAll, p.sum, step), __shfl_xor_sync(kAll, p.weighted, step)};
}

// `mine` of all threads merged, in thread 0.
__device__ Partial block_merge(Partial mine) {
  __shared__ Partial parts[kWarps];
  for (int step = 16; step > 0; step /= 2) {
    const Partial other = shuffle(mine, step);
    mine = threadIdx.x & step ? merge(other, mine) : merge(mine, other);
  }
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kWarps; ++w) mine = merge(mine, parts[w]);
  return mine;
}

__device__ float block_sum(float mine) {
  __shared__ float parts[kWarps];
  for (int step = 16; step > 0; step /= 2) mine += __shfl_xor_sync(kAll, mine, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x == 0)
    for (int w = 1; w < kWarps; ++w) mine += parts[w];
  return mine;
}

template <bool kEntropy>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    const float* logits, int64_t stride, int64_t V, const int64_t* targets, const float* bias, const float* temperature,
    const float* softcap, float* lse, float* target_logit, float* entropy) {
  const int64_t r = blockIdx.x;
  const float* row = logits + r * stride;
  const bool aligned = stride % kVector == 0;
  const Scale scale = make_scale(*temperature, softcap ? *softcap : 0.0f);
  const int64_t target = targets[r];
  Partial mine{-HUGE_VALF, 0.0f, 0.0f};
  for (int64_t v = int64_t{threadIdx.x} * kVector; v < V; v += kThreads * kVector) {
    float z[kVector];
    load_scores(row, bias, scale, v, V, aligned, z);
    Partial four{fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3])), 0.0f, 0.0f};
    const float base = four.top == -HUGE_VALF ? 0.0f : four.top;
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const float e = exp32(z[i] - base);
      four.sum += e;
      if (kEntropy) four.weighted += product(e, z[i] - base);
    }
    mine = merge(mine, four);
    if (target >= v && target < v + kVector) target_logit[r] = z[target - v];
  }
  if (threadIdx.x == 0 && (target < 0 || target >= V)) target_logit[r] = 0.0f;
  mine = block_merge(mine);
  if (threadIdx.x != 0) return;
  const Pair pair = two_sum(mine.top, logf(mine.sum));
  lse[r] = pair.high;
  lse[gridDim.x + r] = pair.low;
  if (kEntropy) entropy[r] = logf(mine.sum) - mine.weighted / mine.sum;
}

__device__ __forceinline__ void put(float* out, float x) { *out = x; }
__device__ __forceinline__ void put(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void put(__half* out, float x) { *out = __float2half_rn(x); }

struct Upstream {
  const float *lse, *entropy, *centre, *grad_logp, *grad_entropy;
};

template <class T>
__global__ void __launch_bounds__(kThreads) backward_kernel(
    float* logits, int64_t stride, int64_t V, const int64_t* targets, Upstream up, const float* bias,
    const float* temperature, const float* softcap, T* dlogits, int64_t out_stride, float* products) {
  const int64_t r = blockIdx.x;
  const float* row = logits + r * stride;
  T* out = dlogits + r * out_stride;
  const bool aligned = stride % kVector == 0;
  const Scale scale = make_scale(*temperature, softcap ? *softcap : 0.0f);
  const int64_t target = targets[r];
  const Pair lse{up.lse[r], up.lse[gridDim.x + r]};
  const float g = up.grad_logp[r], centre = up.centre[r];
  const float h = up.grad_entropy ? up.grad_entropy[r] : 0.0f, entropy = up.entropy ? up.entropy[r] : 0.0f;
  float sum = 0.0f;
  for (int64_t first = 0; first < V; first += kThreads * kVector) {
    const int64_t v = first + int64_t{threadIdx.x} * kVector;
    float z[kVector], dx[kVector];
    load_scores(row, bias, scale, v, V, aligned, z);
    // Narrow results overlap columns that other threads read in this step or in an earlier one.
    if (sizeof(T) < sizeof(float)) __syncthreads();
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      float dz = dscore(z[i], lse, entropy, g, h);
      if (v + i == target) dz += g;
      sum += product(dz, z[i] - centre);
      dx[i] = product(dz, scale.slope(z[i]));
      if (v + i < V) put(out + v + i, dx[i]);
    }
  }
  sum = block_sum(sum);
  if (threadIdx.x == 0) products[r] = sum;
}

const float* maybe(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

void row_softmax_forward(
    Tensor logits, Tensor targets, std::optional<Tensor> bias, Tensor temperature, std::optional<Tensor> softcap,
    Tensor lse, Tensor target_logit, std::optional<Tensor> entropy) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device());
  const auto rows = static_cast<unsigned>(logits.size(0));
  if (rows == 0) return;
  auto* ent = entropy.has_value() ? static_cast<float*>(entropy->mutable_data_ptr()) : nullptr;
  const auto kernel = ent ? forward_kernel<true> : forward_kernel<false>;
  kernel<<<rows, kThreads, 0, current_stream(logits)>>>(
      floats(logits), logits.stride(0), logits.size(1), static_cast<const int64_t*>(targets.const_data_ptr()),
      maybe(bias), floats(temperature), maybe(softcap), static_cast<float*>(lse.mutable_data_ptr()),
      static_cast<float*>(target_logit.mutable_data_ptr()), ent);
  check_launch("row_softmax_forward");
}

template <class T>
void launch_backward(
    Tensor& logits, const Tensor& targets, const Upstream& up, const float* bias, const Tensor& temperature,
    const float* softcap, Tensor& dlogits, Tensor& products) {
  backward_kernel<T><<<static_cast<unsigned>(logits.size(0)), kThreads, 0, current_stream(logits)>>>(
      static_cast<float*>(logits.mutable_data_ptr()), logits.stride(0), logits.size(1),
      static_cast<const int64_t*>(targets.const_data_ptr()), up, bias, floats(temperature),
      softcap, static_cast<T*>(dlogits.mutable_data_ptr()), dlogits.stride(0),
      static_cast<float*>(products.mutable_data_ptr()));
  check_launch("row_softmax_backward");
}

void row_softmax_backward(
    Tensor logits, Tensor targets, std::optional<Tensor> bias, Tensor temperature, std::optional<Tensor> softcap,
    Tensor lse, Tensor target_logit, std::optional<Tensor> entropy, Tensor grad_logp,
    std::optional<Tensor> grad_entropy, Tensor dlogits, Tensor products) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device());
  if (logits.size(0) == 0) return;
  const Upstream up{floats(lse), maybe(entropy), floats(target_logit), floats(grad_logp), maybe(grad_entropy)};
  switch (dlogits.scalar_type()) {
    case ScalarType::Float:
      return launch_backward<float>(logits, targets, up, maybe(bias), temperature, maybe(softcap), dlogits, products);
    case ScalarType::BFloat16:
      return launch_backward<__nv_bfloat16>(logits, targets, up, maybe(bias), temperature, maybe(softcap), dlogits, products);
    case ScalarType::Half:
      return launch_backward<__half>(logits, targets, up, maybe(bias), temperature, maybe(softcap), dlogits, products);
    default:
      STD_TORCH_CHECK(false, "row_softmax_backward: dlogits must be float32, bfloat16 or float16");
  }
}

}  // namespace
}  // namespace rime

STABLE_TORCH_LIBRARY_IMPL(rime_fast_C, CUDA, m) {
  m.impl("row_softmax_forward", TORCH_BOX(&rime::row_softmax_forward));
  m.impl("row_softmax_backward", TORCH_BOX(&rime::row_softmax_backward));
}
