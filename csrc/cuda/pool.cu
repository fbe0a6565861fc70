// Read-outs of operator A on CUDA.
//
// Forward: one block a read-out; threads own columns and walk the span's rows in order, then the block sums the squares.
// Backward, two launches: the e . g of every read-out, then one block per 128 columns that walks all read-outs in
// order, so that spans which share rows add up in one fixed order without atomics. Bytes: the spans' rows once each way.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <rime/pool.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include "launch.h"

namespace rime {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kBand = 128;

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float wide(__half x) { return __half2float(x); }
__device__ __forceinline__ void put(float* out, float x) { *out = x; }
__device__ __forceinline__ void put(__nv_bfloat16* out, float x) { *out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void put(__half* out, float x) { *out = __float2half_rn(x); }

// The sum over the block, in every thread.
__device__ float block_sum(float mine) {
  __shared__ float parts[kThreads / 32];
  for (int step = 16; step > 0; step /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, step);
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = mine;
  __syncthreads();
  float total = 0.0f;
  for (int w = 0; w < kThreads / 32; ++w) total += parts[w];
  return total;
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(
    const T* hidden, int64_t stride, int64_t width, const int64_t* starts, const int64_t* ends, bool normalize,
    float* pooled, float* inv_norm) {
  const int64_t k = blockIdx.x, first = starts[k], last = ends[k];
  const float share = 1.0f / static_cast<float>(last - first);
  float* e = pooled + k * width;
  float squares = 0.0f;
  for (int64_t c = threadIdx.x; c < width; c += kThreads) {
    float sum = 0.0f;
    for (int64_t row = first; row < last; ++row) sum += wide(hidden[row * stride + c]);
    sum *= share;
    squares += sum * sum;
    e[c] = sum;
  }
  const float scale = normalize ? inverse_norm(block_sum(squares)) : 1.0f;
  for (int64_t c = threadIdx.x; c < width; c += kThreads) e[c] *= scale;
  if (threadIdx.x == 0) inv_norm[k] = scale;
}

// factors [2, K]: e . g (0 where the norm is a constant), and inv_norm / (end - start).
__global__ void __launch_bounds__(kThreads) along_kernel(
    const float* grad, const float* pooled, const float* inv_norm, const int64_t* starts, const int64_t* ends,
    int64_t width, bool normalize, float* factors) {
  const int64_t k = blockIdx.x;
  const bool projects = normalize && !norm_is_constant(inv_norm[k]);
  float dot = 0.0f;
  if (projects)
    for (int64_t c = threadIdx.x; c < width; c += kThreads) dot += grad[k * width + c] * pooled[k * width + c];
  dot = block_sum(dot);
  if (threadIdx.x != 0) return;
  factors[k] = dot;
  factors[gridDim.x + k] = inv_norm[k] / static_cast<float>(ends[k] - starts[k]);
}

template <class T>
__global__ void __launch_bounds__(kBand) add_kernel(
    T* grad_hidden, int64_t stride, int64_t width, const float* grad, const float* pooled, const float* factors,
    const int64_t* starts, const int64_t* ends, int64_t count) {
  const int64_t c = int64_t{blockIdx.x} * kBand + threadIdx.x;
  if (c >= width) return;
  for (int64_t k = 0; k < count; ++k) {
    const float dm = pool_gradient(grad[k * width + c], pooled[k * width + c], factors[k], factors[count + k]);
    for (int64_t row = starts[k]; row < ends[k]; ++row) {
      T* out = grad_hidden + row * stride + c;
      put(out, wide(*out) + dm);
    }
  }
}

template <class F>
void with_float_type(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    case ScalarType::Half: return f(__half{});
    default: STD_TORCH_CHECK(false, "pool: hidden must be float32, bfloat16 or float16");
  }
}

const int64_t* longs(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }
const float* floats(const Tensor& tensor) { return static_cast<const float*>(tensor.const_data_ptr()); }

void pool_forward(Tensor hidden, Tensor starts, Tensor ends, bool normalize, Tensor pooled, Tensor inv_norm) {
  const torch::stable::accelerator::DeviceGuard guard(hidden.get_device());
  const auto count = static_cast<unsigned>(starts.size(0));
  if (count == 0) return;
  with_float_type(hidden, [&](auto tag) {
    using T = decltype(tag);
    forward_kernel<T><<<count, kThreads, 0, current_stream(hidden)>>>(
        static_cast<const T*>(hidden.const_data_ptr()), hidden.stride(0), hidden.size(1), longs(starts), longs(ends),
        normalize, static_cast<float*>(pooled.mutable_data_ptr()), static_cast<float*>(inv_norm.mutable_data_ptr()));
  });
  check_launch("pool_forward");
}

void pool_backward(
    Tensor grad_hidden, Tensor grad, Tensor pooled, Tensor inv_norm, Tensor starts, Tensor ends, bool normalize) {
  const torch::stable::accelerator::DeviceGuard guard(grad_hidden.get_device());
  const int64_t count = starts.size(0), width = grad_hidden.size(1);
  if (count == 0) return;
  const cudaStream_t stream = current_stream(grad_hidden);
  Tensor factors = torch::stable::new_empty(inv_norm, {2, count});
  auto* scratch = static_cast<float*>(factors.mutable_data_ptr());
  along_kernel<<<static_cast<unsigned>(count), kThreads, 0, stream>>>(
      floats(grad), floats(pooled), floats(inv_norm), longs(starts), longs(ends), width, normalize, scratch);
  check_launch("pool_backward (factors)");
  const auto bands = static_cast<unsigned>((width + kBand - 1) / kBand);
  with_float_type(grad_hidden, [&](auto tag) {
    using T = decltype(tag);
    add_kernel<T><<<bands, kBand, 0, stream>>>(
        static_cast<T*>(grad_hidden.mutable_data_ptr()), grad_hidden.stride(0), width, floats(grad), floats(pooled),
        scratch, longs(starts), longs(ends), count);
  });
  check_launch("pool_backward (add)");
}

}  // namespace
}  // namespace rime

STABLE_TORCH_LIBRARY_IMPL(rime_fast_C, CUDA, m) {
  m.impl("pool_forward", TORCH_BOX(&rime::pool_forward));
  m.impl("pool_backward", TORCH_BOX(&rime::pool_backward));
}
