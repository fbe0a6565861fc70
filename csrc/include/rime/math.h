// fp32 maths shared by the CPU and the CUDA kernels, written once for one number and for a vector of numbers.
//
// On the host V is float or Lanes (16 floats in GCC/Clang's vector extension, which the compiler maps to whatever
// registers the target has); there are no branches, only selections. On the device V is float and exp and tanh are
// the hardware's exp2 and CUDA's tanhf.
//
// exp: e^x = 2^n e^r, n = round(x log2 e) by the 1.5 2^23 trick, r in +-0.347, e^r by its Taylor polynomial of degree
// 6 (relative error 1e-7); below e^-87 the result is 0, above e^88 it is e^88; NaN gives NaN.
// tanh: Taylor of degree 9 below 1/4, (1 - e^-2|x|) / (1 + e^-2|x|) above; relative error within 3e-7.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define RIME_FN __host__ __device__ __forceinline__
#else
#define RIME_FN inline __attribute__((always_inline))
#endif

namespace rime {

constexpr float kLog2e = 1.44269504088896341f;

RIME_FN float pick(bool condition, float yes, float no) { return condition ? yes : no; }

#if !defined(__CUDACC__)
// Lanes never cross a real function call, so how a target would pass them does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"

constexpr int kLanes = 16;
typedef float Lanes __attribute__((vector_size(4 * kLanes)));
typedef int32_t LaneBits __attribute__((vector_size(4 * kLanes)));

RIME_FN Lanes pick(LaneBits condition, Lanes yes, Lanes no) { return condition ? yes : no; }
RIME_FN Lanes fill(float value) { return Lanes{} + value; }

RIME_FN float lane_sum(Lanes x) {
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += x[i];
  return total;
}

RIME_FN float lane_max(Lanes x) {
  float top = x[0];
  for (int i = 1; i < kLanes; ++i) top = x[i] > top ? x[i] : top;
  return top;
}
#endif

// The same bits as a number of another type of the same size.
template <class To, class From>
RIME_FN To as_bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

template <class V>
RIME_FN V exp32(V x) {
#if defined(__CUDA_ARCH__)
  return exp2f(x * kLog2e);
#else
  using Bits = std::conditional_t<std::is_same_v<V, float>, int32_t,
#if defined(__CUDACC__)
                                  int32_t>;
#else
                                  LaneBits>;
#endif
  constexpr float kRound = 12582912.0f;  // 1.5 2^23: adding it rounds to an integer, kept in the low bits
  V c = pick(x < -87.0f, V{} - 87.0f, x);
  c = pick(c > 88.0f, V{} + 88.0f, c);
  const V shifted = c * kLog2e + kRound;
  const V n = shifted - kRound;
  // ln 2 in two parts, the first with few enough bits for n * it to be exact.
  V r = c - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V p = r * (1.0f / 720.0f) + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // The low byte of `shifted` is n in two's complement: moved to the exponent it multiplies by 2^n.
  const Bits power = (as_bits<Bits>(shifted) + 127) << 23;
  return pick(x < -87.0f, V{}, p * as_bits<V>(power));
#endif
}

template <class V>
RIME_FN V tanh32(V x) {
#if defined(__CUDA_ARCH__)
  return tanhf(x);
#else
  const V a = pick(x < 0.0f, -x, x);
  const V s = x * x;
  const V series = x + x * s * (-1.0f / 3.0f + s * (2.0f / 15.0f + s * (-17.0f / 315.0f + s * (62.0f / 2835.0f))));
  const V e = exp32(a * -2.0f);
  const V far = (1.0f - e) / (1.0f + e);
  return pick(a < 0.25f, series, pick(x < 0.0f, -far, far));
#endif
}

}  // namespace rime
