// The maths of one read-out, shared by csrc/cpu/pool.cpp and csrc/cuda/pool.cu: m = mean of rows [start, end),
// e = m * inv_norm; backward dm = inv_norm (g - e (e . g)), of which every row of the span gets 1 / (end - start).
#pragma once

#include <rime/math.h>

namespace rime {

constexpr float kNormFloor = 1e-12f;

RIME_FN float inverse_norm(float squares) {
  const float norm = sqrtf(squares);
  // Written so that a NaN stays one.
  return 1.0f / (norm < kNormFloor ? kNormFloor : norm);
}

// Below the floor the norm is a constant, and e's own direction is not taken out of the gradient.
RIME_FN bool norm_is_constant(float inv_norm) { return inv_norm >= 1.0f / kNormFloor; }

RIME_FN float pool_gradient(float g, float e, float along, float factor) { return (g - e * along) * factor; }

}  // namespace rime
