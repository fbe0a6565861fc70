// Read-outs of operator A on the CPU. Forward: threads take read-outs, a span's rows are summed in order in fp32.
// Backward: threads take bands of columns and walk all read-outs in order, so that spans which share rows add up
// without races and always in the same order. Bytes: the spans' rows once each way.
#include <rime/pool.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <vector>

namespace rime {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class F>
void with_float_type(const Tensor& tensor, const F& f) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(torch::headeronly::BFloat16{});
    case ScalarType::Half: return f(torch::headeronly::Half{});
    default: STD_TORCH_CHECK(false, "pool: hidden must be float32, bfloat16 or float16");
  }
}

template <class T>
void forward_rows(
    const T* hidden, int64_t stride, int64_t width, const int64_t* starts, const int64_t* ends, int64_t begin,
    int64_t end, bool normalize, float* out, float* inv_norm) {
  for (int64_t k = begin; k < end; ++k) {
    float* e = out + k * width;
    std::fill(e, e + width, 0.0f);
    for (int64_t row = starts[k]; row < ends[k]; ++row) {
      const T* x = hidden + row * stride;
      for (int64_t c = 0; c < width; ++c) e[c] += static_cast<float>(x[c]);
    }
    const float share = 1.0f / static_cast<float>(ends[k] - starts[k]);
    float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
    for (int64_t c = 0; c < width; ++c) {
      e[c] *= share;
      squares += e[c] * e[c];
    }
    const float scale = normalize ? inverse_norm(squares) : 1.0f;
    for (int64_t c = 0; c < width; ++c) e[c] *= scale;
    inv_norm[k] = scale;
  }
}

void pool_forward(Tensor hidden, Tensor starts, Tensor ends, bool normalize, Tensor pooled, Tensor inv_norm) {
  const int64_t count = starts.size(0), width = hidden.size(1), stride = hidden.stride(0);
  const auto* first = static_cast<const int64_t*>(starts.const_data_ptr());
  const auto* last = static_cast<const int64_t*>(ends.const_data_ptr());
  auto* out = static_cast<float*>(pooled.mutable_data_ptr());
  auto* norms = static_cast<float*>(inv_norm.mutable_data_ptr());
  with_float_type(hidden, [&](auto tag) {
    using T = decltype(tag);
    const auto* x = static_cast<const T*>(hidden.const_data_ptr());
    torch::stable::parallel_for(0, count, 1 + 16384 / (width + 1), [&](int64_t begin, int64_t end) {
      forward_rows(x, stride, width, first, last, begin, end, normalize, out, norms);
    });
  });
}

void pool_backward(
    Tensor grad_hidden, Tensor grad, Tensor pooled, Tensor inv_norm, Tensor starts, Tensor ends, bool normalize) {
  const int64_t count = starts.size(0), width = grad_hidden.size(1), stride = grad_hidden.stride(0);
  const auto* first = static_cast<const int64_t*>(starts.const_data_ptr());
  const auto* last = static_cast<const int64_t*>(ends.const_data_ptr());
  const auto* g = static_cast<const float*>(grad.const_data_ptr());
  const auto* e = static_cast<const float*>(pooled.const_data_ptr());
  const auto* norms = static_cast<const float*>(inv_norm.const_data_ptr());
  std::vector<float> along(count, 0.0f), factor(count);
  torch::stable::parallel_for(0, count, 1 + 16384 / (width + 1), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      factor[k] = (normalize ? norms[k] : 1.0f) / static_cast<float>(last[k] - first[k]);
      if (!normalize || norm_is_constant(norms[k])) continue;
      float dot = 0.0f;
#pragma omp simd reduction(+ : dot)
      for (int64_t c = 0; c < width; ++c) dot += g[k * width + c] * e[k * width + c];
      along[k] = dot;
    }
  });
  with_float_type(grad_hidden, [&](auto tag) {
    using T = decltype(tag);
    auto* out = static_cast<T*>(grad_hidden.mutable_data_ptr());
    torch::stable::parallel_for(0, width, 1 + 16384 / (count + 1), [&](int64_t begin, int64_t end) {
      for (int64_t k = 0; k < count; ++k)
        for (int64_t row = first[k]; row < last[k]; ++row) {
          T* x = out + row * stride;
          for (int64_t c = begin; c < end; ++c)
            x[c] = static_cast<T>(
                static_cast<float>(x[c]) + pool_gradient(g[k * width + c], e[k * width + c], along[k], factor[k]));
        }
    });
  });
}

}  // namespace rime

STABLE_TORCH_LIBRARY_IMPL(rime_fast_C, CPU, m) {
  m.impl("pool_forward", TORCH_BOX(&rime::pool_forward));
  m.impl("pool_backward", TORCH_BOX(&rime::pool_backward));
}
