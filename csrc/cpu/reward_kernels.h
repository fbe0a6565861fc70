// Dot products of a panel of rollouts with a block of anchors, and what the rewards need of them. reward.cpp has simd.h
// compile this file once for each instruction set; Panel and Block are reward's there.
//
// A lane is a rollout: a vector holds one anchor's similarities to many rollouts, so that every sum, count and maximum
// over anchors stays within its lane and nothing is summed across.
#include <rime/math.h>

namespace RIME_NAMESPACE {
namespace {

using namespace reward;

// Two vectors of lanes by this many anchors fill the registers: 32 of 64 bytes, or 16 of 32 or 16.
constexpr int kStep = RIME_VECTOR_BYTES == 64 ? 12 : RIME_VECTOR_BYTES == 32 ? 6 : 4;

// As many fp64 numbers as a register holds, and the fp32 numbers they are made of.
typedef float Half __attribute__((vector_size(RIME_VECTOR_BYTES / 2)));
typedef double Wide __attribute__((vector_size(RIME_VECTOR_BYTES)));
constexpr int kWide = kLanes / 2;

RIME_FN Wide load_wide(const float* p) {
  Half x;
  std::memcpy(&x, p, sizeof(x));
  return __builtin_convertvector(x, Wide);
}

// out[r][lane] = sum over k of panel[k][lane] anchors[r][k] for 2 kLanes lanes and kRows anchors.
template <int kRows>
void product(const float* __restrict panel, const float* __restrict anchors, int64_t width,
                    float* __restrict out) {
  Lanes sums[kRows][2];
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) sums[r][0] = sums[r][1] = Lanes{};
  for (int64_t k = 0; k < width; ++k) {
    const Lanes left = load_lanes(panel + k * kPanel);
    const Lanes right = load_lanes(panel + k * kPanel + kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r) {
      const float feature = anchors[r * width + k];
      sums[r][0] += left * feature;
      sums[r][1] += right * feature;
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < kRows; ++r) {
    store_lanes(out + r * kPanel, sums[r][0]);
    store_lanes(out + r * kPanel + kLanes, sums[r][1]);
  }
}

// The same for all n anchors of a block, kRows at a time and what is left by smaller steps.
template <int kRows>
void products(const float* panel, const float* anchors, int64_t n, int64_t width, float* out) {
  int64_t j = 0;
  for (; j + kRows <= n; j += kRows) product<kRows>(panel, anchors + j * width, width, out + j * kPanel);
  if constexpr (kRows > 1)
    if (j < n) products<kRows / 2>(panel, anchors + j * width, n - j, width, out + j * kPanel);
}

// Everything that is nobody's negative, or not finite, becomes NaN, which no comparison finds; of the rest each lane's
// number, its largest (-inf where there is none) and, with kSum, its sum.
template <bool kSum>
void settle(float* __restrict sims, const uint32_t* __restrict open, int64_t n, int32_t* __restrict count,
            float* __restrict peak, double* __restrict sum) {
  for (int lane = 0; lane < kPanel; lane += kLanes) {
    LaneBits bit, counted;
    Wide sums[2];
    Lanes top = fill(-std::numeric_limits<float>::infinity());
    for (int l = 0; l < kLanes; ++l) bit[l] = static_cast<int32_t>(1u << (lane + l));
    std::memcpy(&counted, count + lane, sizeof(counted));
    std::memcpy(sums, sum + lane, sizeof(sums));
    for (Wide& half : sums) half *= 0.25;
    const auto settle_one = [&](int64_t j) __attribute__((always_inline)) {
      float* at = sims + j * kPanel + lane;
      const Lanes v = load_lanes(at);
      const LaneBits negative = ((bit & static_cast<int32_t>(open[j])) != 0) & (v <= kLargest) & (v >= -kLargest);
      const Lanes kept = pick(negative, v, fill(kNaN));
      store_lanes(at, kept);
      top = pick(kept > top, kept, top);
      counted -= negative;
      return pick(negative, v, Lanes{});
    };
    const auto add = [&](Lanes some) __attribute__((always_inline)) {
      Half halves[2];
      std::memcpy(halves, &some, sizeof(halves));
      sums[0] += __builtin_convertvector(halves[0], Wide);
      sums[1] += __builtin_convertvector(halves[1], Wide);
    };
    int64_t j = 0;
    // Four are added in fp32, as quarters, which cannot overflow: their rounding is a product's, and it halves the work.
    for (; j + 4 <= n; j += 4) {
      const Lanes a = settle_one(j), b = settle_one(j + 1), c = settle_one(j + 2), d = settle_one(j + 3);
      if constexpr (kSum) add((a * 0.25f + b * 0.25f) + (c * 0.25f + d * 0.25f));
    }
    for (; j < n; ++j) {
      const Lanes one = settle_one(j);
      if constexpr (kSum) add(one * 0.25f);
    }
    store_lanes(peak + lane, top);
    std::memcpy(count + lane, &counted, sizeof(counted));
    for (Wide& half : sums) half *= 4.0;
    std::memcpy(sum + lane, sums, sizeof(sums));
  }
}

// Is any lane's similarity above what its lowest threshold leaves open?
bool reaches(const float* __restrict v, const float* __restrict lowest) {
  int32_t any = 0;
#pragma omp simd reduction(| : any)
  for (int l = 0; l < kPanel; ++l) any |= v[l] >= lowest[l] ? 1 : 0;
  return any != 0;
}

// Counts the lanes above `high`; returns whether any lies between `low` and `high`.
bool count_above(const float* __restrict v, const float* __restrict high, const float* __restrict low,
                        int32_t* __restrict above) {
  int32_t near = 0;
#pragma omp simd reduction(| : near)
  for (int l = 0; l < kPanel; ++l) {
    const bool over = v[l] > high[l];
    above[l] += over ? 1 : 0;
    near |= v[l] >= low[l] && !over ? 1 : 0;
  }
  return near != 0;
}

void add_ranks(Panel& panel, const Block& block, const float* sims, const float* peak) {
  if (!reaches(peak, panel.lowest)) return;  // most of a bank lies below every own anchor
  for (int64_t j = 0; j < block.size; ++j) {
    const float* v = sims + j * kPanel;
    if (!reaches(v, panel.lowest)) continue;
    for (int64_t p = 0; p < panel.positives; ++p) {
      const float *high = &panel.high[p * kPanel], *low = &panel.low[p * kPanel];
      if (!count_above(v, high, low, &panel.above[p * kPanel])) continue;
      for (int l = 0; l < kPanel; ++l)
        if (v[l] >= low[l] && !(v[l] > high[l])) panel.add_near(block, p, l, j);
    }
  }
}

// The exact maximum: whatever the fp32 product puts within its error of the top is formed again.
void add_max(Panel& panel, const Block& block, const float* sims, const float* peak) {
  for (int l = 0; l < kPanel; ++l) {
    const float band = panel.band[l];
    if (!(static_cast<double>(peak[l]) + band >= panel.top[l]) || peak[l] < -kLargest) continue;
    for (int64_t j = 0; j < block.size; ++j) {
      const float v = sims[j * kPanel + l];
      if (!(v >= peak[l] - 2.0f * band) || static_cast<double>(v) + band < panel.top[l]) continue;
      const double exact = panel.exact(block, l, j);
      if (exact > panel.top[l]) panel.top[l] = exact;
    }
  }
}

void add_softmax(Panel& panel, const Block& block, const float* __restrict sims, const float* __restrict peak) {
  double weight[kPanel] = {}, weighted[kPanel] = {};
  const float scale = static_cast<float>(panel.inverse_tau);
  for (int64_t j = 0; j < block.size; ++j) {
    const float* v = sims + j * kPanel;
#pragma omp simd
    for (int l = 0; l < kPanel; ++l) {
      const bool negative = v[l] == v[l];
      const float s = negative ? v[l] : 0.0f;
      const float w = negative ? exp32((s - peak[l]) * scale) : 0.0f;
      weight[l] += static_cast<double>(w);
      weighted[l] += static_cast<double>(w) * static_cast<double>(s);
    }
  }
  for (int l = 0; l < kPanel; ++l) {
    double state[kRanks] = {0.0, panel.top[l], panel.sum[l], panel.weighted[l]};
    softmax_merge(state, peak[l], weight[l], weighted[l], panel.inverse_tau);
    panel.top[l] = state[1];
    panel.sum[l] = state[2];
    panel.weighted[l] = state[3];
  }
}

// One block of anchors meets one panel. sims: room for block.size * kPanel numbers.
void meet(Panel& panel, const Block& block, const uint32_t* open, float* sims) {
  for (int lane = 0; lane < kPanel; lane += 2 * kLanes)
    products<kStep>(panel.packed + lane, block.anchors, block.size, panel.width, sims + lane);
  alignas(64) float peak[kPanel];
  (panel.negative == kMean ? settle<true> : settle<false>)(sims, open, block.size, panel.count, peak, panel.sum);
  add_ranks(panel, block, sims, peak);
  if (panel.negative == kMax) add_max(panel, block, sims, peak);
  if (panel.negative == kSoftmax) add_softmax(panel, block, sims, peak);
}

// The largest squared norm of the block's anchors in fp32; NaN counts as 0.
float largest_square(const float* anchors, int64_t n, int64_t width) {
  float largest = 0.0f;
  for (int64_t j = 0; j < n; ++j) {
    const float* a = anchors + j * width;
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t k = 0; k < width; ++k) total += a[k] * a[k];
    largest = total > largest ? total : largest;
  }
  return largest;
}

// Sum of x_i y_i in fp64, in an order that is fixed for n and the instruction set.
double exact_dot(const float* x, const float* y, int64_t n) {
  constexpr int kApart = 4;  // sums at a time, so that no addition waits for the one before
  Wide sums[kApart] = {};
  int64_t i = 0;
  for (; i + kApart * kWide <= n; i += kApart * kWide) {
#pragma GCC unroll 4
    for (int a = 0; a < kApart; ++a) sums[a] += load_wide(x + i + a * kWide) * load_wide(y + i + a * kWide);
  }
  const Wide lanes = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  double total = 0.0;
  for (int l = 0; l < kWide; ++l) total += lanes[l];
  for (; i < n; ++i) total += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  return total;
}

constexpr reward::Kernels kernels = {&meet, &largest_square, &exact_dot};

}  // namespace
}  // namespace RIME_NAMESPACE
