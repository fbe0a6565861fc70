// The contrastive loss's row kernels on CUDA; what a thread does with its numbers is in rime/contrastive.h. Included
// by contrastive.cu, and by tests/ops/contrastive_on_host.cpp, which runs these kernels on the CPU.
//
// statistics_kernel  one read of the tile (4 bytes an element, 16 a load): row and column parts of every patch
// merge_kernel       parts -> running statistics, in a fixed order and in fp64
// gradient_kernel    one read and one write; a bf16 or fp16 gradient goes into the first half of the row's own memory:
//                    a step's columns are read by all threads before any of its results is written, and results end
//                    before the columns that are still to be read
// norm_, begin_, solve_, total_, slopes_, sized_kernel: what is O(N), before, between and after the tiles (fused.py)
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
  float* row_part;  // [column patches, 2, rows]: the largest rival logit, the sum
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

template <bool kBounded>
struct Join {
  __device__ Online operator()(Online a, Online b) const { return kBounded ? add_bounded(a, b) : join(a, b); }
};

// kRows rows' parts of a warp's lanes, joined: every lane returns those of row lane / (kWarp / kRows), in half the
// shuffles of one row after the other. Always joined as op(lower lanes', higher lanes').
template <int kRows, class Op>
__device__ __forceinline__ Online join_rows(Online (&part)[kRows], Op op) {
  const int lane = threadIdx.x % kWarp;
RIME_UNROLL
  for (int step = kWarp / 2, rows = kRows / 2; step > 0; step /= 2, rows /= 2) {
    const bool high = lane & step;
RIME_UNROLL
    for (int u = 0; u < (rows > 0 ? rows : 1); ++u) {
      // While there are rows to share out, each half of the lanes hands over those that the other goes on with.
      const Online keep = rows > 0 && high ? part[rows + u] : part[u];
      const Online give = rows > 0 && !high ? part[rows + u] : part[u];
      const Online other = shuffle_xor(give, step);
      part[u] = high ? op(other, keep) : op(keep, other);
    }
  }
  return part[0];
}

