// Row kernels of the log-prob operator on the CPU: logits [R, V] fp32 -> statistics per row, and -> their gradient in
// place. Loops: logprob_kernels.h. Threads take whole rows, so a result depends on neither the thread count nor the
// other rows. Bytes: 4V a row forward, 8V backward; both at once 8V, as a row stays in L2 between them.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace rime::logprob {
namespace {

// What all rows share; bias may be null, a softcap of 0 is none.
struct Head {
  int64_t vocabulary;
  const float* bias;
  float temperature, softcap;
};

// What the gradient of a row needs; lse + low is its log-sum-exp.
struct Upstream {
  float lse, low, entropy, target_logit, grad_logp, grad_entropy;
};

struct Kernels {
  void (*forward)(const float*, const Head&, int64_t, float*, int64_t, float*, float*);
  float (*backward)(float*, const Head&, int64_t, const Upstream&);
};

}  // namespace
}  // namespace rime::logprob

#define RIME_KERNELS "logprob_kernels.h"
#include "simd.h"

namespace rime::logprob {
namespace {

using torch::stable::Tensor;

const float* maybe(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

Head head_of(const Tensor& logits, const std::optional<Tensor>& bias, const Tensor& temperature,
             const std::optional<Tensor>& softcap) {
  const float* cap = maybe(softcap);
  return {logits.size(1), maybe(bias), *static_cast<const float*>(temperature.const_data_ptr()), cap ? *cap : 0.0f};
}

void row_softmax_forward(Tensor logits, Tensor targets, std::optional<Tensor> bias, Tensor temperature,
                         std::optional<Tensor> softcap, Tensor lse, Tensor target_logit,
                         std::optional<Tensor> entropy) {
  const int64_t rows = logits.size(0), stride = logits.stride(0);
  const Head head = head_of(logits, bias, temperature, softcap);
  const auto run = RIME_FOR_CPU(kernels).forward;
  const auto* x = static_cast<const float*>(logits.const_data_ptr());
  const auto* t = static_cast<const int64_t*>(targets.const_data_ptr());
  auto* l = static_cast<float*>(lse.mutable_data_ptr());
  auto* found = static_cast<float*>(target_logit.mutable_data_ptr());
  auto* ent = entropy.has_value() ? static_cast<float*>(entropy->mutable_data_ptr()) : nullptr;
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      run(x + r * stride, head, t[r], l + r, rows, found + r, ent ? ent + r : nullptr);
  });
}

void row_softmax_backward(Tensor logits, Tensor targets, std::optional<Tensor> bias, Tensor temperature,
                          std::optional<Tensor> softcap, Tensor lse, Tensor target_logit, std::optional<Tensor> entropy,
                          Tensor grad_logp, std::optional<Tensor> grad_entropy, Tensor dlogits, Tensor products) {
  // On the CPU the gradient replaces the logits in the same dtype; `dlogits` is the same memory.
  (void)dlogits;
  const int64_t rows = logits.size(0), stride = logits.stride(0);
  const Head head = head_of(logits, bias, temperature, softcap);
  const auto run = RIME_FOR_CPU(kernels).backward;
  auto* x = static_cast<float*>(logits.mutable_data_ptr());
  const auto* t = static_cast<const int64_t*>(targets.const_data_ptr());
  const auto* l = static_cast<const float*>(lse.const_data_ptr());
  const auto* hit = static_cast<const float*>(target_logit.const_data_ptr());
  const auto* g = static_cast<const float*>(grad_logp.const_data_ptr());
  auto* sums = static_cast<float*>(products.mutable_data_ptr());
  const float *ent = maybe(entropy), *h = maybe(grad_entropy);
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      sums[r] = run(x + r * stride, head, t[r],
                    {l[r], l[rows + r], ent ? ent[r] : 0.0f, hit[r], g[r], h ? h[r] : 0.0f});
  });
}

void row_softmax_both(Tensor logits, Tensor targets, std::optional<Tensor> bias, Tensor temperature,
                      std::optional<Tensor> softcap, Tensor grad_logp, Tensor lse, Tensor target_logit,
                      std::optional<Tensor> entropy, Tensor dlogits, std::optional<Tensor> products) {
  (void)dlogits;
  const int64_t rows = logits.size(0), stride = logits.stride(0);
  const Head head = head_of(logits, bias, temperature, softcap);
  const Kernels run = RIME_FOR_CPU(kernels);
  auto* x = static_cast<float*>(logits.mutable_data_ptr());
  const auto* t = static_cast<const int64_t*>(targets.const_data_ptr());
  const auto* g = static_cast<const float*>(grad_logp.const_data_ptr());
  auto* l = static_cast<float*>(lse.mutable_data_ptr());
  auto* hit = static_cast<float*>(target_logit.mutable_data_ptr());
  auto* ent = entropy.has_value() ? static_cast<float*>(entropy->mutable_data_ptr()) : nullptr;
  auto* sums = products.has_value() ? static_cast<float*>(products->mutable_data_ptr()) : nullptr;
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      float* row = x + r * stride;
      run.forward(row, head, t[r], l + r, rows, hit + r, ent ? ent + r : nullptr);
      const float sum = run.backward(row, head, t[r], {l[r], l[rows + r], 0.0f, hit[r], g[r], 0.0f});
      if (sums != nullptr) sums[r] = sum;
    }
  });
}

}  // namespace
}  // namespace rime::logprob

STABLE_TORCH_LIBRARY_IMPL(rime_fast_C, CPU, m) {
  m.impl("row_softmax_forward", TORCH_BOX(&rime::logprob::row_softmax_forward));
  m.impl("row_softmax_backward", TORCH_BOX(&rime::logprob::row_softmax_backward));
  m.impl("row_softmax_both", TORCH_BOX(&rime::logprob::row_softmax_both));
}
