// The kernels of csrc/cuda/reward_*.cuh for ctypes, run on the host.
#include "../testing/cuda_on_host.h"

#include "../../csrc/cuda/reward_finish.cuh"

using namespace rime;
using namespace rime::reward;

extern "C" {

void begin(const void* gen, int gen_kind, const void* anchors, int anchor_kind, const int64_t* positive, double* own,
           float* norms, double* state, int64_t rows, int64_t group_size, int64_t positives, int64_t columns,
           int64_t width, int negative) {
  const auto blocks = static_cast<unsigned>((rows * (positives + 1) * kWarp + kThreads - 1) / kThreads);
  const Begin b{{gen, gen_kind}, {anchors, anchor_kind}, positive, own, norms, state, rows, group_size, positives,
                columns, width, negative};
  cuda_on_host::launch(blocks, 1, kThreads, 0, [=] { begin_kernel(b); });
}

void tile(const void* sims, bool exact, const void* gen, int gen_kind, const void* anchors, int anchor_kind,
          const float* anchor_norm, const float* norms, const double* own, const int64_t* positive, const bool* mask,
          double* state, int64_t rows, int64_t columns, int64_t stride, int64_t width, int64_t group_size,
          int64_t positives, int64_t first, int64_t mask_stride, int negative, double tau, double slack) {
  const Tile t{{gen, gen_kind}, {anchors, anchor_kind}, anchor_norm, norms,      own,       positive, mask,
               state,           columns,                stride,      width,      group_size, positives, first,
               mask_stride,     1.0 / tau,              static_cast<float>(slack)};
  const auto run = [&](auto* values, auto kernels) {
    const auto grid = static_cast<unsigned>(rows);
    cuda_on_host::launch(grid, static_cast<unsigned>(positives), kThreads, 0, [=] { kernels[negative](t, values); });
  };
  if (exact)
    run(static_cast<const double*>(sims), std::vector<void (*)(Tile, const double*)>{
        tile_kernel<double, kMean>, tile_kernel<double, kSoftmax>, tile_kernel<double, kMax>});
  else
    run(static_cast<const float*>(sims), std::vector<void (*)(Tile, const float*)>{
        tile_kernel<float, kMean>, tile_kernel<float, kSoftmax>, tile_kernel<float, kMax>});
}

void merge(const double* parts, double* state, int64_t n_parts, int64_t rows, int64_t size, int negative, double tau) {
  cuda_on_host::launch(static_cast<unsigned>((rows + kThreads - 1) / kThreads), 1, kThreads, 0,
                  [=] { merge_kernel(parts, state, n_parts, rows, size, negative, 1.0 / tau); });
}

// numbers: w_fmt, w_rank, w_refine, w_len, length_limit, eps.
static RewardSpec spec_of(const double* numbers, int score, int negative, int64_t hit_k, bool normalize) {
  return {numbers[0], numbers[1], numbers[2], numbers[3], numbers[4], numbers[5], score, negative, hit_k, normalize};
}

void finish(const double* states, const double* own, const bool* format_ok, const int64_t* lengths, const float* disc,
            float* out, float* rewards, float* advantages, int64_t stride, int64_t items, int64_t group_size,
            int64_t positives, const double* numbers, int score, int negative, int64_t hit_k, bool normalize) {
  const Finish f{states,      own,         format_ok, {lengths, kLong},   {disc, kFloat}, out,      rewards,
                 advantages,  {stride, 1}, {stride, 1}, items * group_size, group_size,     positives};
  const RewardSpec spec = spec_of(numbers, score, negative, hit_k, normalize);
  cuda_on_host::launch(static_cast<unsigned>(items), 1, kThreads, 0, [=] { finish_kernel(f, spec); });
}

void small(const void* gen, int gen_kind, const void* anchors, int anchor_kind, const int64_t* positive,
           const bool* mask, int64_t mask_stride, const bool* format_ok, const int64_t* lengths, const float* disc,
           float* rewards, float* advantages, int64_t stride, float* terms, int64_t items, int64_t group_size,
           int64_t columns, int64_t width, int64_t positives, double tau, const double* numbers, int score,
           int negative, int64_t hit_k, bool normalize) {
  const Small s{{gen, gen_kind},
                {anchors, anchor_kind},
                {lengths, kLong},
                {disc, kFloat},
                positive,
                mask,
                format_ok,
                rewards,
                advantages,
                terms,
                {stride, 1},
                {stride, 1},
                items,
                group_size,
                columns,
                width,
                positives,
                mask_stride,
                negative,
                1.0 / tau};
  const RewardSpec spec = spec_of(numbers, score, negative, hit_k, normalize);
  cuda_on_host::launch(static_cast<unsigned>(items), 1, kThreads,
                  static_cast<size_t>(small_room(group_size, width, positives)) * sizeof(double),
                  [=] { small_kernel(s, spec); });
}

}  // extern "C"
