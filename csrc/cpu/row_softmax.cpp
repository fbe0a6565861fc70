// Row kernels of the log-prob operator on the CPU: logits [R, V] fp32 -> statistics per row, and -> their gradient in place.
//
// A row is read once, in tiles of 4 KiB that stay in L1: one sweep for the tile's scores and maximum, one for the
// exponentials, partial results merged online; 16 columns at a time (rime/math.h), compiled for several instruction
// sets of which the loader picks one (target_clones). Threads take whole rows, so a result depends on
// neither the thread count nor the other rows. Bytes: 4V a row forward, 8V backward.
#include <rime/row_softmax.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__linux__)
#define RIME_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define RIME_CLONES
#endif

namespace rime {

using torch::stable::Tensor;

constexpr int64_t kTile = 1024;

// 16 floats from `p`, of which `count` are there; the rest is `other`.
RIME_FN Lanes load(const float* p, int64_t count, float other) {
  Lanes x = fill(other);
  if (count >= kLanes) {
    std::memcpy(&x, p, sizeof(x));
  } else {
    for (int64_t i = 0; i < count; ++i) x[i] = p[i];
  }
  return x;
}

RIME_FN void store(float* p, int64_t count, Lanes x) {
  if (count >= kLanes) {
    std::memcpy(p, &x, sizeof(x));
  } else {
    for (int64_t i = 0; i < count; ++i) p[i] = x[i];
  }
}

// A tile's scores into `z` (padded by -inf to whole vectors), and their maximum. A NaN is no maximum: it comes out
// through the exponentials.
RIME_FN float tile_scores(const float* x, const float* bias, const Scale& scale, int64_t count, Lanes* z) {
  Lanes top = fill(-HUGE_VALF);
  for (int64_t v = 0; v < count; v += kLanes) {
    Lanes s = load(x + v, count - v, -HUGE_VALF);
    if (bias) s += load(bias + v, count - v, 0.0f);
    Lanes scored = scale.score(s);
    if (scale.softcap != 0.0f && count - v < kLanes)  // softcap(-inf) is finite
      for (int64_t i = count - v; i < kLanes; ++i) scored[i] = -HUGE_VALF;
    *z++ = scored;
    top = pick(scored > top, scored, top);
  }
  return lane_max(top);
}

template <bool kEntropy>
RIME_FN Partial tile_partial(const Lanes* z, int64_t vectors, float top) {
  const float base = top == -HUGE_VALF ? 0.0f : top;
  Lanes sum{}, weighted{};
  for (int64_t i = 0; i < vectors; ++i) {
    const Lanes d = z[i] - base;
    const Lanes e = exp32(d);
    sum += e;
    if (kEntropy) weighted += product(e, d);
  }
  return {top, lane_sum(sum), kEntropy ? lane_sum(weighted) : 0.0f};
}

RIME_CLONES void row_forward(
    const float* x, int64_t vocabulary, int64_t target, const float* bias, const Scale& scale, Pair* lse,
    float* target_logit, float* entropy) {
  Lanes z[kTile / kLanes];
  Partial all{-HUGE_VALF, 0.0f, 0.0f};
  float found = 0.0f;
  for (int64_t first = 0; first < vocabulary; first += kTile) {
    const int64_t count = vocabulary - first < kTile ? vocabulary - first : kTile;
    const int64_t vectors = (count + kLanes - 1) / kLanes;
    const float top = tile_scores(x + first, bias ? bias + first : nullptr, scale, count, z);
    if (target >= first && target < first + count) found = z[(target - first) / kLanes][(target - first) % kLanes];
    all = merge(all, entropy ? tile_partial<true>(z, vectors, top) : tile_partial<false>(z, vectors, top));
  }
  *lse = two_sum(all.top, std::log(all.sum));
  *target_logit = found;
  if (entropy) *entropy = std::log(all.sum) - all.weighted / all.sum;
}

// One tile's gradient over its logits; the sum of dz (z - centre). kPlain: no entropy gradient and no softcap.
template <bool kPlain>
RIME_FN float tile_gradient(
    float* x, const Lanes* z, int64_t count, Pair lse, float entropy, float centre, float g, float h,
    const Scale& scale) {
  Lanes sum{};
  for (int64_t v = 0; v < count; v += kLanes, ++z) {
    const Lanes dz = kPlain ? exp32((*z - lse.high) - lse.low) * -g : dscore(*z, lse, entropy, g, h);
    sum += product(dz, *z - centre);
    store(x + v, count - v, kPlain ? dz * scale.inv_temperature : dz * scale.slope(*z));
  }
  return lane_sum(sum);
}

RIME_CLONES float row_backward(
    float* x, int64_t vocabulary, int64_t target, Pair lse, float entropy, float centre, float g, float h,
    const float* bias, const Scale& scale) {
  Lanes z[kTile / kLanes];
  double products = 0.0;
  const bool plain = h == 0.0f && scale.softcap == 0.0f;
  for (int64_t first = 0; first < vocabulary; first += kTile) {
    const int64_t count = vocabulary - first < kTile ? vocabulary - first : kTile;
    float* tile = x + first;
    tile_scores(tile, bias ? bias + first : nullptr, scale, count, z);
    products += plain ? tile_gradient<true>(tile, z, count, lse, entropy, centre, g, h, scale)
                      : tile_gradient<false>(tile, z, count, lse, entropy, centre, g, h, scale);
    if (target >= first && target < first + count) {
      const float at = z[(target - first) / kLanes][(target - first) % kLanes];
      x[target] += g * scale.slope(at);
      products += product(g, at - centre);
    }
  }
  return static_cast<float>(products);
}

const float* maybe(const std::optional<Tensor>& tensor) {
  return tensor.has_value() ? static_cast<const float*>(tensor->const_data_ptr()) : nullptr;
}

Scale scale_of(const Tensor& temperature, const std::optional<Tensor>& softcap) {
  const float* cap = maybe(softcap);
  return make_scale(*static_cast<const float*>(temperature.const_data_ptr()), cap ? *cap : 0.0f);
}

void row_softmax_forward(
    Tensor logits, Tensor targets, std::optional<Tensor> bias, Tensor temperature, std::optional<Tensor> softcap,
    Tensor lse, Tensor target_logit, std::optional<Tensor> entropy) {
  const int64_t rows = logits.size(0), vocabulary = logits.size(1), stride = logits.stride(0);
  const Scale scale = scale_of(temperature, softcap);
  const auto* x = static_cast<const float*>(logits.const_data_ptr());
  const auto* t = static_cast<const int64_t*>(targets.const_data_ptr());
  auto* l = static_cast<float*>(lse.mutable_data_ptr());
  auto* found = static_cast<float*>(target_logit.mutable_data_ptr());
  auto* ent = entropy.has_value() ? static_cast<float*>(entropy->mutable_data_ptr()) : nullptr;
  const float* b = maybe(bias);
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      Pair pair;
      row_forward(x + r * stride, vocabulary, t[r], b, scale, &pair, found + r, ent ? ent + r : nullptr);
      l[r] = pair.high;
      l[rows + r] = pair.low;
    }
  });
}

