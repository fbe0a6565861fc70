// The contrastive loss on CUDA: what happens to a tile of similarities between two library GEMMs (rime_fast/ops/contrastive makes
// the tiles). Kernels: contrastive_kernels.cuh. Scale, bound and factor are read on the device: nothing waits for the host.
#include "contrastive_kernels.cuh"

#include <torch/csrc/stable/library.h>

#include <algorithm>

namespace rime::contrastive {
namespace {

int64_t patches(int64_t size, int64_t patch) { return (size + patch - 1) / patch; }

CudaTile describe(const Tensor& tile, const Tensor& scale, int64_t row0, int64_t col0, const Tensor& labels,
                  const MaybeTensor& row_ids, const MaybeTensor& col_ids, const MaybeTensor& row_limit,
                  const MaybeTensor& col_limit, const Tensor& bounded, const Tensor& columns) {
  STD_TORCH_CHECK(tile.dim() == 2 && tile.stride(1) == 1 && tile.stride(0) % 4 == 0 && tile.stride(0) >= tile.size(1),
                  "tile must be a matrix of rows that start at multiples of 16 bytes");
  STD_TORCH_CHECK(tile.scalar_type() == ScalarType::Float, "tile must be float32");
  STD_TORCH_CHECK(labels.dim() == 2, "labels must be [rows, positives]");
  STD_TORCH_CHECK(row0 >= 0 && row0 + tile.size(0) <= labels.size(0), "tile rows lie outside the row arrays");
  STD_TORCH_CHECK(col0 >= 0 && col0 + tile.size(1) <= columns.size(0), "tile columns lie outside the column arrays");
  const int64_t positives = labels.size(1);
  return {at<float>(tile, 0), tile.stride(0), tile.size(0), tile.size(1), col0, at<const float>(scale, 0),
          at<const int32_t>(bounded, 0), at<const int64_t>(labels, row0 * positives), static_cast<int>(positives),
          at<int32_t>(row_ids, row0), at<int32_t>(col_ids, col0), at<float>(row_limit, row0),
          at<float>(col_limit, col0)};
}

void contrast_statistics(Tensor tile, Tensor scale, int64_t row0, int64_t col0, Tensor labels, MaybeTensor row_ids,
                         MaybeTensor col_ids, MaybeTensor row_limit, MaybeTensor col_limit, Tensor bounded,
                         Tensor row_max, Tensor row_sum, Tensor col_max, Tensor col_sum, Tensor positive, Tensor rival,
                         MaybeTensor parts) {
  const torch::stable::accelerator::DeviceGuard guard(tile.get_device());
  const CudaTile t =
      describe(tile, scale, row0, col0, labels, row_ids, col_ids, row_limit, col_limit, bounded, col_sum);
  const int64_t row_patches = patches(t.rows, kPatchRows), col_patches = patches(t.cols, kPatchCols);
  const int64_t row_floats = col_patches * 2 * t.rows, col_floats = row_patches * 2 * t.cols;
  STD_TORCH_CHECK(parts.has_value() && parts->size(0) >= row_floats + col_floats, "parts is too small for the tile");
  const CudaStatistics out{at<float>(*parts, 0), at<float>(*parts, row_floats),
                           at<float>(positive, row0 * t.positives)};
  const auto run = row_ids.has_value()
                       ? (row_limit.has_value() ? statistics_kernel<true, true> : statistics_kernel<true, false>)
                       : (row_limit.has_value() ? statistics_kernel<false, true> : statistics_kernel<false, false>);
  const cudaStream_t stream = current_stream(tile);
  const dim3 grid(static_cast<unsigned>(col_patches), static_cast<unsigned>(row_patches));
  run<<<grid, kThreads, 0, stream>>>(t, out);
  check_launch("contrast_statistics");
  const CudaRunning into{at<float>(row_max, row0), at<float>(col_max, col0), at<float>(rival, row0),
                         at<double>(row_sum, row0), at<double>(col_sum, col0)};
  const auto blocks = static_cast<unsigned>(patches(t.rows + t.cols, kMergeThreads));
  merge_kernel<<<blocks, kMergeThreads, 0, stream>>>(out, t.bounded, t.rows, t.cols, row_patches, col_patches, into);
  check_launch("contrast_statistics (merge)");
}

template <class T>
void launch_gradient(const CudaTile& t, const CudaSlopes& slopes, const Tensor& out, cudaStream_t stream) {
  const bool ids = t.row_id != nullptr, margin = t.row_limit != nullptr;
  const auto run = ids ? (margin ? gradient_kernel<T, true, true> : gradient_kernel<T, true, false>)
                       : (margin ? gradient_kernel<T, false, true> : gradient_kernel<T, false, false>);
  run<<<static_cast<unsigned>(t.rows), kThreads, 0, stream>>>(t, slopes, at<T>(out, 0), out.stride(0));
  check_launch("contrast_gradient");
}

void contrast_gradient(Tensor tile, Tensor scale, int64_t row0, int64_t col0, Tensor labels, MaybeTensor row_ids,
                       MaybeTensor col_ids, MaybeTensor row_limit, MaybeTensor col_limit, Tensor bounded,
                       Tensor row_shift, Tensor row_coef, Tensor col_shift, Tensor col_coef, Tensor positive_slope,
                       Tensor factor, Tensor out) {
  const torch::stable::accelerator::DeviceGuard guard(tile.get_device());
  const CudaTile t =
      describe(tile, scale, row0, col0, labels, row_ids, col_ids, row_limit, col_limit, bounded, col_coef);
  const CudaSlopes slopes{at<const float>(row_shift, row0), at<const float>(row_coef, row0),
                          at<const float>(col_shift, col0), at<const float>(col_coef, col0),
                          at<const float>(positive_slope, row0 * t.positives), at<const float>(factor, 0)};
  const cudaStream_t stream = current_stream(tile);
  with_float_type(out, "contrast_gradient: out", [&](auto type) {
    launch_gradient<decltype(type)>(t, slopes, out, stream);
  });
}

unsigned row_blocks(const Tensor& x) { return static_cast<unsigned>(patches(x.size(0), kPatchWarps)); }

void contrast_norm(Tensor x, Tensor largest, int64_t side) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device());
  STD_TORCH_CHECK(x.dim() == 2 && x.is_contiguous(), "x must be a contiguous matrix");
  if (x.size(0) == 0) return;
  with_float_type(x, "contrast_norm: x", [&](auto type) {
    using T = decltype(type);
    norm_kernel<T><<<row_blocks(x), kThreads, 0, current_stream(x)>>>(at<const T>(x), x.size(0), x.size(1),
                                                                      at<uint32_t>(largest, side));
  });
  check_launch("contrast_norm");
}

