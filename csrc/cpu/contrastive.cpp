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

constexpr int64_t kMostWidths = 16;

// The partial products of nested widths (a tile of each), and the inverse norms of their rows and columns.
struct Nested {
  const Tile* tile;
  const float* const* row_norm;  // of the tile's rows
  const float* const* col_norm;  // padded, as a tile's
  int64_t widths;
  int64_t stride;  // between the widths' statistics
};

struct Kernels {
  void (*statistics[8])(const Tile&, int64_t, int64_t, StripePart*);
  void (*gradient[8])(const Tile&, int64_t, int64_t);
  void (*prefix)(const Nested&, int64_t, int64_t, int64_t, float*);
  void (*nested_statistics[4])(const Nested&, int64_t, int64_t, StripePart*);
  void (*nested_gradient[8])(const Nested&, int64_t, float*, float* const*, float*);
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

// One tile with its padded column arrays, which live as long as it does.
struct Block {
  std::vector<int64_t> label;
  std::vector<int32_t> ids;
  std::vector<float> limits, maxima, sums, shift, coef;
  Tile t{};

  Block(const Tensor& tile, const Tensor& scale_tensor, int64_t row0, int64_t col0, const Tensor& labels,
        const MaybeTensor& row_ids, const MaybeTensor& col_ids, const MaybeTensor& row_limit,
        const MaybeTensor& col_limit)
      : label(tile_labels(labels, row0, tile.size(0), col0)),
        ids(padded(at<int32_t>(col_ids, col0), tile.size(1), int32_t(-1))),
        limits(padded(at<float>(col_limit, col0), tile.size(1), INFINITY)) {
    const float scale = *at<float>(scale_tensor, 0);
    t.x = at<float>(tile, 0), t.rows = tile.size(0), t.cols = tile.size(1);
    t.scale = scale, t.hole = scale < 0 ? INFINITY : -INFINITY;
    t.label = label.data(), t.positives = labels.size(1);
    t.row_id = at<int32_t>(row_ids, row0), t.col_id = ids.data();
    t.row_limit = at<float>(row_limit, row0), t.col_limit = limits.data();
  }

  void for_statistics(const Tensor& positive, int64_t row0, bool bounded) {
    maxima = padded<float>(nullptr, t.cols, bounded ? 0.0f : -INFINITY);
    sums = padded<float>(nullptr, t.cols, 0.0f);
    t.positive = at<float>(positive, row0 * t.positives), t.col_max = maxima.data(), t.col_sum = sums.data();
  }

