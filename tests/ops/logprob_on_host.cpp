// Runs csrc/cuda/logprob_kernels.cuh on the CPU against plain loops in double; prints "ok" and the largest error, or what
// differs. Built and run by test_cuda_build.py.
#include "../testing/cuda_on_host.h"

#include "../../csrc/cuda/logprob_kernels.cuh"

using namespace rime;
using namespace rime::logprob;

namespace {

int failures = 0;
double worst = 0.0;  // among fp32 results

void expect(double found, double wanted, double tolerance, double scale, const char* what, int64_t at) {
  if (std::isnan(wanted) ? std::isnan(found) : found == wanted) return;
  const double error = std::fabs(found - wanted) / std::max(scale, std::fabs(wanted));
  if (tolerance < 1e-4) worst = std::max(worst, std::isfinite(error) ? error : 1e30);
  if (!(error <= tolerance) && ++failures < 10)
    std::printf("%s at %ld: %.9g, expected %.9g\n", what, static_cast<long>(at), found, wanted);
}

// Rows of one shape: row 0's target is outside the vocabulary, row 1 holds a NaN, row 2 a -inf.
struct Case {
  int64_t rows, stride;
  int vocabulary;
  float temperature = 0.7f, softcap = 4.0f;
  bool bias, capped;
  std::vector<float> x, b;
  std::vector<int64_t> targets;

  Case(int64_t rows, int vocabulary, int64_t stride, bool bias, bool capped)
      : rows(rows), stride(stride), vocabulary(vocabulary), bias(bias), capped(capped), x(rows * stride, 777.0f),
        b(vocabulary) {
    std::mt19937 random(static_cast<unsigned>(vocabulary));
    std::normal_distribution<float> normal(0.0f, 6.0f);
    for (auto& value : b) value = normal(random) / 6.0f;
    for (int64_t r = 0; r < rows; ++r) {
      for (int v = 0; v < vocabulary; ++v) x[r * stride + v] = normal(random) + 60.0f;
      targets.push_back(r == 0 ? -1 : static_cast<int64_t>(random() % static_cast<unsigned>(vocabulary)));
    }
    if (rows > 1) x[stride + vocabulary - 1] = NAN;
    if (rows > 2 && vocabulary > 1 && !capped) x[2 * stride + (targets[2] + 1) % vocabulary] = -INFINITY;
  }
  // The logits as a product that rounds would have left them: every number of x becomes one of T's, and a copy in T.
  template <class T>
  std::vector<T> rounded() {
    std::vector<T> narrow(x.size());
    for (size_t i = 0; i < x.size(); ++i) put(&narrow[i], x[i]), x[i] = wide(narrow[i]);
    return narrow;
  }
  Head head() const {
    return {vocabulary, bias ? b.data() : nullptr, &temperature, capped ? &softcap : nullptr};
  }
  double score(int64_t r, int v) const {
    const double raw = double(x[r * stride + v]) + (bias ? b[v] : 0.0f);
    return (capped ? softcap * std::tanh(raw / softcap) : raw) / temperature;
  }
};

// What the definitions give for one row.
struct Truth {
  std::vector<double> z;
  double lse = 0.0, entropy = 0.0;

