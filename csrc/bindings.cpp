// Operator schemas of the compiled kernels. They are the private row kernels behind rime_fast.ops: each
// implementation registers itself beside its code (csrc/cpu, csrc/cuda) with STABLE_TORCH_LIBRARY_IMPL, and
// rime_fast/ops/native.py loads the library. Convention: outputs are passed in, "(a!)" marks what is written.
#include <torch/csrc/stable/library.h>

#include "cpu/simd.h"

namespace {

int64_t build_info() {
#ifdef RIME_WITH_CUDA
  return 3;
#else
  return 1;
#endif
}

int64_t cpu_level() { return rime::cpu_level(); }

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(rime_fast_C, m) {
  // Which kernels this build holds: bit 0 CPU, bit 1 CUDA.
  m.def("build_info() -> int");
  // The instruction set of the CPU kernels: 0 the plainest, 1 AVX2, 2 AVX-512 (csrc/cpu/simd.h; RIME_FAST_CPU).
  m.def("cpu_level() -> int");
  // The log-prob operator (rime_fast/ops/logprob_pool): rows of logits. `dlogits` is the memory of `logits`, on CUDA
  // also seen as bf16 or fp16 (the gradient is written over the logits it is made from).
  m.def(
      "row_softmax_forward(Tensor logits, Tensor targets, Tensor? bias, Tensor temperature, Tensor? softcap, "
      "Tensor(a!) lse, Tensor(b!) target_logit, Tensor(c!)? entropy) -> ()");
  m.def(
      "row_softmax_backward(Tensor(a!) logits, Tensor targets, Tensor? bias, Tensor temperature, Tensor? softcap, "
      "Tensor lse, Tensor target_logit, Tensor? entropy, Tensor grad_logp, Tensor? grad_entropy, "
      "Tensor(b!) dlogits, Tensor(c!) products) -> ()");
  // CPU: both, where the upstream gradient does not wait for the statistics.
  m.def(
      "row_softmax_both(Tensor(a!) logits, Tensor targets, Tensor? bias, Tensor temperature, Tensor? softcap, "
      "Tensor grad_logp, Tensor(b!) lse, Tensor(c!) target_logit, Tensor(d!)? entropy, Tensor(e!) dlogits, "
      "Tensor(f!)? products) -> ()");

  // Contrastive loss (csrc/*/contrastive.*). Both read one tile of similarities q k^T whose corner is (row0, col0) of the
  // whole; row and column arrays are those of the whole; labels, positive and positive_slope are [rows, positives].
  // Ids and `bounded` are int32, sums are float64, everything else float32. parts:
  // the parts of a tile's statistics (CUDA only). out: the memory of the tile, on CUDA also as bf16 or fp16.
  m.def(
      "contrast_statistics(Tensor(a!) tile, Tensor scale, int row0, int col0, Tensor labels, Tensor? row_ids, "
      "Tensor? col_ids, Tensor? row_limit, Tensor? col_limit, Tensor bounded, Tensor(b!) row_max, Tensor(c!) row_sum, "
      "Tensor(d!) col_max, Tensor(e!) col_sum, Tensor(f!) positive, Tensor(g!) rival, Tensor(h!)? parts) -> ()");
  m.def(
      "contrast_gradient(Tensor(a!) tile, Tensor scale, int row0, int col0, Tensor labels, Tensor? row_ids, "
      "Tensor? col_ids, Tensor? row_limit, Tensor? col_limit, Tensor bounded, Tensor row_shift, Tensor row_coef, "
      "Tensor col_shift, Tensor col_coef, Tensor positive_slope, Tensor factor, Tensor(b!) out) -> ()");
  // CUDA, one positive a query, of which query i's is key first + i; what is O(N) in a launch or two each, the formulas of
  // rime_fast/ops/contrastive/softmax.py. norm: raises largest[side], the bits of a float, to the largest norm of x's rows.
  m.def("contrast_norm(Tensor x, Tensor(a!) largest, int side) -> ()");
  m.def(
      "contrast_begin(Tensor temperature, Tensor norms, Tensor(a!) positive_temperature, Tensor(b!) scale, "
      "Tensor(c!) bounded) -> ()");
  m.def(
      "contrast_solve(Tensor row_max, Tensor row_sum, Tensor col_max, Tensor col_sum, Tensor positive, Tensor rival, "
      "int first, bool symmetric, Tensor(a!) rows, Tensor(b!) cols, Tensor(c!) parts, Tensor(d!) loss, "
      "Tensor(e!) hit) -> ()");
  m.def(
      "contrast_slopes(Tensor rows, Tensor cols, int first, bool symmetric, Tensor grad, Tensor temperature, "
      "int n_queries, Tensor(a!) row_shift, Tensor(b!) row_coef, Tensor(c!) col_shift, Tensor(d!) col_coef, "
      "Tensor(e!) positive_slope, Tensor(f!) factor, Tensor(g!)? unit) -> ()");
  // out = d unit, and products [rows] fp64 = d . x
  m.def("contrast_sized(Tensor d, Tensor x, Tensor? unit, Tensor(a!) out, Tensor(b!)? products) -> ()");
  // The same of nested widths (Matryoshka; CPU). parts: tiles of the products over the columns between one width and the
  // next. Statistics: all else is a list with a tensor a width, limits are empty without a margin. Gradient: parts
  // become the gradients to themselves; by_row, by_col [widths - 1, ...] fp64 receive sum G S of the inner widths.
  m.def(
      "nested_statistics(Tensor(a!)[] parts, Tensor scale, int row0, int col0, Tensor labels, Tensor? row_ids, "
      "Tensor? col_ids, Tensor[] row_norms, Tensor[] col_norms, Tensor[] row_limits, Tensor[] col_limits, "
      "Tensor bounded, Tensor(b!)[] row_max, Tensor(c!)[] row_sum, Tensor(d!)[] col_max, Tensor(e!)[] col_sum, "
      "Tensor(f!)[] positive, Tensor(g!)[] rival) -> ()");
  m.def(
      "nested_gradient(Tensor(a!)[] parts, Tensor scale, int row0, int col0, Tensor labels, Tensor? row_ids, "
      "Tensor? col_ids, Tensor[] row_norms, Tensor[] col_norms, Tensor[] row_limits, Tensor[] col_limits, "
      "Tensor bounded, Tensor[] row_shift, Tensor[] row_coef, Tensor[] col_shift, Tensor[] col_coef, "
      "Tensor[] positive_slope, Tensor[] factor, Tensor(b!) by_row, Tensor(c!) by_col) -> ()");

  // score_rewrites_ (csrc/*/reward.*): R = B G rollouts of width D, P own anchors an item, a tile of n anchors.
  // CUDA, a bank of one tile, everything in one launch: gen [B, G, D] -> rewards, advantages [B, G] of any strides, and
  // terms [12, B, G] as rank_finish's out
  m.def("rank_small(Tensor gen, Tensor anchors, Tensor positive, Tensor? mask, Tensor format_ok, Tensor? lengths, "
        "Tensor? disc_similarity, int positives, int score, int hit_k, int negative, float tau, bool normalize, "
        "float w_fmt, float w_rank, float w_refine, float w_len, float length_limit, float eps, Tensor(a!) rewards, "
        "Tensor(b!) advantages, Tensor(c!)? terms) -> ()");
  // CUDA: gen [R, D] -> norms [R] and first states, and own [R, P] fp64 from anchors [A, D] (NaN outside of them)
  m.def("rank_begin(Tensor gen, Tensor anchors, Tensor positive, int negative, Tensor(a!) own, Tensor(b!) norms, "
        "Tensor(c!)? state) -> ()");
  // CPU: gen [R, D], own_anchors [B, P, D] -> own [R, P] fp64, norms [R]
  m.def("rank_own(Tensor gen, Tensor own_anchors, Tensor(a!) own, Tensor(b!) norms) -> ()");
  // CPU. anchors [n, D] -> state [R, 4 + P]; mask [B, n]; first: the anchors' place in the bank
  m.def("rank_scan(Tensor gen, Tensor anchors, Tensor norms, Tensor own, Tensor positive, Tensor? mask, "
        "Tensor? largest_norm, int first, int negative, float tau, Tensor(a!) state) -> ()");
  // The same from their products: sims [R, n] fp64 (CUDA: or fp32), tile [n, D], tile_norm [1] the largest norm in it;
  // slack: how many times the roundings of fp32 products sims may have
  m.def("rank_tile(Tensor sims, Tensor gen, Tensor tile, Tensor tile_norm, Tensor norms, Tensor own, "
        "Tensor positive, Tensor? mask, int first, int negative, float tau, float slack, Tensor(a!) state) -> ()");
  // parts [W, R, 4 + P]: states of disjoint parts of a bank, merged in order into state
  m.def("rank_merge(Tensor parts, int negative, float tau, Tensor(a!) state) -> ()");
  // out [12, B, G]: reward, advantage, TERM_NAMES; rewards, advantages [B, G] of any strides. lengths and
  // disc_similarity are fp64 on the CPU
  m.def("rank_finish(Tensor state, Tensor own, Tensor format_ok, Tensor? lengths, Tensor? disc_similarity, int score, "
        "int hit_k, int negative, bool normalize, float w_fmt, float w_rank, float w_refine, float w_len, "
        "float length_limit, float eps, Tensor(a!) out, Tensor(b!) rewards, Tensor(c!) advantages) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(rime_fast_C, CompositeExplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&build_info));
  m.impl("cpu_level", TORCH_BOX(&cpu_level));
}