  void for_gradient(const Tensor& row_shift, const Tensor& row_coef, const Tensor& col_shift, const Tensor& col_coef,
                    const Tensor& positive_slope, const Tensor& factor, int64_t row0, int64_t col0) {
    shift = padded<float>(at<float>(col_shift, col0), t.cols, 0.0f);
    coef = padded<float>(at<float>(col_coef, col0), t.cols, 0.0f);
    t.row_shift = at<float>(row_shift, row0), t.row_coef = at<float>(row_coef, row0);
    t.col_shift = shift.data(), t.col_coef = coef.data();
    t.positive_slope = at<float>(positive_slope, row0 * t.positives), t.factor = *at<float>(factor, 0);
  }
};

int64_t stripes_of(int64_t cols) { return (cols + kStripe - 1) / kStripe; }

// Merges the stripes' parts of a tile's statistics into those of the whole, in a fixed order.
void merge(const Block& block, const StripePart* parts, int64_t row0, int64_t col0, const Tensor& row_max,
           const Tensor& row_sum, const Tensor& col_max, const Tensor& col_sum, const Tensor& rival) {
  const Tile& t = block.t;
  for (int64_t i = 0; i < t.rows; ++i) {
    float* best = at<float>(rival, row0 + i);
    for (int64_t s = 0; s < stripes_of(t.cols); ++s) {
      const StripePart& part = parts[s * t.rows + i];
      accumulate(part.max, part.sum, *at<float>(row_max, row0 + i), *at<double>(row_sum, row0 + i));
      *best = larger(*best, part.rival);
    }
  }
  for (int64_t j = 0; j < t.cols; ++j)
    accumulate(t.col_max[j], t.col_sum[j], *at<float>(col_max, col0 + j), *at<double>(col_sum, col0 + j));
}

void contrast_statistics(Tensor tile, Tensor scale, int64_t row0, int64_t col0, Tensor labels, MaybeTensor row_ids,
                         MaybeTensor col_ids, MaybeTensor row_limit, MaybeTensor col_limit, Tensor is_bounded,
                         Tensor row_max, Tensor row_sum, Tensor col_max, Tensor col_sum, Tensor positive, Tensor rival,
                         MaybeTensor) {
  check_tile(tile, labels, row0, col_sum, col0);
  const bool bounded = *at<int32_t>(is_bounded, 0) != 0;
  Block block(tile, scale, row0, col0, labels, row_ids, col_ids, row_limit, col_limit);
  block.for_statistics(positive, row0, bounded);
  const Tile& t = block.t;
  const auto run = RIME_FOR_CPU(kernels).statistics[variant(bounded, row_ids.has_value(), row_limit.has_value())];
  std::vector<StripePart> parts(stripes_of(t.cols) * t.rows);
  torch::stable::parallel_for(0, stripes_of(t.cols), 1, [&](int64_t begin, int64_t end) {
    for (int64_t s = begin; s < end; ++s)
      run(t, s * kStripe, std::min(t.cols, (s + 1) * kStripe), parts.data() + s * t.rows);
  });
  merge(block, parts.data(), row0, col0, row_max, row_sum, col_max, col_sum, rival);
}

void contrast_gradient(Tensor tile, Tensor scale, int64_t row0, int64_t col0, Tensor labels, MaybeTensor row_ids,
                       MaybeTensor col_ids, MaybeTensor row_limit, MaybeTensor col_limit, Tensor is_bounded,
                       Tensor row_shift, Tensor row_coef, Tensor col_shift, Tensor col_coef, Tensor positive_slope,
                       Tensor factor, Tensor out) {
  check_tile(tile, labels, row0, col_coef, col0);
  STD_TORCH_CHECK(out.data_ptr() == tile.data_ptr(), "out must be the tile");
  const bool bounded = *at<int32_t>(is_bounded, 0) != 0;
  Block block(tile, scale, row0, col0, labels, row_ids, col_ids, row_limit, col_limit);
  block.for_gradient(row_shift, row_coef, col_shift, col_coef, positive_slope, factor, row0, col0);
  const auto run = RIME_FOR_CPU(kernels).gradient[variant(bounded, row_ids.has_value(), row_limit.has_value())];
  torch::stable::parallel_for(0, block.t.rows, 16, [&](int64_t begin, int64_t end) { run(block.t, begin, end); });
}

using Tensors = std::vector<Tensor>;

constexpr int64_t kNestedBlock = 64;  // rows whose column sums are added up in fp32; fixed, as the stripes are

// Nested widths: a tile of partial products each, and what stands beside it.
struct NestedBlock {
  std::vector<Block> blocks;
  std::vector<Tile> tiles;
  std::vector<const float*> row_norm, col_norm;
  std::vector<std::vector<float>> norms;

  NestedBlock(const Tensors& parts, const Tensor& scale, int64_t row0, int64_t col0, const Tensor& labels,
              const MaybeTensor& row_ids, const MaybeTensor& col_ids, const Tensors& row_norms,
              const Tensors& col_norms, const Tensors& row_limits, const Tensors& col_limits, const Tensors& columns) {
    const size_t widths = parts.size();
    STD_TORCH_CHECK(widths > 0 && int64_t(widths) <= kMostWidths, "parts must be 1 to 16 tiles");
    STD_TORCH_CHECK(row_norms.size() == widths && col_norms.size() == widths && columns.size() == widths,
                    "parts, row_norms and col_norms must be lists of one length");
    STD_TORCH_CHECK((row_limits.empty() || row_limits.size() == widths) && row_limits.size() == col_limits.size(),
                    "row_limits and col_limits must be empty or as many as parts");
    blocks.reserve(widths);
    for (size_t w = 0; w < widths; ++w) {
      check_tile(parts[w], labels, row0, columns[w], col0);
      STD_TORCH_CHECK(parts[w].size(0) == parts[0].size(0) && parts[w].size(1) == parts[0].size(1),
                      "parts must be tiles of one shape");
      const MaybeTensor none;
      const bool limited = !row_limits.empty();
      blocks.emplace_back(parts[w], scale, row0, col0, labels, row_ids, col_ids,
                          limited ? MaybeTensor(row_limits[w]) : none, limited ? MaybeTensor(col_limits[w]) : none);
      row_norm.push_back(at<float>(row_norms[w], row0));
      norms.push_back(padded<float>(at<float>(col_norms[w], col0), parts[w].size(1), 1.0f));
    }
    for (const auto& one : norms) col_norm.push_back(one.data());
  }