void row_softmax_backward(
    Tensor logits, Tensor targets, std::optional<Tensor> bias, Tensor temperature, std::optional<Tensor> softcap,
    Tensor lse, Tensor target_logit, std::optional<Tensor> entropy, Tensor grad_logp,
    std::optional<Tensor> grad_entropy, Tensor dlogits, Tensor products) {
  // On the CPU the gradient replaces the logits in the same dtype; `dlogits` is the same memory.
  (void)dlogits;
  const int64_t rows = logits.size(0), vocabulary = logits.size(1), stride = logits.stride(0);
  const Scale scale = scale_of(temperature, softcap);
  auto* x = static_cast<float*>(logits.mutable_data_ptr());
  const auto* t = static_cast<const int64_t*>(targets.const_data_ptr());
  const auto* l = static_cast<const float*>(lse.const_data_ptr());
  const auto* c = static_cast<const float*>(target_logit.const_data_ptr());
  const auto* g = static_cast<const float*>(grad_logp.const_data_ptr());
  auto* sums = static_cast<float*>(products.mutable_data_ptr());
  const float *b = maybe(bias), *ent = maybe(entropy), *h = maybe(grad_entropy);
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      sums[r] = row_backward(
          x + r * stride, vocabulary, t[r], Pair{l[r], l[rows + r]}, ent ? ent[r] : 0.0f, c[r], g[r], h ? h[r] : 0.0f, b, scale);
  });
}

}  // namespace rime

STABLE_TORCH_LIBRARY_IMPL(rime_fast_C, CPU, m) {
  m.impl("row_softmax_forward", TORCH_BOX(&rime::row_softmax_forward));
  m.impl("row_softmax_backward", TORCH_BOX(&rime::row_softmax_backward));
}
