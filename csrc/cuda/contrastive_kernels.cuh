// The contrastive loss's row kernels on CUDA; what a thread does with its numbers is in rime/contrastive.h. Included
// by contrastive.cu, and by tests/ops/contrastive_on_host.cpp, which runs these kernels on the CPU.
//
// statistics_kernel  one read of the tile (4 bytes an element, 16 a load): row and column parts of every patch
// merge_kernel       parts -> running statistics, in a fixed order and in fp64
// gradient_kernel    one read and one write; a bf16 or fp16 gradient goes into the first half of the row's own memory:
//                    a step's columns are read by all threads before any of its results is written, and results end
//                    before the columns that are still to be read
#pragma once

#include <rime/contrastive.h>

#include "common.cuh"

namespace rime::contrastive {
namespace {

constexpr int kThreads = kWarp * kPatchWarps;
constexpr int kStep = 4 * kThreads;  // columns of a row that the gradient takes at a time

// One tile; row and column arrays start at the tile's corner. labels [rows, positives], relative to column col0.
struct CudaTile {
  float* x;
  int64_t stride;  // a multiple of 4
  int64_t rows, cols, col0;
  const float* scale;
  const int32_t* bounded;
  const int64_t* labels;
  int positives;
  const int32_t* row_id;
  const int32_t* col_id;
  const float* row_limit;
  const float* col_limit;
};

struct CudaStatistics {
  float* row_part;  // [column patches, 3, rows]
  float* col_part;  // [row patches, 2, cols]
  float* positive;  // [rows, positives]
};

struct CudaRunning {
  float *row_max, *col_max, *rival;
  double *row_sum, *col_sum;
};

struct CudaSlopes {
  const float *row_shift, *row_coef, *col_shift, *col_coef;
  const float* positive_slope;  // [rows, positives]
  const float* factor;
};

struct Join {
  bool bounded;

  template <class T>
  __device__ T operator()(T a, T b) const {
    return bounded ? add_bounded(a, b) : join(a, b);
  }
};

template <bool kIds, bool kMargin>
__global__ void __launch_bounds__(kThreads) statistics_kernel(CudaTile t, CudaStatistics out) {
  __shared__ Online merged[kPatchWarps][kPatchCols];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first = int64_t{blockIdx.x} * kPatchCols;
  const float scale = *t.scale;
  const bool bounded = *t.bounded != 0;
  const Join join_parts{bounded};
  LaneColumns columns;
  unsigned outside = 0;
RIME_UNROLL
  for (int c = 0; c < kLaneCols; ++c) {
    const int64_t j = first + lane_column(lane, c);
    const bool there = j < t.cols;
    if (!there) outside |= 1u << c;
    columns.all[c] = start(bounded);
    columns.id[c] = kIds && there ? t.col_id[j] : 0;
    columns.limit[c] = kMargin && there ? t.col_limit[j] : 0.0f;
  }
  for (int r = warp; r < kPatchRows; r += kPatchWarps) {
    const int64_t i = int64_t{blockIdx.y} * kPatchRows + r;
    if (i >= t.rows) break;
    float x[kLaneCols];
RIME_UNROLL
    for (int g = 0; g < kLaneCols; g += 4) {
      const int64_t j = first + lane_column(lane, g);
      float4 four{0.0f, 0.0f, 0.0f, 0.0f};
      if (j < t.stride) four = *reinterpret_cast<const float4*>(t.x + i * t.stride + j);
      x[g] = four.x, x[g + 1] = four.y, x[g + 2] = four.z, x[g + 3] = four.w;
    }
    unsigned lifted = outside;
    for (int p = 0; p < t.positives; ++p) {
      const int64_t own = t.labels[i * t.positives + p] - t.col0 - first;
RIME_UNROLL
      for (int c = 0; c < kLaneCols; ++c) {
        if (own != lane_column(lane, c) || (outside >> c & 1u)) continue;
        lifted |= 1u << c;
        out.positive[i * t.positives + p] = x[c] * scale;
      }
    }
    const RowMasks row{kIds ? t.row_id[i] : 0, kMargin ? t.row_limit[i] : 0.0f};
    const RowPart part = warp_reduce(lane_row<kIds, kMargin>(x, scale, bounded, lifted, row, columns), join_parts);
    if (lane == 0) {
      float* at = out.row_part + blockIdx.x * 3 * t.rows + i;
      at[0] = part.top, at[t.rows] = part.sum, at[2 * t.rows] = part.rival;
    }
  }
RIME_UNROLL
  for (int c = 0; c < kLaneCols; ++c) merged[warp][lane_column(lane, c)] = columns.all[c];
  __syncthreads();
  const int64_t j = first + threadIdx.x;
  if (j >= t.cols) return;
  Online all = merged[0][threadIdx.x];
  for (int w = 1; w < kPatchWarps; ++w) all = join_parts(all, merged[w][threadIdx.x]);
  float* at = out.col_part + blockIdx.y * 2 * t.cols + j;
  at[0] = all.top, at[t.cols] = all.sum;
}

// Adds the parts [n_parts][planes][count] of row or column i, whose first planes are maxima and sums, to its running
// statistics: kept in registers, written once. Returns the largest of plane 2, if there is one, and `rival`.
template <int kPlanes>
__device__ __forceinline__ float add_parts(const float* __restrict__ parts, int64_t n_parts, int64_t count, int64_t i,
                                           float* running_max, double* running_sum, float rival) {
  float top = running_max[i];
  double sum = running_sum[i];
  for (int64_t p = 0; p < n_parts; ++p) {
    const float* at = parts + p * kPlanes * count + i;
    accumulate(at[0], at[count], top, sum);
    if (kPlanes > 2) rival = larger(rival, at[2 * count]);
  }
  running_max[i] = top;
  running_sum[i] = sum;
  return rival;
}

// Threads 0 .. rows - 1 take a row each, the next `cols` a column.
__global__ void __launch_bounds__(kThreads) merge_kernel(
    CudaStatistics from, int64_t rows, int64_t cols, int64_t row_patches, int64_t col_patches, CudaRunning into) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < rows)
    into.rival[i] = add_parts<3>(from.row_part, col_patches, rows, i, into.row_max, into.row_sum, into.rival[i]);
  else if (i < rows + cols)
    add_parts<2>(from.col_part, row_patches, cols, i - rows, into.col_max, into.col_sum, 0.0f);
}