void contrast_begin(Tensor temperature, Tensor norms, Tensor positive_temperature, Tensor scale, Tensor bounded) {
  const torch::stable::accelerator::DeviceGuard guard(scale.get_device());
  begin_kernel<<<1, 1, 0, current_stream(scale)>>>(at<const float>(temperature), at<const uint32_t>(norms),
                                                  at<float>(positive_temperature), at<float>(scale),
                                                  at<int32_t>(bounded));
  check_launch("contrast_begin");
}

void contrast_solve(Tensor row_max, Tensor row_sum, Tensor col_max, Tensor col_sum, Tensor positive, Tensor rival,
                    int64_t first, bool symmetric, Tensor rows, Tensor cols, Tensor parts, Tensor loss, Tensor hit) {
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device());
  const int64_t losses = row_max.size(0), queries = row_max.size(1), keys = col_max.size(1);
  const int64_t blocks = patches(std::max(queries, keys), kThreads);
  STD_TORCH_CHECK(first >= 0 && first + queries <= keys, "the positives lie outside the keys");
  STD_TORCH_CHECK(parts.numel() >= losses * blocks * 2, "parts is too small");
  const CudaState from{at<const float>(row_max), at<const float>(col_max), at<const float>(rival),
                       at<const float>(positive), at<const double>(row_sum), at<const double>(col_sum),
                       queries, keys, first, symmetric};
  const cudaStream_t stream = current_stream(rows);
  const dim3 grid(static_cast<unsigned>(blocks), static_cast<unsigned>(losses));
  solve_kernel<<<grid, kThreads, 0, stream>>>(from, at<double>(rows), at<double>(cols), at<double>(parts));
  check_launch("contrast_solve");
  total_kernel<<<static_cast<unsigned>(losses), kThreads, 0, stream>>>(
      at<const double>(parts), blocks, static_cast<double>(queries), at<float>(loss), at<float>(hit));
  check_launch("contrast_solve (total)");
}

void contrast_slopes(Tensor rows, Tensor cols, int64_t first, bool symmetric, Tensor grad, Tensor temperature,
                     int64_t n_queries, Tensor row_shift, Tensor row_coef, Tensor col_shift, Tensor col_coef,
                     Tensor positive_slope, Tensor factor, MaybeTensor unit) {
  const torch::stable::accelerator::DeviceGuard guard(rows.get_device());
  const int64_t losses = rows.size(0), queries = rows.size(2), keys = cols.size(2);
  const dim3 grid(static_cast<unsigned>(patches(std::max(queries, keys), kThreads)), static_cast<unsigned>(losses));
  const CudaSlopesOut to{at<float>(row_shift), at<float>(row_coef), at<float>(col_shift), at<float>(col_coef),
                         at<float>(positive_slope), at<float>(factor), at<float>(unit)};
  slopes_kernel<<<grid, kThreads, 0, current_stream(rows)>>>(
      at<const double>(rows), at<const double>(cols), queries, keys, first, symmetric, at<const float>(grad),
      at<const float>(temperature), static_cast<double>(n_queries), to);
  check_launch("contrast_slopes");
}

void contrast_sized(Tensor d, Tensor x, MaybeTensor unit, Tensor out, MaybeTensor products) {
  const torch::stable::accelerator::DeviceGuard guard(d.get_device());
  STD_TORCH_CHECK(d.is_contiguous() && x.is_contiguous() && out.is_contiguous(), "expected contiguous matrices");
  if (d.size(0) == 0) return;
  with_float_type(out, "contrast_sized: out", [&](auto type) {
    using T = decltype(type);
    sized_kernel<T><<<row_blocks(d), kThreads, 0, current_stream(d)>>>(
        at<const float>(d), at<const T>(x), at<const float>(unit, 0), d.size(0), d.size(1), at<T>(out),
        at<double>(products, 0));
  });
  check_launch("contrast_sized");
}

}  // namespace
}  // namespace rime::contrastive

STABLE_TORCH_LIBRARY_IMPL(rime_fast_C, CUDA, m) {
  m.impl("contrast_statistics", TORCH_BOX(&rime::contrastive::contrast_statistics));
  m.impl("contrast_gradient", TORCH_BOX(&rime::contrastive::contrast_gradient));
  m.impl("contrast_norm", TORCH_BOX(&rime::contrastive::contrast_norm));
  m.impl("contrast_begin", TORCH_BOX(&rime::contrastive::contrast_begin));
  m.impl("contrast_solve", TORCH_BOX(&rime::contrastive::contrast_solve));
  m.impl("contrast_slopes", TORCH_BOX(&rime::contrastive::contrast_slopes));
  m.impl("contrast_sized", TORCH_BOX(&rime::contrastive::contrast_sized));
}
