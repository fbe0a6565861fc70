// Runs csrc/cuda/contrastive_kernels.cuh on the CPU against plain loops in double; prints "ok" and the largest errors,
// or what differs. Built and run by test_contrastive_cuda.py.
#include "../testing/cuda_on_host.h"

#include "../../csrc/cuda/contrastive_kernels.cuh"

#include <algorithm>
#include <random>
#include <vector>

using namespace rime;
using namespace rime::contrastive;

namespace {

int failures = 0;
double worst = 0.0;  // among fp32 results

// scale: what the error is relative to, if that is more than the value.
void expect(double found, double wanted, double tolerance, const char* what, int64_t at, double scale = 1e-30) {
  if (std::isnan(wanted) ? std::isnan(found) : found == wanted) return;
  const double error = std::fabs(found - wanted) / std::max(scale, std::fabs(wanted));
  if (tolerance < 1e-3) worst = std::max(worst, std::isfinite(error) ? error : 1e30);
  if (!(error <= tolerance) && ++failures < 10)
    std::printf("%s at %ld: %.9g, expected %.9g\n", what, static_cast<long>(at), found, wanted);
}

// A tile in the middle of a larger problem: its corner is (row0, col0) there.
struct Case {
  int64_t rows, cols, row0 = 3, col0 = 1000;
  int positives;
  bool ids, margin, bounded;
  float scale;
  int64_t stride;
  int32_t flag;
  std::vector<float> x, row_limit, col_limit;
  std::vector<int64_t> labels;
  std::vector<int32_t> row_id, col_id;

  Case(int64_t rows, int64_t cols, int positives, bool ids, bool margin, bool bounded, unsigned seed)
      : rows(rows), cols(cols), positives(positives), ids(ids), margin(margin), bounded(bounded),
        scale(bounded ? 50.0f : 250.0f), stride((cols + 3) / 4 * 4), flag(bounded), x(rows * stride, 777.0f) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> unit(-1.0f, 1.0f);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) x[i * stride + j] = unit(random);
    for (int64_t i = 0; i < rows; ++i) row_limit.push_back(0.5f + 0.5f * unit(random)), row_id.push_back(random() % 7);
    for (int64_t j = 0; j < cols; ++j) col_limit.push_back(0.5f + 0.5f * unit(random)), col_id.push_back(random() % 7);
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t first = static_cast<int64_t>(random() % (cols + 20));  // some lie outside the tile
      for (int p = 0; p < positives; ++p) labels.push_back(p % 3 == 2 ? -1 : col0 + (first + 5 * p) % (cols + 20));
    }
    if (rows > 2) std::fill(row_limit.begin() + 2, row_limit.begin() + 3, -2.0f);  // every rival is masked
  }
  CudaTile tile() {
    return {x.data(), stride, rows, cols, col0, &scale, &flag, labels.data(), positives,
            ids ? row_id.data() : nullptr, ids ? col_id.data() : nullptr, margin ? row_limit.data() : nullptr,
            margin ? col_limit.data() : nullptr};
  }
  int positive_of(int64_t i, int64_t j) const {
    for (int p = 0; p < positives; ++p)
      if (labels[i * positives + p] - col0 == j) return p;
    return -1;
  }
  bool row_out(int64_t i, int64_t j) const {
    return (ids && row_id[i] == col_id[j]) || (margin && x[i * stride + j] > row_limit[i]);
  }
  bool col_out(int64_t i, int64_t j) const {
    return (ids && row_id[i] == col_id[j]) || (margin && x[i * stride + j] > col_limit[j]);
  }
  double logit(int64_t i, int64_t j) const { return double(x[i * stride + j] * scale); }
};

template <bool kIds, bool kMargin>
void statistics(Case& c) {
  const int64_t down = (c.rows + kPatchRows - 1) / kPatchRows, across = (c.cols + kPatchCols - 1) / kPatchCols;
  std::vector<float> row_part(across * 3 * c.rows), col_part(down * 2 * c.cols);
  std::vector<float> positive(c.rows * c.positives, -INFINITY);
  std::vector<float> row_max(c.rows, -INFINITY), rival(c.rows, -INFINITY), col_max(c.cols, -INFINITY);
  std::vector<double> row_sum(c.rows, 0.0), col_sum(c.cols, 0.0);
  const CudaStatistics out{row_part.data(), col_part.data(), positive.data()};
  const CudaRunning into{row_max.data(), col_max.data(), rival.data(), row_sum.data(), col_sum.data()};
  // Twice over the same tile: the second merge meets statistics that have begun.
  for (int turn = 0; turn < 2; ++turn) {
    cuda_on_host::launch(across, down, kThreads, 0, [&] { statistics_kernel<kIds, kMargin>(c.tile(), out); });
    const auto blocks = static_cast<unsigned>((c.rows + c.cols + kThreads - 1) / kThreads);
    cuda_on_host::launch(blocks, 1, kThreads, 0, [&] { merge_kernel(out, c.rows, c.cols, down, across, into); });
  }
  std::vector<double> col_total(c.cols, 0.0), col_top(c.cols, -INFINITY);
  for (int64_t i = 0; i < c.rows; ++i) {
    double total = 0.0, top = -INFINITY;
    for (int64_t j = 0; j < c.cols; ++j) {
      if (const int p = c.positive_of(i, j); p >= 0) {
        expect(positive[i * c.positives + p], c.logit(i, j), 0, "positive", i);
        continue;
      }
      if (!c.row_out(i, j)) total += std::exp(c.logit(i, j)), top = std::fmax(top, c.logit(i, j));
      if (!c.col_out(i, j)) col_total[j] += std::exp(c.logit(i, j)), col_top[j] = std::fmax(col_top[j], c.logit(i, j));
    }
    expect(rival[i], top, 0, "rival", i);
    expect(row_max[i] + std::log(row_sum[i]), std::log(2 * total), 1e-6, "row", i, 1.0);
    for (int p = 0; p < c.positives; ++p) {
      const int64_t own = c.labels[i * c.positives + p] - c.col0;
      if (own < 0 || own >= c.cols) expect(positive[i * c.positives + p], -INFINITY, 0, "foreign positive", i);
    }
  }
  for (int64_t j = 0; j < c.cols; ++j)
    expect(col_max[j] + std::log(col_sum[j]), std::log(2 * col_total[j]), 1e-6, "column", j, 1.0);
}

