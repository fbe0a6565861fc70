// CUDA kernels of score_rewrites_, the counterparts of csrc/cpu/reward.cpp with the same arithmetic
// (rime/reward.h), the larger banks' around cuBLAS's fp32 product of all rollouts with a tile of the bank.
//
//   rank_small   one block an item: a whole call over a bank of one tile, embeddings to advantages, all in fp64
//
// and for larger banks
//
//   rank_begin   one warp a rollout and own anchor: fp64 dot product; norms; first states      reads 2 D numbers
//   rank_tile    one block a rollout and own anchor: a sweep over its row of the tile, 16 bytes a load;
//                columns within the product's error of a threshold are formed again in fp64, a warp to a column
//   rank_merge   one thread a rollout            rank_finish   one block an item
//
// Sums go through a fixed tree, nothing is added atomically: the same input gives the same bits.
#include "reward_finish.cuh"

#include <torch/csrc/stable/library.h>

namespace rime::reward {
namespace {

unsigned blocks(int64_t tasks) { return static_cast<unsigned>((tasks + kThreads - 1) / kThreads); }

Numbers numbers(const MaybeTensor& tensor) {
  if (!tensor.has_value()) return {nullptr, kFloat};
  switch (tensor->scalar_type()) {
    case ScalarType::Float: return {tensor->data_ptr(), kFloat};
    case ScalarType::BFloat16: return {tensor->data_ptr(), kBrain};
    case ScalarType::Half: return {tensor->data_ptr(), kHalf};
    case ScalarType::Double: return {tensor->data_ptr(), kDouble};
    case ScalarType::Long: return {tensor->data_ptr(), kLong};
    case ScalarType::Int: return {tensor->data_ptr(), kInt};
    default: STD_TORCH_CHECK(false, "score_rewrites_: unexpected dtype"); return {nullptr, kFloat};
  }
}

void rank_begin(const Tensor& gen, const Tensor& anchors, const Tensor& positive, int64_t negative, Tensor own,
                Tensor norms, MaybeTensor state) {
  const torch::stable::accelerator::DeviceGuard guard(gen.get_device());
  STD_TORCH_CHECK(gen.is_contiguous() && anchors.is_contiguous(), "rank_begin: gen and anchors must be contiguous");
  const int64_t rows = gen.size(0), positives = own.size(1);
  const Begin b{numbers(gen), numbers(anchors), positive.const_data_ptr<int64_t>(), own.mutable_data_ptr<double>(),
                norms.mutable_data_ptr<float>(), state.has_value() ? state->mutable_data_ptr<double>() : nullptr,
                rows, rows / positive.size(0), positives, anchors.size(0), gen.size(1), static_cast<int>(negative)};
  begin_kernel<<<blocks(rows * (positives + 1) * kWarp), kThreads, 0, current_stream(gen)>>>(b);
  check_launch("rank_begin");
}

template <class S>
void launch_tile(const Tile& t, const S* sims, int64_t rows, int64_t negative, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(rows), static_cast<unsigned>(t.positives));
  if (negative == kMean)
    tile_kernel<S, kMean><<<grid, kThreads, 0, stream>>>(t, sims);
  else if (negative == kSoftmax)
    tile_kernel<S, kSoftmax><<<grid, kThreads, 0, stream>>>(t, sims);
  else
    tile_kernel<S, kMax><<<grid, kThreads, 0, stream>>>(t, sims);
  check_launch("rank_tile");
}

void rank_tile(const Tensor& sims, const Tensor& gen, const Tensor& tile, const Tensor& tile_norm,
               const Tensor& norms, const Tensor& own, const Tensor& positive, MaybeTensor mask,
               int64_t first, int64_t negative, double tau, double slack, Tensor state) {
  const torch::stable::accelerator::DeviceGuard guard(gen.get_device());
  STD_TORCH_CHECK(gen.is_contiguous() && tile.is_contiguous() && sims.stride(1) == 1, "rank_tile: rows must be whole");
  STD_TORCH_CHECK(sims.size(1) <= kMostColumns && own.size(1) <= UINT16_MAX, "rank_tile: too many columns or own anchors");
  Tile t{};
  t.gen = numbers(gen);
  t.anchors = numbers(tile);
  t.anchor_norm = tile_norm.const_data_ptr<float>();
  t.norms = norms.const_data_ptr<float>();
  t.own = own.const_data_ptr<double>();
  t.positive = positive.const_data_ptr<int64_t>();
  t.state = state.mutable_data_ptr<double>();
  t.columns = sims.size(1);
  t.stride = sims.stride(0);
  t.slack = static_cast<float>(slack);
  t.width = gen.size(1);
  t.group_size = gen.size(0) / positive.size(0);
  t.positives = own.size(1);
  t.first = first;
  t.inverse_tau = 1.0 / tau;
  if (mask.has_value()) {
    t.mask = mask->const_data_ptr<bool>();
    t.mask_stride = mask->stride(0);
  }
  if (sims.element_size() == sizeof(double))
    launch_tile(t, sims.const_data_ptr<double>(), gen.size(0), negative, current_stream(gen));
  else
    launch_tile(t, sims.const_data_ptr<float>(), gen.size(0), negative, current_stream(gen));
}

void rank_merge(const Tensor& parts, int64_t negative, double tau, Tensor state) {
  const torch::stable::accelerator::DeviceGuard guard(parts.get_device());
  merge_kernel<<<blocks(parts.size(1)), kThreads, 0, current_stream(parts)>>>(
      parts.const_data_ptr<double>(), state.mutable_data_ptr<double>(), parts.size(0), parts.size(1), parts.size(2),
      static_cast<int>(negative), 1.0 / tau);
  check_launch("rank_merge");
}

void rank_finish(const Tensor& state, const Tensor& own, const Tensor& format_ok, MaybeTensor lengths,
                 MaybeTensor disc_similarity, int64_t score, int64_t hit_k, int64_t negative, bool normalize,
                 double w_fmt, double w_rank, double w_refine, double w_len, double length_limit, double eps,
                 Tensor out, Tensor rewards, Tensor advantages) {
  const torch::stable::accelerator::DeviceGuard guard(state.get_device());
  const RewardSpec spec{w_fmt, w_rank, w_refine, w_len, length_limit, eps,
                        static_cast<int>(score), static_cast<int>(negative), hit_k, normalize};
  const Finish f{state.const_data_ptr<double>(),
                 own.const_data_ptr<double>(),
                 format_ok.const_data_ptr<bool>(),
                 numbers(lengths),
                 numbers(disc_similarity),
                 out.mutable_data_ptr<float>(),
                 rewards.mutable_data_ptr<float>(),
                 advantages.mutable_data_ptr<float>(),
                 {rewards.stride(0), rewards.stride(1)},
                 {advantages.stride(0), advantages.stride(1)},
                 own.size(0),
                 format_ok.size(1),
                 own.size(1)};
  finish_kernel<<<static_cast<unsigned>(format_ok.size(0)), kThreads, 0, current_stream(state)>>>(f, spec);
  check_launch("rank_finish");
}

void rank_small(const Tensor& gen, const Tensor& anchors, const Tensor& positive, MaybeTensor mask,
                const Tensor& format_ok, MaybeTensor lengths, MaybeTensor disc_similarity,
                int64_t positives, int64_t score, int64_t hit_k, int64_t negative, double tau, bool normalize,
                double w_fmt, double w_rank, double w_refine, double w_len, double length_limit, double eps,
                Tensor rewards, Tensor advantages, MaybeTensor terms) {
  const torch::stable::accelerator::DeviceGuard guard(gen.get_device());
  const RewardSpec spec{w_fmt, w_rank, w_refine, w_len, length_limit, eps,
                        static_cast<int>(score), static_cast<int>(negative), hit_k, normalize};
  Small s{};
  s.gen = numbers(gen);
  s.anchors = numbers(anchors);
  s.lengths = numbers(lengths);
  s.disc = numbers(disc_similarity);
  s.positive = positive.const_data_ptr<int64_t>();
  s.format_ok = format_ok.const_data_ptr<bool>();
  if (mask.has_value()) {
    s.mask = mask->const_data_ptr<bool>();
    s.mask_stride = mask->stride(0);
  }
  s.rewards = rewards.mutable_data_ptr<float>();
  s.advantages = advantages.mutable_data_ptr<float>();
  s.terms = terms.has_value() ? terms->mutable_data_ptr<float>() : nullptr;
  for (int i = 0; i < 2; ++i) {
    s.reward_strides[i] = rewards.stride(i);
    s.advantage_strides[i] = advantages.stride(i);
  }
  s.items = gen.size(0);
  s.group_size = gen.size(1);
  s.width = gen.size(2);
  s.columns = anchors.size(0);
  s.positives = positives;
  s.negative = static_cast<int>(negative);
  s.inverse_tau = 1.0 / tau;
  const auto room = static_cast<int>(sizeof(double) * small_room(s.group_size, s.width, positives));
  const cudaError_t error = cudaFuncSetAttribute(small_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room);
  STD_TORCH_CHECK(error == cudaSuccess, "rank_small: ", room, " bytes of shared memory: ", cudaGetErrorString(error));
  small_kernel<<<static_cast<unsigned>(s.items), kThreads, static_cast<size_t>(room), current_stream(gen)>>>(s, spec);
  check_launch("rank_small");
}

}  // namespace
}  // namespace rime::reward

STABLE_TORCH_LIBRARY_IMPL(rime_fast_C, CUDA, m) {
  m.impl("rank_small", TORCH_BOX(&rime::reward::rank_small));
  m.impl("rank_begin", TORCH_BOX(&rime::reward::rank_begin));
  m.impl("rank_tile", TORCH_BOX(&rime::reward::rank_tile));
  m.impl("rank_merge", TORCH_BOX(&rime::reward::rank_merge));
  m.impl("rank_finish", TORCH_BOX(&rime::reward::rank_finish));
}
