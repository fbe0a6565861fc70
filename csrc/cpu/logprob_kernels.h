// One row of logits: statistics, and gradient in place. logprob.cpp has simd.h compile this file once for each
// instruction set.
//
// A row is read once, in tiles of 4 KiB that stay in L1: one sweep for the tile's scores and maximum, one for the
// exponentials, partial results merged online.
#include <rime/logprob.h>

namespace RIME_NAMESPACE {
namespace {

using logprob::Head;
using logprob::Upstream;

constexpr int64_t kTile = 1024;

// A tile's scores into `z` (padded by -inf to whole vectors), and their maximum. A NaN is no maximum: it comes out
// through the exponentials.
RIME_FN float tile_scores(const float* x, const float* bias, const Scale& scale, int64_t count, Lanes* z) {
  Lanes top = fill(-HUGE_VALF);
  for (int64_t v = 0; v < count; v += kLanes) {
    Lanes s = load_lanes(x + v, count - v, -HUGE_VALF);
    if (bias) s += load_lanes(bias + v, count - v, 0.0f);
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

// lse: two floats, `stride` apart. entropy may be null.
void row_forward(const float* x, const Head& head, int64_t target, float* lse, int64_t stride,
                 float* target_logit, float* entropy) {
  const Scale scale = make_scale(head.temperature, head.softcap);
  Lanes z[kTile / kLanes];
  Partial all{-HUGE_VALF, 0.0f, 0.0f};
  float found = 0.0f;
  for (int64_t first = 0; first < head.vocabulary; first += kTile) {
    const int64_t count = head.vocabulary - first < kTile ? head.vocabulary - first : kTile;
    const int64_t vectors = (count + kLanes - 1) / kLanes;
    const float top = tile_scores(x + first, head.bias ? head.bias + first : nullptr, scale, count, z);
    if (target >= first && target < first + count) found = z[(target - first) / kLanes][(target - first) % kLanes];
    all = merge(all, entropy ? tile_partial<true>(z, vectors, top) : tile_partial<false>(z, vectors, top));
  }
  const Pair pair = two_sum(all.top, std::log(all.sum));
  lse[0] = pair.high;
  lse[stride] = pair.low;
  *target_logit = found;
  if (entropy) *entropy = std::log(all.sum) - all.weighted / all.sum;
}

// One tile's gradient over its logits; the sum of dz (z - z[target]). kPlain: no entropy gradient and no softcap.
template <bool kPlain>
RIME_FN float tile_gradient(float* x, const Lanes* z, int64_t count, const Upstream& up, const Scale& scale) {
  const Pair lse{up.lse, up.low};
  const float g = up.grad_logp;
  Lanes sum{};
  for (int64_t v = 0; v < count; v += kLanes, ++z) {
    const Lanes dz = kPlain ? exp32((*z - lse.high) - lse.low) * -g : dscore(*z, lse, up.entropy, g, up.grad_entropy);
    sum += product(dz, *z - up.target_logit);
    store_lanes(x + v, count - v, kPlain ? dz * scale.inv_temperature : dz * scale.slope(*z));
  }
  return lane_sum(sum);
}

// Returns the sum of dz (z - z[target]).
float row_backward(float* x, const Head& head, int64_t target, const Upstream& up) {
  const Scale scale = make_scale(head.temperature, head.softcap);
  Lanes z[kTile / kLanes];
  double products = 0.0;
  const bool plain = up.grad_entropy == 0.0f && scale.softcap == 0.0f;
  for (int64_t first = 0; first < head.vocabulary; first += kTile) {
    const int64_t count = head.vocabulary - first < kTile ? head.vocabulary - first : kTile;
    float* tile = x + first;
    tile_scores(tile, head.bias ? head.bias + first : nullptr, scale, count, z);
    products += plain ? tile_gradient<true>(tile, z, count, up, scale)
                      : tile_gradient<false>(tile, z, count, up, scale);
    if (target >= first && target < first + count) {
      const float at = z[(target - first) / kLanes][(target - first) % kLanes];
      // dz first: g slope added to the rounded -g slope would leave the rounding where p is exactly 1.
      const float rest = dscore(at, Pair{up.lse, up.low}, up.entropy, up.grad_logp, up.grad_entropy);
      x[target] = (rest + up.grad_logp) * scale.slope(at);
      products += product(up.grad_logp, at - up.target_logit);
    }
  }
  return static_cast<float>(products);
}

constexpr logprob::Kernels kernels = {&row_forward, &row_backward};

}  // namespace
}  // namespace RIME_NAMESPACE
