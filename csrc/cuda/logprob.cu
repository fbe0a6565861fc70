// The log-prob operator on CUDA: rows of logits between two library products (rime_fast/ops/logprob_pool/cuda.py).
// Kernels: logprob_kernels.cuh. Nothing waits for the host.
#include "logprob_kernels.cuh"

#include <torch/csrc/stable/library.h>

namespace rime::logprob {
namespace {

// Whether rows, and the bias, are whole vectors of 16 bytes of logits, and of as many results.
bool aligned(const Tensor& logits, const Head& head, int64_t stride_out = 0) {
  const int64_t group = 16 / static_cast<int64_t>(logits.element_size());
  return logits.stride(0) % group == 0 && logits.size(1) % group == 0 && stride_out % group == 0 &&
         at_sixteen(logits.data_ptr()) && at_sixteen(head.bias);
}

Head head_of(const Tensor& logits, const MaybeTensor& bias, const Tensor& temperature, const MaybeTensor& softcap) {
  STD_TORCH_CHECK(logits.size(1) <= INT32_MAX - Trip::kSize, "row_softmax: a row has too many logits");
  return {static_cast<int>(logits.size(1)), at<float>(bias), at<float>(temperature), at<float>(softcap)};
}

template <class L, bool kEntropy>
auto forward_of(bool plain, bool aligned) {
  if (plain) return aligned ? forward_kernel<L, kEntropy, true, true> : forward_kernel<L, kEntropy, true, false>;
  return aligned ? forward_kernel<L, kEntropy, false, true> : forward_kernel<L, kEntropy, false, false>;
}

void row_softmax_forward(Tensor logits, Tensor targets, MaybeTensor bias, Tensor temperature, MaybeTensor softcap,
                         Tensor lse, Tensor target_logit, MaybeTensor entropy) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device());
  const auto rows = static_cast<unsigned>(logits.size(0));
  if (rows == 0) return;
  const Head head = head_of(logits, bias, temperature, softcap);
  const bool plain = !bias.has_value() && !softcap.has_value();
  const bool whole = aligned(logits, head);
  with_float_type(logits, "row_softmax_forward: logits", [&](auto type) {
    using L = decltype(type);
    const auto kernel = entropy.has_value() ? forward_of<L, true>(plain, whole) : forward_of<L, false>(plain, whole);
    kernel<<<rows, Trip::kThreads, 0, current_stream(logits)>>>(
        at<L>(logits), logits.stride(0), head, at<int64_t>(targets),
        Statistics{at<float>(lse), at<float>(target_logit), at<float>(entropy)});
  });
  check_launch("row_softmax_forward");
}

template <class L, class T>
auto backward_of(bool plain, bool aligned) {
  if (plain) return aligned ? backward_kernel<L, T, true, true> : backward_kernel<L, T, true, false>;
  return aligned ? backward_kernel<L, T, false, true> : backward_kernel<L, T, false, false>;
}

void row_softmax_backward(Tensor logits, Tensor targets, MaybeTensor bias, Tensor temperature, MaybeTensor softcap,
                          Tensor lse, Tensor target_logit, MaybeTensor entropy, Tensor grad_logp,
                          MaybeTensor grad_entropy, Tensor dlogits, Tensor products) {
  const torch::stable::accelerator::DeviceGuard guard(logits.get_device());
  const auto rows = static_cast<unsigned>(logits.size(0));
  if (rows == 0) return;
  STD_TORCH_CHECK(dlogits.data_ptr() == logits.data_ptr(), "row_softmax_backward: dlogits must be the logits' memory");
  const Head head = head_of(logits, bias, temperature, softcap);
  const bool plain = !bias.has_value() && !softcap.has_value() && !grad_entropy.has_value();
  const bool whole = aligned(logits, head, dlogits.stride(0));
  const Upstream up{at<float>(lse), at<float>(target_logit), at<float>(entropy), at<float>(grad_logp),
                    at<float>(grad_entropy)};
  with_float_type(dlogits, "row_softmax_backward: dlogits", [&](auto type) {
    using T = decltype(type);
    const auto launch = [&](auto narrow) {
      using L = decltype(narrow);
      backward_of<L, T>(plain, whole)<<<rows, Trip::kThreads, 0, current_stream(logits)>>>(
          at<L>(logits), logits.stride(0), head, at<int64_t>(targets), up, at<T>(dlogits), dlogits.stride(0),
          at<float>(products));
    };
    if (logits.scalar_type() == dlogits.scalar_type()) return launch(T{});
    STD_TORCH_CHECK(logits.scalar_type() == ScalarType::Float, "row_softmax_backward: logits must be fp32 or dlogits' type");
    launch(float{});
  });
  check_launch("row_softmax_backward");
}

}  // namespace
}  // namespace rime::logprob

STABLE_TORCH_LIBRARY_IMPL(rime_fast_C, CUDA, m) {
  m.impl("row_softmax_forward", TORCH_BOX(&rime::logprob::row_softmax_forward));
  m.impl("row_softmax_backward", TORCH_BOX(&rime::logprob::row_softmax_backward));
}
