// The contrastive loss on CUDA: what happens to a tile of similarities between two library GEMMs (rime_fast/ops/contrastive makes
// the tiles). Kernels: contrastive_kernels.cuh. Scale, bound and factor are read on the device: nothing waits for the host.
#include "contrastive_kernels.cuh"

#include <torch/csrc/stable/library.h>

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
  const int64_t row_floats = col_patches * 3 * t.rows, col_floats = row_patches * 2 * t.cols;
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
  const auto blocks = static_cast<unsigned>(patches(t.rows + t.cols, kThreads));
  merge_kernel<<<blocks, kThreads, 0, stream>>>(out, t.rows, t.cols, row_patches, col_patches, into);
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

}  // namespace
}  // namespace rime::contrastive

STABLE_TORCH_LIBRARY_IMPL(rime_fast_C, CUDA, m) {
  m.impl("contrast_statistics", TORCH_BOX(&rime::contrastive::contrast_statistics));
  m.impl("contrast_gradient", TORCH_BOX(&rime::contrastive::contrast_gradient));
}
