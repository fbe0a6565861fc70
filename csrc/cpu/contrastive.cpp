// Contrastive loss on the CPU: what happens to a tile of similarities between two library GEMMs (see
// rime_fast/ops/contrastive for the tiling). Element maths and merges of parts: rime/contrastive.h, as on CUDA; loops:
// contrastive_kernels.h.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <vector>

namespace rime::contrastive {
namespace {

using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

constexpr int64_t kStripe = 256;  // columns a thread takes at a time; fixed, so that sums do not depend on threads

// One tile and its row and column data; column arrays are padded to a multiple of 16.
struct Tile {
  float* x;
  int64_t rows, cols;
  float scale, hole;  // 1/tau; the value whose logit is -inf
  const int64_t* label;  // [rows, positives] columns of the positives inside the tile, or outside [0, cols)
  int64_t positives;
  const int32_t* row_id;
  const int32_t* col_id;
  const float* row_limit;
  const float* col_limit;
  // statistics
  float* positive;
  float* col_max;
  float* col_sum;
  // gradient
  const float* row_shift;
  const float* row_coef;
  const float* col_shift;
  const float* col_coef;
  const float* positive_slope;  // [rows, positives] the gradient at the positives
  float factor;  // the term's common factor
};

struct StripePart {
  float max, sum, rival;
};

struct Kernels {
  void (*statistics[8])(const Tile&, int64_t, int64_t, StripePart*);
  void (*gradient[8])(const Tile&, int64_t, int64_t);
};

}  // namespace
}  // namespace rime::contrastive

#define RIME_KERNELS "contrastive_kernels.h"
#include "simd.h"

namespace rime::contrastive {
namespace {

using baseline::accumulate;
using baseline::larger;

int variant(bool bounded, bool ids, bool margin) { return (bounded ? 4 : 0) + (ids ? 2 : 0) + (margin ? 1 : 0); }

template <class T>
std::vector<T> padded(const T* from, int64_t count, T otherwise) {
  std::vector<T> out((count + 15) / 16 * 16, otherwise);
  if (from != nullptr) std::copy(from, from + count, out.begin());
  return out;
}

template <class T>
const T* at(const MaybeTensor& tensor, int64_t offset) {
  return tensor.has_value() ? static_cast<const T*>(tensor->data_ptr()) + offset : nullptr;
}

template <class T>
T* at(const Tensor& tensor, int64_t offset) {
  return static_cast<T*>(tensor.data_ptr()) + offset;
}

// Labels relative to the tile.
std::vector<int64_t> tile_labels(const Tensor& labels, int64_t row0, int64_t rows, int64_t col0) {
  const int64_t count = rows * labels.size(1);
  const int64_t* from = at<int64_t>(labels, row0 * labels.size(1));
  std::vector<int64_t> out(count);
  for (int64_t i = 0; i < count; ++i) out[i] = from[i] - col0;
  return out;
}

void check_tile(const Tensor& tile, const Tensor& labels, int64_t row0, const Tensor& columns, int64_t col0) {
  STD_TORCH_CHECK(tile.dim() == 2 && tile.is_contiguous() && tile.is_cpu(), "tile must be a contiguous CPU matrix");
  STD_TORCH_CHECK(tile.scalar_type() == torch::headeronly::ScalarType::Float, "tile must be float32");
  STD_TORCH_CHECK(labels.dim() == 2, "labels must be [rows, positives]");
  STD_TORCH_CHECK(row0 >= 0 && row0 + tile.size(0) <= labels.size(0), "tile rows lie outside the row arrays");
  STD_TORCH_CHECK(col0 >= 0 && col0 + tile.size(1) <= columns.size(0), "tile columns lie outside the column arrays");
}

void contrast_statistics(Tensor tile, Tensor scale_tensor, int64_t row0, int64_t col0, Tensor labels,
                         MaybeTensor row_ids, MaybeTensor col_ids, MaybeTensor row_limit, MaybeTensor col_limit,
                         Tensor is_bounded, Tensor row_max, Tensor row_sum, Tensor col_max, Tensor col_sum,
                         Tensor positive, Tensor rival, MaybeTensor) {
  check_tile(tile, labels, row0, col_sum, col0);
  const float scale = *at<float>(scale_tensor, 0);
  const bool bounded = *at<int32_t>(is_bounded, 0) != 0;
  const int64_t rows = tile.size(0), cols = tile.size(1), stripes = (cols + kStripe - 1) / kStripe;
  const auto label = tile_labels(labels, row0, rows, col0);
  const auto ids = padded(at<int32_t>(col_ids, col0), cols, int32_t(-1));
  const auto limits = padded(at<float>(col_limit, col0), cols, INFINITY);
  auto maxima = padded<float>(nullptr, cols, bounded ? 0.0f : -INFINITY);
  auto sums = padded<float>(nullptr, cols, 0.0f);
  Tile t{};
  t.x = at<float>(tile, 0), t.rows = rows, t.cols = cols;
  t.scale = scale, t.hole = scale < 0 ? INFINITY : -INFINITY;
  t.label = label.data(), t.positives = labels.size(1), t.positive = at<float>(positive, row0 * t.positives);
  t.row_id = at<int32_t>(row_ids, row0), t.col_id = ids.data();
  t.row_limit = at<float>(row_limit, row0), t.col_limit = limits.data();
  t.col_max = maxima.data(), t.col_sum = sums.data();

  const auto run = RIME_FOR_CPU(kernels).statistics[variant(bounded, row_ids.has_value(), row_limit.has_value())];
  std::vector<StripePart> parts(stripes * rows);
  torch::stable::parallel_for(0, stripes, 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s) {
      run(t, s * kStripe, std::min(cols, (s + 1) * kStripe), parts.data() + s * rows);
    }
  });
  for (int64_t i = 0; i < rows; ++i) {
    float* best = at<float>(rival, row0 + i);
    for (int64_t s = 0; s < stripes; ++s) {
      const StripePart& part = parts[s * rows + i];
      accumulate(part.max, part.sum, *at<float>(row_max, row0 + i), *at<double>(row_sum, row0 + i));
      *best = larger(*best, part.rival);
    }
  }
  for (int64_t j = 0; j < cols; ++j)
    accumulate(maxima[j], sums[j], *at<float>(col_max, col0 + j), *at<double>(col_sum, col0 + j));
}