  Truth(const Case& c, int64_t r) {
    double top = -INFINITY, sum = 0.0;
    for (int v = 0; v < c.vocabulary; ++v) z.push_back(c.score(r, v)), top = std::fmax(top, z.back());
    for (const double value : z) sum += std::exp(value - top);
    lse = top + std::log(sum);
    for (const double value : z)
      if (const double p = std::exp(value - lse); p != 0.0) entropy -= p * (value - lse);
  }
};

template <class L, bool kPlain, bool kAligned>
void statistics(Case& c, const L* logits, std::vector<float>& lse, std::vector<float>& hit, std::vector<float>& entropy) {
  const Statistics out{lse.data(), hit.data(), entropy.data()};
  const auto rows = static_cast<unsigned>(c.rows);
  const auto run = [&](auto kernel) {
    cuda_on_host::launch(rows, 1, Trip::kThreads, 0, [&] { kernel(logits, c.stride, c.head(), c.targets.data(), out); });
  };
  run(forward_kernel<L, false, kPlain, kAligned>);
  const std::vector<float> before = lse;
  run(forward_kernel<L, true, kPlain, kAligned>);
  for (int64_t r = 0; r < c.rows; ++r) {
    const Truth truth(c, r);
    expect(double(lse[r]) + lse[c.rows + r], truth.lse, 3e-7, 1.0, "lse", r);
    expect(before[r], lse[r], 0, 1.0, "lse without the entropy", r);
    expect(entropy[r], truth.entropy, 2e-5, 1.0, "entropy", r);
    expect(hit[r], c.targets[r] < 0 ? 0.0 : truth.z[c.targets[r]], 1e-6, 1.0, "target logit", r);
  }
}

template <class L, class T>
void check_gradient(const Case& c, const L* logits, const T* out, int64_t stride, const std::vector<float>& hit,
                    const std::vector<float>& g, const std::vector<float>& h, const std::vector<float>* products) {
  const double tolerance = sizeof(T) == 4 ? 3e-5 : 8e-3;
  for (int64_t r = 0; r < c.rows; ++r) {
    const Truth truth(c, r);
    double sum = 0.0, size = 0.0;
    for (int v = 0; v < c.vocabulary; ++v) {
      const double z = truth.z[v], p = std::exp(z - truth.lse);
      const double low = p == 0.0 ? 0.0 : p * (z - truth.lse + truth.entropy);
      double dz = g[r] * ((v == c.targets[r] ? 1.0 : 0.0) - p) - h[r] * low;
      const double t = c.capped ? z * c.temperature / c.softcap : 0.0;
      expect(wide(out[r * stride + v]), dz * (1 - t * t) / c.temperature, tolerance, 1e-2, "gradient", r * c.vocabulary + v);
      if (dz != 0.0) sum += dz * (z - hit[r]), size += std::fabs(dz * (z - hit[r]));
    }
    if (products != nullptr) expect((*products)[r], sum, 1e-4, std::max(size, 1e-3), "products", r);
    for (int64_t v = c.vocabulary; v < c.stride && sizeof(T) == sizeof(L) && sizeof(T) == 4; ++v)
      expect(wide(logits[r * c.stride + v]), 777.0, 0, 1.0, "column past the end", v);
  }
}

// logits: c.x, or a copy of the same numbers in T.
template <class L, class T, bool kPlain, bool kAligned>
void gradient(const Case& c, L* logits, const std::vector<float>& lse, const std::vector<float>& hit, const std::vector<float>& entropy) {
  std::vector<float> g(c.rows), h(c.rows), products(c.rows, -1.0f);
  for (int64_t r = 0; r < c.rows; ++r) g[r] = 0.3f + 0.1f * static_cast<float>(r), h[r] = kPlain ? 0.0f : 0.2f;
  const Upstream up{lse.data(), hit.data(), entropy.data(), g.data(), kPlain ? nullptr : h.data()};
  T* out = reinterpret_cast<T*>(logits);
  const int64_t stride = c.stride * static_cast<int64_t>(sizeof(L) / sizeof(T));
  cuda_on_host::launch(static_cast<unsigned>(c.rows), 1, Trip::kThreads, 0, [&] {
    backward_kernel<L, T, kPlain, kAligned>(logits, c.stride, c.head(), c.targets.data(), up, out, stride,
                                         products.data());
  });
  check_gradient(c, logits, out, stride, hit, g, h, &products);
}

template <bool kPlain, bool kAligned>
void all(int64_t rows, int vocabulary, int64_t stride) {
  Case c(rows, vocabulary, stride, !kPlain, !kPlain);
  std::vector<float> lse(2 * rows, -1.0f), hit(rows, -1.0f), entropy(rows, -1.0f);
  statistics<float, kPlain, kAligned>(c, c.x.data(), lse, hit, entropy);
  const auto from_fp32 = [&](auto type) {
    std::vector<float> x = c.x;
    gradient<float, decltype(type), kPlain, kAligned>(c, x.data(), lse, hit, entropy);
  };
  from_fp32(float{});
  from_fp32(__nv_bfloat16{});
  if (kPlain) from_fp32(__half{});
  const auto narrow = [&](auto type) {
    using T = decltype(type);
    Case rounded = c;
    std::vector<T> x = rounded.template rounded<T>();
    statistics<T, kPlain, kAligned>(rounded, x.data(), lse, hit, entropy);
    gradient<T, T, kPlain, kAligned>(rounded, x.data(), lse, hit, entropy);
  };
  if (kAligned && vocabulary % 8 != 0) return;  // not whole groups of 16 bytes
  narrow(__nv_bfloat16{});
  if (kPlain) narrow(__half{});
}

}  // namespace

// Arguments: the seed of the order in which threads run; "quick" for the small cases only.
int main(int, char** arguments) {
  cuda_on_host::random.seed(static_cast<unsigned>(std::atoi(arguments[1])));
  const bool quick = std::strcmp(arguments[2], "quick") == 0;
  all<true, true>(3, 4, 8);
  all<true, true>(5, 24, 32);
  all<true, false>(3, 1, 1);
  all<false, true>(3, 4104, 4112);  // a trip and a part of one
  all<false, false>(2, 4099, 4099);
  if (!quick) {
    all<true, true>(4, 12'300, 12'300);
    all<true, true>(7, 16'392, 16'400);  // five trips, the last in one group of one thread
    all<true, false>(4, 8'193, 8'201);
    all<false, true>(3, 8'192, 8'192);
    all<false, false>(3, 5'000, 5'003);
    all<true, true>(3, 20'000, 20'000);
    all<false, false>(3, 17'001, 17'003);
  }
  std::printf(failures == 0 ? "ok %.2g\n" : "failed %.2g\n", worst);
  return failures != 0;
}
