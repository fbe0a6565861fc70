// The contrastive loss, element by element: what happens to one similarity of one tile. Shared by the CPU kernels
// (F = 16 floats, M = their comparison mask) and the CUDA kernels (F = float, M = bool); written once, tested on the CPU.
//
// One similarity x = q_i . k_j with logit s = x / tau enters two softmaxes, that of its row and that of its column:
//   row_i    = sum_j exp(s_ij - row_shift_i)   over columns that are not masked for the row
//   column_j = sum_i exp(s_ij - col_shift_j)   over rows that are not masked for the column
// A candidate is masked in both when ids are equal, and in one direction when x exceeds that direction's limit (the
// positive's similarity plus the margin). The labelled positive itself never passes through here: kernels lift it out
// of the tile first (a hole of -inf logit, whose exponential is 0) and report its logit; sums are those of its rivals.
// So no mask can hit it, and a loss near 0 keeps its digits: loss = log1p(rivals / exp(positive)), taken in fp64.
//
// When |s| <= kBounded for a whole call, both shifts are 0: ONE exponential then serves both directions, and the
// gradient exp(s - row_lse) a + exp(s - col_lse) b becomes exp(s) (a' + b').
//
// No include guard and no namespace: include it inside a namespace, once for each target it is compiled for. (GCC
// lowers vector operations of a template for the target in force where the template is defined.)

#ifndef RIME_HD
#if defined(__CUDACC__)
#define RIME_HD __host__ __device__ __forceinline__
#else
#define RIME_HD inline __attribute__((always_inline))
#endif
#endif

// |logit| up to here needs no shift in fp32: exp(+-60) times 1e6 rows stays inside the normal range, and so do the
// reciprocals that the gradient uses. Unit-norm embeddings at tau 0.02 give at most 50. (chunked.py holds the same.)
constexpr float kBounded = 60.0f;

template <class F, class M>
RIME_HD F keep(M masked, F value, F otherwise) {
  return masked ? otherwise : value;
}

// Larger of the running rival and this logit, NaN ignored (a NaN row is recognised by its sum).
template <class F>
RIME_HD F larger(F running, F logit) {
  return logit > running ? logit : running;
}

// Gradient of the loss to one logit, up to the term's factor: both softmaxes' shares.
template <class F, class M>
RIME_HD F slope(F exp_row, F exp_col, F row_coef, F col_coef, M row_masked, M col_masked) {
  return exp_row * keep(row_masked, row_coef, F{}) + exp_col * keep(col_masked, col_coef, F{});
}