  // Once every block has what its pass needs.
  Nested complete() {
    for (const Block& block : blocks) tiles.push_back(block.t);
    return {tiles.data(), row_norm.data(), col_norm.data(), int64_t(tiles.size()),
            stripes_of(tiles[0].cols) * tiles[0].rows};
  }
};

void nested_statistics(Tensors parts, Tensor scale, int64_t row0, int64_t col0, Tensor labels, MaybeTensor row_ids,
                       MaybeTensor col_ids, Tensors row_norms, Tensors col_norms, Tensors row_limits,
                       Tensors col_limits, Tensor is_bounded, Tensors row_max, Tensors row_sum, Tensors col_max,
                       Tensors col_sum, Tensors positive, Tensors rival) {
  NestedBlock all(parts, scale, row0, col0, labels, row_ids, col_ids, row_norms, col_norms, row_limits, col_limits,
                  col_sum);
  const bool bounded = *at<int32_t>(is_bounded, 0) != 0;
  for (size_t w = 0; w < parts.size(); ++w) all.blocks[w].for_statistics(positive[w], row0, bounded);
  const Nested n = all.complete();
  const int64_t rows = n.tile[0].rows, cols = n.tile[0].cols;
  const auto& table = RIME_FOR_CPU(kernels);
  const int chosen = variant(bounded, row_ids.has_value(), !row_limits.empty());
  std::vector<StripePart> found(n.widths * n.stride);
  torch::stable::parallel_for(0, stripes_of(cols), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sum((cols + 15) / 16 * 16);
    for (int64_t s = begin; s < end; ++s) {
      const int64_t j0 = s * kStripe, j1 = std::min(cols, j0 + kStripe);
      StripePart* part = found.data() + s * rows;
      if (bounded) {
        table.nested_statistics[chosen & 3](n, j0, j1, part);
        continue;
      }
      for (int64_t i = 0; i < rows; ++i) table.prefix(n, i, j0, j1, sum.data());
      for (int64_t w = 0; w < n.widths; ++w) table.statistics[chosen](n.tile[w], j0, j1, part + w * n.stride);
    }
  });
  for (int64_t w = 0; w < n.widths; ++w)
    merge(all.blocks[w], found.data() + w * n.stride, row0, col0, row_max[w], row_sum[w], col_max[w], col_sum[w],
          rival[w]);
}

void nested_gradient(Tensors parts, Tensor scale, int64_t row0, int64_t col0, Tensor labels, MaybeTensor row_ids,
                     MaybeTensor col_ids, Tensors row_norms, Tensors col_norms, Tensors row_limits, Tensors col_limits,
                     Tensor is_bounded, Tensors row_shift, Tensors row_coef, Tensors col_shift, Tensors col_coef,
                     Tensors positive_slope, Tensors factor, Tensor by_row, Tensor by_col) {
  NestedBlock all(parts, scale, row0, col0, labels, row_ids, col_ids, row_norms, col_norms, row_limits, col_limits,
                  col_coef);
  const bool bounded = *at<int32_t>(is_bounded, 0) != 0;
  const int64_t inner = int64_t(parts.size()) - 1;
  STD_TORCH_CHECK(by_row.size(0) == inner && by_col.size(0) == inner, "by_row and by_col hold the inner widths");
  for (int64_t w = 0; w <= inner; ++w)
    all.blocks[w].for_gradient(row_shift[w], row_coef[w], col_shift[w], col_coef[w], positive_slope[w], factor[w], row0,
                               col0);
  for (Block& block : all.blocks)
    for (float& coef : block.coef) coef *= block.t.factor;
  const Nested n = all.complete();
  const int64_t rows = n.tile[0].rows, cols = n.tile[0].cols, wide = (cols + 15) / 16 * 16;
  const int64_t count = (rows + kNestedBlock - 1) / kNestedBlock;
  const auto run = RIME_FOR_CPU(kernels).nested_gradient[variant(bounded, row_ids.has_value(), !row_limits.empty())];
  std::vector<float> columns(count * inner * wide);
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> sums(n.widths), lifted(n.widths * n.tile[0].positives);
    std::vector<float*> by(n.widths);
    for (int64_t i = begin * kNestedBlock; i < std::min(rows, end * kNestedBlock); ++i) {
      for (int64_t w = 0; w < inner; ++w) by[w] = columns.data() + (i / kNestedBlock * inner + w) * wide;
      run(n, i, sums.data(), by.data(), lifted.data());
      for (int64_t w = 0; w < inner; ++w) *at<double>(by_row, w * by_row.size(1) + row0 + i) += sums[w];
    }
  });
  for (int64_t b = 0; b < count; ++b)
    for (int64_t w = 0; w < inner; ++w)
      for (int64_t j = 0; j < cols; ++j)
        *at<double>(by_col, w * by_col.size(1) + col0 + j) += columns[(b * inner + w) * wide + j];
}

}  // namespace
}  // namespace rime::contrastive

STABLE_TORCH_LIBRARY_IMPL(rime_fast_C, CPU, m) {
  m.impl("contrast_statistics", TORCH_BOX(&rime::contrastive::contrast_statistics));
  m.impl("contrast_gradient", TORCH_BOX(&rime::contrastive::contrast_gradient));
  m.impl("nested_statistics", TORCH_BOX(&rime::contrastive::nested_statistics));
  m.impl("nested_gradient", TORCH_BOX(&rime::contrastive::nested_gradient));
}
