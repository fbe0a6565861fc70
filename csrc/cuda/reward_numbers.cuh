// Numbers of any dtype in memory, and exact dot products of them by one warp.
#pragma once
#include "common.cuh"

namespace rime::reward {
namespace {

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

  __device__ static float from_half(uint16_t half) {
    const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, power = (half >> 10) & 31u, rest = half & 0x3ffu;
    if (power == 0) return (sign != 0 ? -0x1p-24f : 0x1p-24f) * static_cast<float>(rest);
    return as_bits<float>(sign | (power == 31 ? 0x7f800000u : (power + 112) << 23) | rest << 13);
  }
};

struct Brain {
  uint16_t bits;
};
__device__ __forceinline__ double number(float x) { return x; }
__device__ __forceinline__ double number(Brain x) { return as_bits<float>(static_cast<uint32_t>(x.bits) << 16); }

// 16 bytes of numbers.
template <class T>
struct Vector {
  T values[16 / sizeof(T)];
};
template <class T>
__device__ __forceinline__ Vector<T> vector_at(const T* from) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  Vector<T> all;
  memcpy(&all, &bits, sizeof(all));
  return all;
}

// Sum of x_i y_i over every kWarp-th feature from this lane's on, four in flight.
template <class X, class Y>
__device__ double lane_dot(X x, Y y, int64_t n) {
  double sums[4] = {};
  int64_t i = threadIdx.x % kWarp;
  for (; i + 3 * kWarp < n; i += 4 * kWarp)
RIME_UNROLL
    for (int t = 0; t < 4; ++t) sums[t] += x(i + t * kWarp) * y(i + t * kWarp);
  for (; i < n; i += kWarp) sums[0] += x(i) * y(i);
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// The same of rows at multiples of 16 bytes, by loads of as many, of which kFlight are in flight.
template <int kFlight, class T>
__device__ double vector_dot(const T* x, const T* y, int64_t n) {
  constexpr int kVector = 16 / sizeof(T), kStride = kVector * kWarp;
  double sums[4] = {};
  int64_t i = threadIdx.x % kWarp * kVector;
  const auto add = [&](const Vector<T>& a, const Vector<T>& b) {
RIME_UNROLL
    for (int c = 0; c < kVector; ++c) sums[c % 4] += number(a.values[c]) * number(b.values[c]);
  };
  for (; i + (kFlight - 1) * kStride < n; i += kFlight * kStride) {
    Vector<T> a[kFlight], b[kFlight];
RIME_UNROLL
    for (int t = 0; t < kFlight; ++t) a[t] = vector_at(x + i + t * kStride), b[t] = vector_at(y + i + t * kStride);
RIME_UNROLL
    for (int t = 0; t < kFlight; ++t) add(a[t], b[t]);
  }
  for (; i < n; i += kStride) add(vector_at(x + i), vector_at(y + i));
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

template <int kFlight, class T>
__device__ double lane_dot(const void* a, int64_t a_start, const void* b, int64_t b_start, int64_t n) {
  const T *x = static_cast<const T*>(a) + a_start, *y = static_cast<const T*>(b) + b_start;
  if (at_sixteen(x) && at_sixteen(y) && n * sizeof(T) % 16 == 0) return vector_dot<kFlight>(x, y, n);
  return lane_dot([x](int64_t i) { return number(x[i]); }, [y](int64_t i) { return number(y[i]); }, n);
}

// Sum of a_i b_i in fp64 by one warp, on every lane, from these starts on. The two usual pairs of types know theirs.
template <int kFlight>
__device__ double warp_dot(const Numbers& a, int64_t a_start, const Numbers& b, int64_t b_start, int64_t n) {
  double mine;
  if (a.kind == kFloat && b.kind == kFloat)
    mine = lane_dot<kFlight, float>(a.data, a_start, b.data, b_start, n);
  else if (a.kind == kBrain && b.kind == kBrain)
    mine = lane_dot<kFlight, Brain>(a.data, a_start, b.data, b_start, n);
  else
    mine = lane_dot([&](int64_t i) { return a[a_start + i]; }, [&](int64_t i) { return b[b_start + i]; }, n);
  return warp_reduce(mine, Add{});
}

}  // namespace
}  // namespace rime::reward
