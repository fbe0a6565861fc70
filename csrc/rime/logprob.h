// The maths of one row of logits, shared by csrc/cpu/logprob* and csrc/cuda/logprob*. Without a guard and in
// RIME_NAMESPACE, as math.h.
//
//   z_v = softcap(x_v + b_v) / temperature
//   forward:  m = max z, S = sum e^(z-m), E = sum e^(z-m) (z-m), target_logit = z[target]; two partial results merge by `merge`
//             lse + low = m + log S (two floats: at scores of 100 one float's rounding would show in every p),
//             entropy = log S - E / S (m is left out: it would cancel)
//   backward: dz_v = g ([v = target] - p_v) - h p_v (z_v - lse + entropy),  p_v = e^(z_v - lse - low)
//             dx_v = dz_v (1 - tanh^2) / temperature,  products = sum dz_v (z_v - centre)
//             = sum dz_v z_v, as sum dz = 0; a centre near the target's keeps the sum from cancelling
#include <rime/math.h>

namespace RIME_NAMESPACE {

struct Scale {
  float inv_temperature;
  float softcap;      // 0 = none
  float inv_softcap;  // 0 = none

  template <class V>
  RIME_FN V score(V x) const {
    return softcap == 0.0f ? rounded_product(x, inv_temperature)
                           : rounded_product(tanh32(x * inv_softcap), softcap * inv_temperature);
  }
  // d score / d x at a score z: (1 - tanh^2) / temperature, the tanh taken back from the score.
  template <class V>
  RIME_FN V slope(V z) const {
    if (softcap == 0.0f) return V{} + inv_temperature;
    const V t = z * (inv_softcap / inv_temperature);
    return (1.0f - t * t) * inv_temperature;
  }
};

RIME_FN Scale make_scale(float temperature, float softcap) {
  return {1.0f / temperature, softcap, softcap == 0.0f ? 0.0f : 1.0f / softcap};
}

// a b without the NaN of 0 * inf.
template <class V>
RIME_FN V product(V a, V b) {
  return pick(a == 0.0f, V{}, a * b);
}

// Max, sum of exponentials, and sum of exponentials times their exponent, of a part of a row.
struct Partial {
  float top;
  float sum;
  float weighted;
};

RIME_FN Partial merge(Partial a, Partial b) {
  const float top = a.top > b.top ? a.top : b.top;
  if (top == -HUGE_VALF) return {top, a.sum + b.sum, a.weighted + b.weighted};
  const float da = a.top - top, db = b.top - top;
  const float fa = exp32(da), fb = exp32(db);
  // sum e^(z-top) (z-top) = f (E + d S); a part at -inf has f = 0 and adds nothing.
  return {top, fa * a.sum + fb * b.sum, product(fa, a.weighted + da * a.sum) + product(fb, b.weighted + db * b.sum)};
}

// a + b, and what its rounding lost.
struct Pair {
  float high;
  float low;
};

RIME_FN Pair two_sum(float a, float b) {
  const float high = a + b;
  const float part = high - a;
  return {high, (a - (high - part)) + (b - part)};
}

// dz of a column that is not the target.
template <class V>
RIME_FN V dscore(V z, Pair lse, float entropy, float g, float h) {
  const V d = (z - lse.high) - lse.low;
  const V p = exp32(d);
  return p * -g - product(p, d + entropy) * h;
}

}  // namespace RIME_NAMESPACE