template <bool kBounded, bool kIds, bool kMargin>
__device__ __forceinline__ void statistics_patch(const CudaTile& t, const CudaStatistics& out,
                                                 Online (&merged)[kPatchWarps][kPatchCols]) {
  constexpr int kTogether = kMargin ? 2 : 4;  // rows that a warp has in flight, for two blocks a multiprocessor
  static_assert(kPatchRows % (kPatchWarps * kTogether) == 0);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first = int64_t{blockIdx.x} * kPatchCols;
  const float scale = *t.scale;
  const Join<kBounded> join_parts{};
  LaneColumns columns;
  unsigned outside = 0;
RIME_UNROLL
  for (int c = 0; c < kLaneCols; ++c) {
    const int64_t j = first + lane_column(lane, c);
    const bool there = j < t.cols;
    if (!there) outside |= 1u << c;
    columns.all[c] = {kBounded ? 0.0f : -HUGE_VALF, 0.0f};
    columns.id[c] = kIds && there ? t.col_id[j] : 0;
    columns.limit[c] = kMargin && there ? t.col_limit[j] : 0.0f;
  }
  for (int r = warp; r < kPatchRows; r += kPatchWarps * kTogether) {
    const int64_t row0 = int64_t{blockIdx.y} * kPatchRows + r;
    if (row0 >= t.rows) break;
    float x[kTogether][kLaneCols];
    int64_t label[kTogether];
    // All loads of all rows first: so many bytes are on their way while the ones before are worked on.
RIME_UNROLL
    for (int u = 0; u < kTogether; ++u) {
      const int64_t i = row0 + u * kPatchWarps;
      const bool there = i < t.rows;
RIME_UNROLL
      for (int g = 0; g < kLaneCols; g += 4) {
        const int64_t j = first + lane_column(lane, g);
        float4 four{0.0f, 0.0f, 0.0f, 0.0f};
        if (there && j < t.stride) four = *reinterpret_cast<const float4*>(t.x + i * t.stride + j);
        x[u][g] = four.x, x[u][g + 1] = four.y, x[u][g + 2] = four.z, x[u][g + 3] = four.w;
      }
      label[u] = there ? t.labels[i * t.positives] - t.col0 - first : -1;
    }
    Online parts[kTogether];
RIME_UNROLL
    for (int u = 0; u < kTogether; ++u) {
      const int64_t i = row0 + u * kPatchWarps;
      unsigned lifted = i < t.rows ? outside : ~0u;
      for (int p = 0; p < t.positives && i < t.rows; ++p) {
        const int64_t own = p == 0 ? label[u] : t.labels[i * t.positives + p] - t.col0 - first;
        if (own < 0 || own >= kPatchCols) continue;
RIME_UNROLL
        for (int c = 0; c < kLaneCols; ++c) {
          if (own != lane_column(lane, c) || (outside >> c & 1u)) continue;
          lifted |= 1u << c;
          out.positive[i * t.positives + p] = x[u][c] * scale;
        }
      }
      const bool there = i < t.rows;
      const RowMasks row{kIds && there ? t.row_id[i] : 0, kMargin && there ? t.row_limit[i] : 0.0f};
      parts[u] = lane_row<kBounded, kIds, kMargin>(x[u], scale, lifted, row, columns);
    }
    const Online part = join_rows(parts, join_parts);
    const int64_t i = row0 + lane / (kWarp / kTogether) * kPatchWarps;
    if (lane % (kWarp / kTogether) == 0 && i < t.rows) {
      float* at = out.row_part + blockIdx.x * 2 * t.rows + i;
      at[0] = part.top, at[t.rows] = part.sum;
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

template <bool kIds, bool kMargin>
__global__ void __launch_bounds__(kThreads) statistics_kernel(CudaTile t, CudaStatistics out) {
  __shared__ Online merged[kPatchWarps][kPatchCols];
  if (*t.bounded != 0)
    statistics_patch<true, kIds, kMargin>(t, out, merged);
  else
    statistics_patch<false, kIds, kMargin>(t, out, merged);
}

constexpr int kMergeThreads = 64;  // small blocks: there are few rows and columns, and all multiprocessors shall help
constexpr int kMergeAhead = 8;

// Adds the parts [n_parts][2][count] of row or column i to its running statistics, kept in registers and written once.
// shifted: the sums refer to the maxima beside them, else to 0. Returns the largest of those maxima and `rival`.
__device__ __forceinline__ float add_parts(const float* __restrict__ parts, int64_t n_parts, int64_t count, int64_t i,
                                           bool shifted, float* running_max, double* running_sum, float rival) {
  float top = running_max[i];
  double sum = running_sum[i];
  for (int64_t begin = 0; begin < n_parts; begin += kMergeAhead) {
    float tops[kMergeAhead], sums[kMergeAhead];
RIME_UNROLL
    for (int p = 0; p < kMergeAhead; ++p) {
      const float* at = parts + (begin + p) * 2 * count + i;
      const bool there = begin + p < n_parts;
      tops[p] = there ? at[0] : -HUGE_VALF, sums[p] = there ? at[count] : 0.0f;
    }
RIME_UNROLL
    for (int p = 0; p < kMergeAhead; ++p) {
      if (begin + p >= n_parts) break;
      accumulate(shifted ? tops[p] : 0.0f, sums[p], top, sum);
      rival = larger(rival, tops[p]);
    }
  }
  running_max[i] = top;
  running_sum[i] = sum;
  return rival;
}

// Threads 0 .. rows - 1 take a row each, the next `cols` a column.
__global__ void __launch_bounds__(kMergeThreads)
    merge_kernel(CudaStatistics from, const int32_t* bounded, int64_t rows, int64_t cols, int64_t row_patches,
                 int64_t col_patches, CudaRunning into) {
  const int64_t i = int64_t{blockIdx.x} * kMergeThreads + threadIdx.x;
  const bool shifted = *bounded == 0;
  if (i < rows)
    into.rival[i] = add_parts(from.row_part, col_patches, rows, i, shifted, into.row_max, into.row_sum, into.rival[i]);
  else if (i < rows + cols)
    add_parts(from.col_part, row_patches, cols, i - rows, shifted, into.col_max, into.col_sum, 0.0f);
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

// --- what is O(N): one thread a query and a key, in fp64 (formulas: rime_fast/ops/contrastive/softmax.py) ---------------
// All for one positive a query, of which query i's is key first + i; blockIdx.y is the loss.

__device__ __forceinline__ double softplus(double x) { return x > 40.0 ? x : log1p(exp(x)); }

__device__ __forceinline__ double log_add(double a, double b) {
  const double gap = a == b ? 0.0 : fabs(a - b);  // both may be -inf
  return (a > b ? a : b) + log1p(exp(-gap));
}

// The largest norm of rows of x, as the bits of a float >= 0, whose order as integers is that of the numbers, with NaN
// above all; so the order of the atomics does not matter. A warp a row.
template <class T>
__global__ void __launch_bounds__(kThreads) norm_kernel(const T* x, int64_t rows, int64_t width, uint32_t* largest) {
  const int64_t i = int64_t{blockIdx.x} * kPatchWarps + threadIdx.x / kWarp;
  if (i >= rows) return;
  const T* row = x + i * width;
  float squares = 0.0f;
  if (width % 4 == 0 && at_sixteen(x)) {
    for (int64_t k = threadIdx.x % kWarp * 4; k < width; k += 4 * kWarp) {
      float four[4];
      get_four(row + k, four);
      squares += (four[0] * four[0] + four[1] * four[1]) + (four[2] * four[2] + four[3] * four[3]);
    }
  } else {
    for (int64_t k = threadIdx.x % kWarp; k < width; k += kWarp) squares += wide(row[k]) * wide(row[k]);
  }
  squares = warp_reduce(squares, Add{});
  if (threadIdx.x % kWarp == 0) atomicMax(largest, as_bits<uint32_t>(sqrtf(squares)) & 0x7fffffffu);
}

// What a call needs of its temperature, NaN where that is not above 0. norms: of the queries, of the keys.
__global__ void begin_kernel(const float* temperature, const uint32_t* norms, float* positive_temperature, float* scale,
                             int32_t* bounded) {
  const float tau = *temperature > 0.0f ? *temperature : NAN;
  *positive_temperature = tau;
  *scale = 1.0f / tau;
  *bounded = as_bits<float>(norms[0]) * as_bits<float>(norms[1]) * (1.0f / tau) < kLargestLogit;
}

struct CudaState {
  const float *row_max, *col_max, *rival, *positive;  // [losses, queries] or [losses, keys]
  const double *row_sum, *col_sum;
  int64_t queries, keys, first;
  int symmetric;
};

// rows, cols: Solved's. parts [losses, blocks, 2]: each block's sum of losses and of hits.
__global__ void __launch_bounds__(kThreads) solve_kernel(CudaState from, double* rows, double* cols, double* parts) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, term = blockIdx.y;
  double loss = 0.0, hit = 0.0;
  if (i < from.queries) {
    const int64_t at = term * from.queries + i, col = term * from.keys + from.first + i;
    const double positive = from.positive[at], rivals = log(from.row_sum[at]) + from.row_max[at];
    double* to = rows + term * 3 * from.queries + i;
    to[0] = from.row_max[at], to[from.queries] = rivals, to[2 * from.queries] = positive;
    loss = softplus(rivals - positive);
    if (from.symmetric) loss = 0.5 * (loss + softplus(log(from.col_sum[col]) + from.col_max[col] - positive));
    hit = from.positive[at] > from.rival[at] && from.row_sum[at] == from.row_sum[at];
  }
  if (i < from.keys) {
    const int64_t at = term * from.keys + i, query = i - from.first;
    const bool asked = query >= 0 && query < from.queries;
    double* to = cols + term * 3 * from.keys + i;
    to[0] = from.col_max[at], to[from.keys] = log(from.col_sum[at]) + from.col_max[at];
    to[2 * from.keys] = asked ? from.positive[term * from.queries + query] : -HUGE_VALF;
  }
  loss = block_reduce<kThreads, true>(loss, Add{});
  hit = block_reduce<kThreads, true>(hit, Add{});
  if (threadIdx.x == 0) {
    double* to = parts + (term * gridDim.x + blockIdx.x) * 2;
    to[0] = loss, to[1] = hit;
  }
}

// Means over queries of the parts, a block a loss.
__global__ void __launch_bounds__(kThreads) total_kernel(const double* parts, int64_t n_parts, double queries,
                                                         float* loss, float* hit) {
  double sums[2] = {};
  for (int64_t p = threadIdx.x; p < n_parts; p += kThreads)
    for (int which = 0; which < 2; ++which) sums[which] += parts[(blockIdx.x * n_parts + p) * 2 + which];
  for (double& sum : sums) sum = block_reduce<kThreads, true>(sum, Add{});
  if (threadIdx.x != 0) return;
  loss[blockIdx.x] = static_cast<float>(sums[0] / queries);
  hit[blockIdx.x] = static_cast<float>(sums[1] / queries);
}

struct CudaSlopesOut {
  float *row_shift, *row_coef, *col_shift, *col_coef, *positive_slope, *factor;
  float* unit;  // null where gradients are made in their own size
};

// The loss's share of its softmax at one row or column as coefficient exp(s - shift).
__device__ __forceinline__ void shift_and_coefficient(double shift, double rivals, double positive, float* to_shift,
                                                      float* to_coefficient) {
  *to_coefficient = static_cast<float>(exp(shift - log_add(rivals, positive)));
  *to_shift = fabs(shift) == HUGE_VAL ? HUGE_VALF : static_cast<float>(shift);  // no rival: nothing is kept, exactly
}

// grad [losses]: the gradient to each loss's mean over `queries_of_all` queries.
__global__ void __launch_bounds__(kThreads)
    slopes_kernel(const double* rows, const double* cols, int64_t queries, int64_t keys, int64_t first, int symmetric,
                  const float* grad, const float* temperature, double queries_of_all, CudaSlopesOut to) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x, term = blockIdx.y;
  const double* row = rows + term * 3 * queries;
  const double* col = cols + term * 3 * keys;
  if (i == 0) {
    const double each = (symmetric ? 0.5 : 1.0) / queries_of_all / static_cast<double>(*temperature);
    double largest = 0.0, unit = 1.0;
    for (unsigned l = 0; l < gridDim.y; ++l) {
      const double size = fabs(grad[l] * each);
      largest = size > largest || !(size == size) ? size : largest;
    }
    if (to.unit != nullptr) {
      unit = largest > 0.0 ? largest : 1.0;
      *to.unit = static_cast<float>(unit);  // every loss writes the same
    }
    to.factor[term] = static_cast<float>(grad[term] * each / unit);
  }
  if (i < queries) {
    const double rivals = row[queries + i], positive = row[2 * queries + i];
    double slope = expm1(-softplus(rivals - positive));
    if (symmetric) slope += expm1(-softplus(col[keys + first + i] - col[2 * keys + first + i]));
    to.positive_slope[term * queries + i] = static_cast<float>(slope);
    shift_and_coefficient(row[i], rivals, positive, to.row_shift + term * queries + i, to.row_coef + term * queries + i);
  }
  if (i < keys) {
    float *shift = to.col_shift + term * keys + i, *coefficient = to.col_coef + term * keys + i;
    if (symmetric && i >= first && i - first < queries)
      shift_and_coefficient(col[i], col[keys + i], col[2 * keys + i], shift, coefficient);
    else
      *shift = HUGE_VALF, *coefficient = 0.0f;  // no query asks for this key
  }
}

// out = d unit, in the type of the rows that d is the gradient of, and for the temperature's gradient each row's d . x.
// A warp a row.
template <class T>
__global__ void __launch_bounds__(kThreads)
    sized_kernel(const float* d, const T* x, const float* unit, int64_t rows, int64_t width, T* out, double* products) {
  const int64_t i = int64_t{blockIdx.x} * kPatchWarps + threadIdx.x / kWarp;
  if (i >= rows) return;
  const float size = unit == nullptr ? 1.0f : *unit;
  double sum = 0.0;
  const bool fours = width % 4 == 0 && at_sixteen(d) && at_sixteen(x) && at_sixteen(out);
  const int64_t begin = i * width;
  for (int64_t k = threadIdx.x % kWarp * (fours ? 4 : 1); k < width; k += kWarp * (fours ? 4 : 1)) {
    float g[4] = {}, v[4] = {};
    if (fours)
      get_four(d + begin + k, g);
    else
      g[0] = d[begin + k];
    if (products != nullptr) {
      if (fours)
        get_four(x + begin + k, v);
      else
        v[0] = wide(x[begin + k]);
      sum += static_cast<double>((g[0] * v[0] + g[1] * v[1]) + (g[2] * v[2] + g[3] * v[3]));
    }
RIME_UNROLL
    for (float& value : g) value *= size;
    if (fours)
      put_four(out + begin + k, g);
    else
      put(out + begin + k, g[0]);
  }
  if (products == nullptr) return;
  sum = warp_reduce(sum, Add{});
  if (threadIdx.x % kWarp == 0) products[i] = sum;
}

}  // namespace
}  // namespace rime::contrastive
