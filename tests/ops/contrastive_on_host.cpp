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
  std::vector<float> row_part(across * 2 * c.rows), col_part(down * 2 * c.cols);
  std::vector<float> positive(c.rows * c.positives, -INFINITY);
  std::vector<float> row_max(c.rows, -INFINITY), rival(c.rows, -INFINITY), col_max(c.cols, -INFINITY);
  std::vector<double> row_sum(c.rows, 0.0), col_sum(c.cols, 0.0);
  const CudaStatistics out{row_part.data(), col_part.data(), positive.data()};
  const CudaRunning into{row_max.data(), col_max.data(), rival.data(), row_sum.data(), col_sum.data()};
  // Twice over the same tile: the second merge meets statistics that have begun.
  for (int turn = 0; turn < 2; ++turn) {
    cuda_on_host::launch(across, down, kThreads, 0, [&] { statistics_kernel<kIds, kMargin>(c.tile(), out); });
    const auto blocks = static_cast<unsigned>((c.rows + c.cols + kMergeThreads - 1) / kMergeThreads);
    cuda_on_host::launch(blocks, 1, kMergeThreads, 0,
                         [&] { merge_kernel(out, &c.flag, c.rows, c.cols, down, across, into); });
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

// softplus(a - b) = log(1 + e^(a - b)).
double over(double a, double b) { return a - b > 40 ? a - b : std::log1p(std::exp(a - b)); }

// What is O(N): from statistics to losses and back to slopes; keys: in-batch ones, hard negatives before and after.
void solve(int64_t losses, int64_t queries, int64_t keys, int64_t first, bool symmetric, bool narrow) {
  std::mt19937 random(static_cast<unsigned>(queries + keys));
  std::uniform_real_distribution<float> unit(-1.0f, 1.0f);
  std::vector<float> row_max(losses * queries), rival(losses * queries), positive(losses * queries);
  std::vector<double> row_sum(losses * queries), col_sum(losses * keys);
  std::vector<float> col_max(losses * keys);
  for (auto& v : row_max) v = 60 * unit(random);
  for (auto& v : col_max) v = 60 * unit(random);
  for (auto& v : positive) v = 60 * unit(random);
  for (auto& v : row_sum) v = 1.5 + unit(random);
  for (auto& v : col_sum) v = 1.5 + unit(random);
  for (size_t i = 0; i < rival.size(); ++i) rival[i] = row_max[i];
  row_max[0] = rival[0] = -INFINITY, row_sum[0] = 0.0;  // no rival
  if (queries > 3) row_sum[3] = NAN;
  const int64_t blocks = (std::max(queries, keys) + kThreads - 1) / kThreads;
  std::vector<double> rows(losses * 3 * queries, NAN), cols(losses * 3 * keys, NAN), parts(losses * blocks * 2, NAN);
  std::vector<float> loss(losses, NAN), hit(losses, NAN);
  const CudaState from{row_max.data(), col_max.data(), rival.data(), positive.data(), row_sum.data(), col_sum.data(),
                       queries, keys, first, symmetric};
  const auto down = static_cast<unsigned>(losses);
  cuda_on_host::launch(static_cast<unsigned>(blocks), down, kThreads, 0,
                       [&] { solve_kernel(from, rows.data(), cols.data(), parts.data()); });
  cuda_on_host::launch(down, 1, kThreads, 0, [&] {
    total_kernel(parts.data(), blocks, static_cast<double>(queries), loss.data(), hit.data());
  });
  std::vector<float> grad(losses), factor(losses, NAN), shifts[2], coefficients[2], slope(losses * queries, NAN);
  for (int64_t l = 0; l < losses; ++l) grad[l] = 0.1f * static_cast<float>(l - 2);
  for (int side = 0; side < 2; ++side)
    shifts[side].assign(losses * (side ? keys : queries), NAN), coefficients[side] = shifts[side];
  const float temperature = 0.05f;
  float scale_of_all = NAN;
  const CudaSlopesOut to{shifts[0].data(), coefficients[0].data(), shifts[1].data(), coefficients[1].data(),
                         slope.data(), factor.data(), narrow ? &scale_of_all : nullptr};
  cuda_on_host::launch(static_cast<unsigned>(blocks), down, kThreads, 0, [&] {
    slopes_kernel(rows.data(), cols.data(), queries, keys, first, symmetric, grad.data(), &temperature, 2.0 * queries, to);
  });
  double largest = 0.0;
  for (const float g : grad) largest = std::max(largest, std::fabs(g * (symmetric ? 0.5 : 1.0) / (2 * queries) / temperature));
  if (narrow) expect(scale_of_all, largest, 1e-6, "unit", 0);
  for (int64_t l = 0; l < losses; ++l) {
    double sum = 0.0, hits = 0.0;
    for (int64_t i = 0; i < queries; ++i) {
      const int64_t at = l * queries + i, col = l * keys + first + i;
      const double p = positive[at], r = std::log(row_sum[at]) + row_max[at], c = std::log(col_sum[col]) + col_max[col];
      sum += symmetric ? 0.5 * (over(r, p) + over(c, p)) : over(r, p);
      hits += positive[at] > rival[at] && !std::isnan(row_sum[at]);
      const double wanted[3] = {row_max[at], r, p};
      for (int plane = 0; plane < 3; ++plane) expect(rows[(l * 3 + plane) * queries + i], wanted[plane], 1e-12, "rows", at);
      double both = std::expm1(-over(r, p)) + (symmetric ? std::expm1(-over(c, p)) : 0.0);
      expect(slope[at], both, 1e-6, "positive slope", at);
      // exp(shift) of the coefficient cancels the sum's: together they are the share of a logit 0
      const bool alone = std::isinf(row_max[at]);
      expect(shifts[0][at], alone ? INFINITY : row_max[at], 0, "row shift", at);
      expect(coefficients[0][at], alone ? 0.0 : std::exp(row_max[at] - p - over(r, p)), 1e-6, "row coefficient", at);
    }
    expect(loss[l], sum / queries, 1e-6, "loss", l);
    expect(hit[l], hits / queries, 1e-6, "hit", l);
    expect(factor[l], grad[l] * (symmetric ? 0.5 : 1.0) / (2 * queries) / temperature / (narrow ? largest : 1.0), 1e-6,
           "factor", l);
    for (int64_t j = 0; j < keys; ++j) {
      const int64_t at = l * keys + j;
      const bool asked = j >= first && j - first < queries;
      const double p = asked ? positive[l * queries + j - first] : -INFINITY, c = std::log(col_sum[at]) + col_max[at];
      const double wanted[3] = {col_max[at], c, p};
      for (int plane = 0; plane < 3; ++plane) expect(cols[(l * 3 + plane) * keys + j], wanted[plane], 1e-12, "cols", at);
      const bool counts = asked && symmetric;
      expect(shifts[1][at], counts ? col_max[at] : INFINITY, 0, "column shift", at);
      expect(coefficients[1][at], counts ? std::exp(col_max[at] - p - over(c, p)) : 0.0, 1e-6, "column coefficient", at);
    }
  }
}

// Norms, and gradients given their size.
template <class T>
void rows_of(int64_t rows, int64_t width, int64_t offset) {
  std::mt19937 random(static_cast<unsigned>(rows + width));
  std::uniform_real_distribution<float> unit(-1.0f, 1.0f);
  std::vector<T> x(rows * width + offset), out(rows * width + offset);
  std::vector<float> d(rows * width + offset);
  std::vector<double> products(rows, NAN);
  for (auto& v : x) put(&v, unit(random));
  for (auto& v : d) v = unit(random);
  const float size = 0.01f;
  uint32_t largest = 0;
  const auto blocks = static_cast<unsigned>((rows + kPatchWarps - 1) / kPatchWarps);
  const T* given = x.data() + offset;
  cuda_on_host::launch(blocks, 1, kThreads, 0, [&] { norm_kernel(given, rows, width, &largest); });
  const float* gradient = d.data() + offset;
  T* to = out.data() + offset;
  cuda_on_host::launch(blocks, 1, kThreads, 0,
                       [&] { sized_kernel(gradient, given, &size, rows, width, to, products.data()); });
  double norm = 0.0;
  for (int64_t i = 0; i < rows; ++i) {
    double squares = 0.0, product = 0.0, terms = 0.0;
    for (int64_t k = 0; k < width; ++k) {
      const double a = wide(given[i * width + k]), b = gradient[i * width + k];
      squares += a * a, product += a * b, terms += std::fabs(a * b);
      expect(wide(to[i * width + k]), b * size, sizeof(T) < 4 ? 4e-3 : 1e-6, "sized", i * width + k, 1e-4);
    }
    norm = std::max(norm, std::sqrt(squares));
    expect(products[i], product, 1e-6, "products", i, terms);
  }
  expect(as_bits<float>(largest), norm, 1e-6, "norm", 0);
  put(&x[offset], NAN);
  cuda_on_host::launch(blocks, 1, kThreads, 0, [&] { norm_kernel(given, rows, width, &largest); });
  expect(as_bits<float>(largest), NAN, 0, "norm of NaN", 0);
  const float temperatures[3] = {0.5f, 0.0f, NAN};
  for (const float tau : temperatures) {
    const uint32_t norms[2] = {as_bits<uint32_t>(5.0f), as_bits<uint32_t>(tau > 0.0f ? 5.9f : 1.0f)};
    float kept = 0.0f, scale = 0.0f;
    int32_t bounded = -1;
    cuda_on_host::launch(1, 1, 1, 0, [&] { begin_kernel(&tau, norms, &kept, &scale, &bounded); });
    expect(kept, tau > 0.0f ? tau : NAN, 0, "temperature", 0);
    expect(scale, tau > 0.0f ? 1.0f / tau : NAN, 0, "scale", 0);
    expect(bounded, tau > 0.0f, 0, "bounded", 0);
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
    all<false, false>(259, 3, 1, bounded);  // a second patch below the first
    if (quick) continue;
    all<false, false>(70, 513, 1, bounded);
    all<true, false>(67, 300, 4, bounded);
    all<false, true>(5, 1100, 2, bounded);
    all<true, true>(290, 515, 3, bounded);
  }
  solve(1, 1, 1, 0, true, true);
  solve(3, 300, 300, 0, true, true);
  solve(4, 20, 300, 7, true, false);
  solve(2, 270, 290, 20, false, true);
  rows_of<float>(3, 130, 0);
  rows_of<__nv_bfloat16>(9, 264, 0);
  rows_of<__half>(2, 132, 1);
  Case nan(70, quick ? 30 : 300, 1, false, false, true, 5);
  nan.x[65 * nan.stride + nan.cols - 3] = NAN;
  statistics<false, false>(nan);
  std::printf(failures == 0 ? "ok %.2g\n" : "failed %.2g\n", worst);
  return failures != 0;
}
