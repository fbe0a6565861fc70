// The exact similarity of two fp32 vectors, one function for all of rank_reward: equal vectors give equal bits.
#pragma once
#include <cstdint>

namespace rime {

// Sum of x_i y_i in fp64, in an order that is fixed for n and the processor.
double exact_dot(const float* x, const float* y, int64_t n);

}  // namespace rime