// Four numbers of a column array, which may begin at any element.
template <class T>
__device__ __forceinline__ void four_of(const T* from, int64_t first, int64_t end, bool aligned, T* to) {
  static_assert(sizeof(T) == sizeof(float));
  if (aligned && first + 4 <= end) {
    const float4 four = *reinterpret_cast<const float4*>(from + first);
    memcpy(to, &four, sizeof(four));
  } else {
    RIME_UNROLL
    for (int c = 0; c < 4; ++c) to[c] = first + c < end ? from[first + c] : T{};
  }
}

// One block a row. T: float, or a 16-bit float written over the row it is made from; out_stride in elements of T.
template <class T, bool kBounded, bool kIds, bool kMargin>
__device__ __forceinline__ void gradient_row(const CudaTile& t, const CudaSlopes& slopes, T* out, int64_t out_stride) {
  const int64_t i = blockIdx.x;
  const float scale = *t.scale, factor = *slopes.factor;
  const Side row{slopes.row_shift[i], slopes.row_coef[i], kMargin ? t.row_limit[i] : 0.0f, kIds ? t.row_id[i] : 0};
  const bool aligned = at_sixteen(slopes.col_shift) && at_sixteen(slopes.col_coef) &&
                       (!kIds || at_sixteen(t.col_id)) && (!kMargin || at_sixteen(t.col_limit));
  // The only positive of most calls is read before the loop, whose stores could change it for all the compiler knows.
  const int64_t label = t.labels[i * t.positives] - t.col0;
  const float positive = slopes.positive_slope[i * t.positives] * factor;
  for (int64_t step = 0; step < t.cols; step += kStep) {
    const int64_t first = step + int64_t{threadIdx.x} * 4;
    float g[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (first < t.cols) {
      float shift[4] = {}, coef[4], limit[4] = {};
      int32_t id[4] = {};
      const float4 four = *reinterpret_cast<const float4*>(t.x + i * t.stride + first);
      g[0] = four.x, g[1] = four.y, g[2] = four.z, g[3] = four.w;
      if (!kBounded) four_of(slopes.col_shift, first, t.cols, aligned, shift);
      four_of(slopes.col_coef, first, t.cols, aligned, coef);
      if (kMargin) four_of(t.col_limit, first, t.cols, aligned, limit);
      if (kIds) four_of(t.col_id, first, t.cols, aligned, id);
      RIME_UNROLL
      for (int c = 0; c < 4; ++c) {
        g[c] = lane_slope<kBounded, kIds, kMargin>(g[c], scale, row, Side{shift[c], coef[c], limit[c], id[c]}) * factor;
        if (label == first + c) g[c] = positive;
      }
      for (int p = 1; p < t.positives; ++p) {
        const int64_t own = t.labels[i * t.positives + p] - t.col0 - first;
        RIME_UNROLL
        for (int c = 0; c < 4; ++c)
          if (own == c) g[c] = slopes.positive_slope[i * t.positives + p] * factor;
      }
    }
    if (sizeof(T) < sizeof(float)) __syncthreads();
    if (first < t.cols) put_four(out + i * out_stride + first, g);
  }
}

template <class T, bool kIds, bool kMargin>
__global__ void __launch_bounds__(kThreads) gradient_kernel(CudaTile t, CudaSlopes slopes, T* out, int64_t out_stride) {
  if (*t.bounded != 0)
    gradient_row<T, true, kIds, kMargin>(t, slopes, out, out_stride);
  else
    gradient_row<T, false, kIds, kMargin>(t, slopes, out, out_stride);
}

}  // namespace
}  // namespace rime::contrastive
