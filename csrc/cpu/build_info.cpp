// Says what was compiled into this library (rime-fast doctor prints it).
#include <torch/csrc/stable/library.h>

namespace {
int64_t build_info() {
#ifdef RIME_WITH_CUDA
  return 3;
#else
  return 1;
#endif
}
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(rime_fast_C, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
}