template <class T, bool kIds, bool kMargin>
void gradient(Case c) {
  std::mt19937 random(1);
  std::uniform_real_distribution<float> unit(0.1f, 1.0f);
  std::vector<float> row_shift(c.rows), row_coef(c.rows), col_shift(c.cols), col_coef(c.cols);
  std::vector<float> slope(c.rows * c.positives);
  const float shift = c.bounded ? 0.0f : 0.8f * c.scale, least = c.bounded ? 1e-22f : 1.0f;
  for (auto& v : row_shift) v = shift * unit(random);
  for (auto& v : col_shift) v = shift * unit(random);
  for (auto& v : row_coef) v = least * unit(random);
  for (auto& v : col_coef) v = least * unit(random);
  for (auto& v : slope) v = -unit(random);
  if (c.rows > 1) row_coef[1] = 0.0f, row_shift[1] = c.bounded ? 0.0f : INFINITY;
  const float factor = 0.37f;
  const Case before = c;
  const CudaSlopes slopes{row_shift.data(), row_coef.data(), col_shift.data(), col_coef.data(), slope.data(), &factor};
  T* out = reinterpret_cast<T*>(c.x.data());
  const int64_t out_stride = c.stride * static_cast<int64_t>(sizeof(float) / sizeof(T));
  cuda_on_host::launch(static_cast<unsigned>(c.rows), 1, kThreads, 0,
                       [&] { gradient_kernel<T, kIds, kMargin>(c.tile(), slopes, out, out_stride); });
  for (int64_t i = 0; i < c.rows; ++i)
    for (int64_t j = 0; j < c.cols; ++j) {
      double wanted = 0.0;
      if (const int p = before.positive_of(i, j); p >= 0) {
        wanted = slope[i * c.positives + p] * double(factor);
      } else {
        const double s = before.logit(i, j);
        if (!before.row_out(i, j) && row_coef[i] != 0) wanted += std::exp(s - row_shift[i]) * row_coef[i];
        if (!before.col_out(i, j)) wanted += std::exp(s - col_shift[j]) * col_coef[j];
        wanted *= factor;
      }
      const bool half = std::is_same_v<T, __half>;
      const double low = half ? 1e-4 : 1e-30, high = half ? 6e4 : 1e30;  // what the type, or an fp32 exponential, keeps
      if (std::fabs(wanted) < low || wanted > high) continue;
      expect(wide(out[i * out_stride + j]), wanted, sizeof(T) < 4 ? 8e-3 : 5e-5, "gradient", i * c.cols + j);
    }
}

template <bool kIds, bool kMargin>
void all(int64_t rows, int64_t cols, int positives, bool bounded) {
  Case c(rows, cols, positives, kIds, kMargin, bounded, static_cast<unsigned>(rows + cols));
  gradient<float, kIds, kMargin>(c);
  gradient<__nv_bfloat16, kIds, kMargin>(c);
  if (kIds == kMargin) gradient<__half, kIds, kMargin>(c);
  statistics<kIds, kMargin>(c);
}

}  // namespace

// Arguments: the seed of the order in which threads run; "quick" for the small cases only.
int main(int, char** arguments) {
  cuda_on_host::random.seed(static_cast<unsigned>(std::atoi(arguments[1])));
  const bool quick = std::strcmp(arguments[2], "quick") == 0;
  for (const bool bounded : {true, false}) {
    all<false, false>(1, 1, 1, bounded);
    all<true, true>(9, 258, 1, bounded);
    all<true, false>(67, 40, 4, bounded);
    all<false, true>(2, 1100, 2, bounded);
    if (quick) continue;
    all<false, false>(70, 513, 1, bounded);
    all<true, false>(67, 300, 4, bounded);
    all<false, true>(5, 1100, 2, bounded);
    all<true, true>(130, 515, 3, bounded);
  }
  Case nan(70, quick ? 30 : 300, 1, false, false, true, 5);
  nan.x[65 * nan.stride + nan.cols - 3] = NAN;
  statistics<false, false>(nan);
  std::printf(failures == 0 ? "ok %.2g\n" : "failed %.2g\n", worst);
  return failures != 0;
}
