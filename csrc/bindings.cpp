// Operator schemas of the compiled kernels. They are the private row kernels behind rime_fast.ops: each
// implementation registers itself beside its code (csrc/cpu, csrc/cuda) with STABLE_TORCH_LIBRARY_IMPL, and
// rime_fast/ops/native.py loads the library. Convention: outputs are passed in, "(a!)" marks what is written.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(rime_fast_C, m) {
  // Which kernels this build holds: bit 0 CPU, bit 1 CUDA.
  m.def("build_info() -> int");
}
