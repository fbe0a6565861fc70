// Compiles RIME_KERNELS, a header of kernels, once for each instruction set, and says which of them runs.
//
// A .cpp defines RIME_KERNELS and includes this file once, after what the kernels need. The header defines, for
// RIME_NAMESPACE and registers of RIME_VECTOR_BYTES, a table of functions named `kernels` of the .cpp's type Kernels;
// RIME_FOR_CPU(kernels) is the one to call. One level serves the whole process: the widest that the processor has, or
// what RIME_FAST_CPU allows (read once; the words are those of ATEN_CPU_CAPABILITY), so that tests reach every level on
// one machine. Levels round differently (fused multiply-add, order of sums), runs of one level do not.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <cstdlib>
#include <string_view>

// Clang has no `#pragma GCC target`: there the plainest level is the only one, built for the compiler's own target.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define RIME_X86_LEVELS 1
#endif

namespace rime {

constexpr const char* kLevelNames[] = {"default", "avx2", "avx512"};

// 0, 1 or 2: an index of kLevelNames.
inline int cpu_level() {
  static const int level = [] {
    int allowed = 2;
    if (const char* wanted = std::getenv("RIME_FAST_CPU"); wanted != nullptr && *wanted != '\0') {
      allowed = 0;
      while (allowed < 3 && std::string_view(wanted) != kLevelNames[allowed]) ++allowed;
      STD_TORCH_CHECK(allowed < 3, "RIME_FAST_CPU is ", wanted, ", expected default, avx2 or avx512");
    }
#ifdef RIME_X86_LEVELS
    if (allowed > 1 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
      return 2;
    if (allowed > 0 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
  }();
  return level;
}

}  // namespace rime

#ifdef RIME_KERNELS
#undef RIME_NAMESPACE
#undef RIME_VECTOR_BYTES

#define RIME_NAMESPACE rime::baseline
#define RIME_VECTOR_BYTES 16
#include RIME_KERNELS
#undef RIME_NAMESPACE
#undef RIME_VECTOR_BYTES

#ifdef RIME_X86_LEVELS
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#define RIME_NAMESPACE rime::avx2
#define RIME_VECTOR_BYTES 32
#include RIME_KERNELS
#undef RIME_NAMESPACE
#undef RIME_VECTOR_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,fma,prefer-vector-width=512")
#define RIME_NAMESPACE rime::avx512
#define RIME_VECTOR_BYTES 64
#include RIME_KERNELS
#undef RIME_NAMESPACE
#undef RIME_VECTOR_BYTES
#pragma GCC pop_options

#define RIME_FOR_CPU(table)                \
  (rime::cpu_level() == 2   ? rime::avx512::table \
   : rime::cpu_level() == 1 ? rime::avx2::table   \
                            : rime::baseline::table)
#else
#define RIME_FOR_CPU(table) (rime::baseline::table)
#endif
#endif  // RIME_KERNELS