void contrast_gradient(Tensor tile, Tensor scale_tensor, int64_t row0, int64_t col0, Tensor labels, MaybeTensor row_ids,
                       MaybeTensor col_ids, MaybeTensor row_limit, MaybeTensor col_limit, Tensor is_bounded,
                       Tensor row_shift, Tensor row_coef, Tensor col_shift, Tensor col_coef, Tensor positive_slope,
                       Tensor factor, Tensor out) {
  check_tile(tile, labels, row0, col_coef, col0);
  STD_TORCH_CHECK(out.data_ptr() == tile.data_ptr(), "out must be the tile");
  const float scale = *at<float>(scale_tensor, 0);
  const bool bounded = *at<int32_t>(is_bounded, 0) != 0;
  const int64_t rows = tile.size(0), cols = tile.size(1);
  const auto label = tile_labels(labels, row0, rows, col0);
  const auto ids = padded(at<int32_t>(col_ids, col0), cols, int32_t(-1));
  const auto limits = padded(at<float>(col_limit, col0), cols, INFINITY);
  const auto shift = padded<float>(at<float>(col_shift, col0), cols, 0.0f);
  const auto coef = padded<float>(at<float>(col_coef, col0), cols, 0.0f);
  Tile t{};
  t.x = at<float>(tile, 0), t.rows = rows, t.cols = cols;
  t.scale = scale, t.hole = scale < 0 ? INFINITY : -INFINITY;
  t.label = label.data(), t.positives = labels.size(1);
  t.row_id = at<int32_t>(row_ids, row0), t.col_id = ids.data();
  t.row_limit = at<float>(row_limit, row0), t.col_limit = limits.data();
  t.row_shift = at<float>(row_shift, row0), t.row_coef = at<float>(row_coef, row0);
  t.col_shift = shift.data(), t.col_coef = coef.data();
  t.positive_slope = at<float>(positive_slope, row0 * t.positives), t.factor = *at<float>(factor, 0);

  const auto run = RIME_FOR_CPU(kernels).gradient[variant(bounded, row_ids.has_value(), row_limit.has_value())];
  torch::stable::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) { run(t, begin, end); });
}

}  // namespace
}  // namespace rime::contrastive

STABLE_TORCH_LIBRARY_IMPL(rime_fast_C, CPU, m) {
  m.impl("contrast_statistics", TORCH_BOX(&rime::contrastive::contrast_statistics));
  m.impl("contrast_gradient", TORCH_BOX(&rime::contrastive::contrast_gradient));
}
