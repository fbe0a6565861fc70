// fp32 maths shared by the CPU and the CUDA kernels, written once for one number and for a vector of numbers.
//
// On the host V is float or Lanes (as many floats as a register of the instruction set holds, in GCC/Clang's vector
// extension); there are no branches, only selections. On the device V is float and exp and tanh are the hardware's
// exp2 and CUDA's tanhf.
//
// exp: e^x = 2^n e^r, n = round(x log2 e) by the 1.5 2^23 trick, r in +-0.347, e^r = 1 + r + r^2 q(r) with q of degree 4
// fitted to the least relative error (3e-9; with fp32's roundings 1e-7); below e^-87 the result is 0, above e^88 it is
// e^88; NaN gives NaN, whatever its payload.
// tanh: Taylor of degree 9 below 1/4, (1 - e^-2|x|) / (1 + e^-2|x|) above; relative error within 3e-7.
//
// No include guard: cpu/simd.h has this header and those on it (logprob.h, contrastive.h) compiled once for each
// instruction set, each time into another RIME_NAMESPACE. GCC lowers vector operations for the target in force where
// they are written, so one definition inlined everywhere would be as narrow as the plainest.
#ifndef RIME_FN
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__CUDACC__)
#define RIME_FN __host__ __device__ __forceinline__
#define RIME_UNROLL _Pragma("unroll")
#define RIME_ROLLED _Pragma("unroll 1")
#else
#define RIME_FN inline __attribute__((always_inline))
#define RIME_UNROLL _Pragma("GCC unroll 16")
#define RIME_ROLLED _Pragma("GCC unroll 1")
// Lanes never cross a real function call, so how a target would pass them does not matter.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif
#endif

#ifndef RIME_NAMESPACE
#define RIME_NAMESPACE rime::inline plain
#define RIME_VECTOR_BYTES 16
#endif

namespace RIME_NAMESPACE {

constexpr float kLog2e = 1.44269504088896341f;

RIME_FN float pick(bool condition, float yes, float no) { return condition ? yes : no; }

#if !defined(__CUDACC__)
constexpr int kLanes = RIME_VECTOR_BYTES / 4;
typedef float Lanes __attribute__((vector_size(RIME_VECTOR_BYTES)));
typedef int32_t LaneBits __attribute__((vector_size(RIME_VECTOR_BYTES)));

RIME_FN Lanes pick(LaneBits condition, Lanes yes, Lanes no) { return condition ? yes : no; }
RIME_FN Lanes fill(float value) { return Lanes{} + value; }

// Whole vectors.
RIME_FN Lanes load_lanes(const float* p) {
  Lanes x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
RIME_FN LaneBits load_lanes(const int32_t* p) {
  LaneBits x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
RIME_FN void store_lanes(float* p, Lanes x) { std::memcpy(p, &x, sizeof(x)); }

// `count` of them, where it is fewer: the rest of what is loaded is `other`.
RIME_FN Lanes load_lanes(const float* p, int64_t count, float other) {
  if (count >= kLanes) return load_lanes(p);
  Lanes x = fill(other);
  for (int64_t i = 0; i < count; ++i) x[i] = p[i];
  return x;
}
RIME_FN void store_lanes(float* p, int64_t count, Lanes x) {
  if (count >= kLanes) return store_lanes(p, x);
  for (int64_t i = 0; i < count; ++i) p[i] = x[i];
}

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

// a b as a number of its own: what it is subtracted from later must not see more digits of it (by an fma) than what it was
// compared with. At a logit of 10^6 half a digit is 0.03, and at 10^10 an exponential below the maximum would overflow.
template <class V, class W>
RIME_FN V rounded_product(V a, W b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#elif defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
  return __builtin_assoc_barrier(a * b);
#else
  return a * b;  // others fuse within one expression at most
#endif
}

template <class V>
RIME_FN V exp32(V x) {
#if defined(__CUDA_ARCH__)
  float power;  // one instruction; what would be subnormal is 0
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x * kLog2e));
  return power;
#else
  using Bits = std::conditional_t<std::is_same_v<V, float>, int32_t,
#if defined(__CUDACC__)
                                  int32_t>;
#else
                                  LaneBits>;
#endif
  // Adding 1.5 2^23 rounds to an integer, kept in the low bits; 127 more make it the exponent of 2^n.
  constexpr float kRound = 12582912.0f + 127.0f;
  V c = pick(x < -87.0f, V{} - 87.0f, x);
  c = pick(c > 88.0f, V{} + 88.0f, c);
  const V shifted = c * kLog2e + kRound;
  const V n = shifted - kRound;
  // ln 2 in two parts, the first with few enough bits for n * it to be exact.
  V r = c - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  V q = r * 1.38144672e-3f + 8.36878084e-3f;
  q = q * r + 4.16683927e-2f;
  q = q * r + 1.66665196e-1f;
  q = q * r + 4.99999940e-1f;
  const V p = q * r * r + r + 1.0f;
  return pick(x < -87.0f, V{}, p * as_bits<V>(as_bits<Bits>(shifted) << 23));
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

}  // namespace RIME_NAMESPACE
