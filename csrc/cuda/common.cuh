// What the kernels of csrc/cuda share: reductions in a fixed order, numbers of any float type, four columns at a time,
// and the caller's stream. Compiled by nvcc, and for the CPU after tests/testing/cuda_on_host.h.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/shim_utils.h>

#include <optional>
#endif

#ifndef RIME_DYNAMIC_SHARED
#define RIME_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#endif

namespace rime {
namespace {

constexpr int kWarp = 32;
constexpr unsigned kAll = 0xffffffffu;

struct Add {
  template <class T>
  __device__ T operator()(T a, T b) const {
    return a + b;
  }
};

// __shfl_xor_sync of a number, or of a struct of 4-byte numbers.
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int step) {
  if constexpr (std::is_arithmetic_v<T>) {
    return __shfl_xor_sync(kAll, value, step);
  } else {
    constexpr int kWords = sizeof(T) / sizeof(float);
    float words[kWords];
    memcpy(words, &value, sizeof(T));
RIME_UNROLL
    for (int i = 0; i < kWords; ++i) words[i] = __shfl_xor_sync(kAll, words[i], step);
    memcpy(&value, words, sizeof(T));
    return value;
  }
}

// The values of a warp joined by a fixed tree, each time as op(lower lanes', higher lanes'), on every lane.
template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T mine, Op op) {
RIME_UNROLL
  for (int step = kWarp / 2; step > 0; step /= 2) {
    const T other = shuffle_xor(mine, step);
    mine = threadIdx.x & step ? op(other, mine) : op(mine, other);
  }
  return mine;
}

// The values of a block of kThreads, its warps' in order: on every thread, or (kFirst) in thread 0 alone.
template <int kThreads, bool kFirst = false, class T, class Op>
__device__ T block_reduce(T mine, Op op) {
  __shared__ T parts[kThreads / kWarp];
  mine = warp_reduce(mine, op);
  __syncthreads();  // the last call's parts have been read
  if (threadIdx.x % kWarp == 0) parts[threadIdx.x / kWarp] = mine;
  __syncthreads();
  if (kFirst && threadIdx.x != 0) return mine;
  T all = parts[0];
  for (int w = 1; w < kThreads / kWarp; ++w) all = op(all, parts[w]);
  return all;
}

__host__ __device__ __forceinline__ bool at_sixteen(const void* pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float wide(__half x) { return __half2float(x); }

__device__ __forceinline__ void put(float* at, float x) { *at = x; }
__device__ __forceinline__ void put(__nv_bfloat16* at, float x) { *at = __float2bfloat16_rn(x); }
__device__ __forceinline__ void put(__half* at, float x) { *at = __float2half_rn(x); }

// Four results in one store to global memory: 16 bytes, or 8 of a narrow type. __stcg rather than an assignment, which
// nvcc takes apart into four stores in some loops.
__device__ __forceinline__ void put_four(float* at, const float* g) {
  __stcg(reinterpret_cast<float4*>(at), float4{g[0], g[1], g[2], g[3]});
}
template <class Two>
__device__ __forceinline__ uint2 eight_bytes(Two low, Two high) {
  uint2 both;
  memcpy(&both.x, &low, sizeof(low));
  memcpy(&both.y, &high, sizeof(high));
  return both;
}
__device__ __forceinline__ uint2 packed(const __nv_bfloat16*, const float* g) {
  return eight_bytes(__floats2bfloat162_rn(g[0], g[1]), __floats2bfloat162_rn(g[2], g[3]));
}
__device__ __forceinline__ uint2 packed(const __half*, const float* g) {
  return eight_bytes(__floats2half2_rn(g[0], g[1]), __floats2half2_rn(g[2], g[3]));
}
template <class T>
__device__ __forceinline__ void put_four(T* at, const float* g) {
  __stcg(reinterpret_cast<uint2*>(at), packed(at, g));
}

// Four numbers in one load, as put_four stores them.
__device__ __forceinline__ void get_four(const float* at, float* x) {
  const float4 four = *reinterpret_cast<const float4*>(at);
  x[0] = four.x, x[1] = four.y, x[2] = four.z, x[3] = four.w;
}
template <class T>
__device__ __forceinline__ void get_four(const T* at, float* x) {
  const uint2 both = *reinterpret_cast<const uint2*>(at);
  T four[4];
  memcpy(four, &both, sizeof(both));
RIME_UNROLL
  for (int i = 0; i < 4; ++i) x[i] = wide(four[i]);
}

// A vector of results in one store, and of numbers in one load: 16 bytes of fp32, or of bf16 or fp16; 4 of the latter take
// 8.
template <int kCount, class T>
__device__ __forceinline__ void put_vector(T* at, const float* g) {
  if constexpr (kCount == 4) {
    put_four(at, g);
  } else {
    const uint2 low = packed(at, g), high = packed(at, g + 4);
    __stcg(reinterpret_cast<uint4*>(at), uint4{low.x, low.y, high.x, high.y});
  }
}
template <int kCount, class T>
__device__ __forceinline__ void get_vector(const T* at, float* x) {
  if constexpr (kCount == 4) {
    get_four(at, x);
  } else {
    const uint4 all = *reinterpret_cast<const uint4*>(at);
    T eight[8];
    memcpy(eight, &all, sizeof(all));
RIME_UNROLL
    for (int i = 0; i < 8; ++i) x[i] = wide(eight[i]);
  }
}

#if defined(__CUDACC__)
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

template <class T>
T* at(const Tensor& tensor, int64_t offset = 0) {
  return static_cast<T*>(tensor.data_ptr()) + offset;
}

// Null where there is no tensor.
template <class T>
T* at(const MaybeTensor& tensor, int64_t offset = 0) {
  return tensor.has_value() ? at<T>(*tensor, offset) : nullptr;
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  // Not STABLE_TORCH_ERROR_CODE_CHECK, which torch has from 2.13 on only.
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(const char* kernel) {
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, kernel, ": ", cudaGetErrorString(error));
}

// f(a value of the tensor's float type).
template <class F>
void with_float_type(const Tensor& tensor, const char* name, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(__nv_bfloat16{});
    case ScalarType::Half: return f(__half{});
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}
#endif

}  // namespace
}  // namespace rime
