// The arithmetic of score_rewrites_, shared by the CPU and the CUDA kernels (formulas: rime_fast/ops/reward/weights.py).
//
// A rollout's row keeps a small state while anchors stream past it; states of disjoint parts of a bank merge. All of it
// is fp64: inside a group similarities differ by about 1e-3, and the advantage divides by their spread.
//
//   state = [count, a, b, c, rank_1 .. rank_P]
//     count    negatives seen                       rank_p   #greater + 1/2 #equal than own anchor p (without the 1)
//     mean:    a = sum s                            max:     a = max s
//     softmax: a = max s, b = sum exp((s - a)/tau), c = sum s exp((s - a)/tau)
#pragma once
#include <rime/math.h>

namespace rime::reward {

enum Negative : int { kMean = 0, kSoftmax = 1, kMax = 2 };
enum Score : int { kHit = 0, kReciprocal = 1, kLogarithmic = 2, kUmeR1 = 3 };
constexpr int kRanks = 4;  // where the ranks start in a state

struct RewardSpec {
  double w_fmt, w_rank, w_refine, w_len, length_limit, eps;
  int score, negative;
  int64_t hit_k;
  bool normalize;
};

// One rollout's terms, in the order of TERM_NAMES up to (not including) the group's standard deviation.
struct RewardTerms {
  double format, score, refine, length, rank, hit, positive, negative;
  bool missing;
  RIME_FN double reward() const { return format + score + refine + length; }
};

// Planes of an output [12, B, G]: reward, advantage, then TERM_NAMES, of which group_std is the last but one.
constexpr int64_t kPlanes = 12, kAdvantage = 1, kDeviation = 10;

// One rollout's planes; those of its group (advantage, deviation) are 0.
RIME_FN void fill_planes(const RewardTerms& t, double* planes) {
  const double values[kPlanes] = {t.reward(), 0.0,   t.format,   t.score,    t.refine, t.length,
                                  t.rank,     t.hit, t.positive, t.negative, 0.0,      t.missing ? 1.0 : 0.0};
  for (int64_t plane = 0; plane < kPlanes; ++plane) planes[plane] = values[plane];
}

RIME_FN bool is_finite(double x) { return x - x == 0.0; }

RIME_FN void state_init(double* state, int negative, int64_t positives) {
  for (int64_t i = 0; i < kRanks + positives; ++i) state[i] = 0.0;
  if (negative != kMean) state[1] = -HUGE_VAL;
}

// exp((s - m)/tau) weights are relative to the maximum of their part; `from` is rescaled to the common one.
RIME_FN void softmax_merge(double* into, double max, double weight, double weighted, double inverse_tau) {
  if (weight == 0.0) return;
  if (max > into[1]) {
    const double shrink = into[2] == 0.0 ? 0.0 : exp((into[1] - max) * inverse_tau);
    into[2] = into[2] * shrink + weight;
    into[3] = into[3] * shrink + weighted;
    into[1] = max;
  } else {
    const double shrink = exp((max - into[1]) * inverse_tau);
    into[2] += weight * shrink;
    into[3] += weighted * shrink;
  }
}

RIME_FN void state_merge(double* into, const double* from, int negative, int64_t positives, double inverse_tau) {
  into[0] += from[0];
  if (negative == kMean) into[1] += from[1];
  if (negative == kMax && from[1] > into[1]) into[1] = from[1];
  if (negative == kSoftmax) softmax_merge(into, from[1], from[2], from[3], inverse_tau);
  for (int64_t p = 0; p < positives; ++p) into[kRanks + p] += from[kRanks + p];
}

// neg of the formulas: 0 when there was no negative.
RIME_FN double negative_value(const double* state, int negative) {
  if (state[0] == 0.0) return 0.0;
  if (negative == kMean) return state[1] / state[0];
  return negative == kMax ? state[1] : state[3] / state[2];
}

// What one similarity adds to a rank: 1 above the threshold, 1/2 at it; both are compared as fp32 numbers.
RIME_FN double rank_step(float similarity, float threshold) {
  return similarity > threshold ? 1.0 : (similarity == threshold ? 0.5 : 0.0);
}

// One more negative of exact similarity s; what is not finite as fp32 is nobody's negative.
RIME_FN void state_add(double* state, const double* own, int64_t positives, double s, int negative,
                       double inverse_tau) {
  const float rounded = static_cast<float>(s);
  if (!(rounded - rounded == 0.0f)) return;
  for (int64_t p = 0; p < positives; ++p) state[kRanks + p] += rank_step(rounded, static_cast<float>(own[p]));
  state[0] += 1.0;
  if (negative == kMean) state[1] += s;
  if (negative == kMax && s > state[1]) state[1] = s;
  if (negative == kSoftmax) softmax_merge(state, s, 1.0, s, inverse_tau);
}

// Largest |fp32 product - exact dot| for rows of these norms: gamma_D sum|x_i y_i| <= gamma_D |x| |y|, with some room
// for the roundings of the norms, of the threshold and of the sums with it.
RIME_FN float similarity_band(int64_t width, float norm, float anchor_norm) {
  return 1.01f * static_cast<float>(width + 16) * 0x1p-24f * norm * anchor_norm + 1e-37f;
}

RIME_FN double rank_factor(double rank, const RewardSpec& spec) {
  if (spec.score == kHit) return rank <= static_cast<double>(spec.hit_k) ? 1.0 : 0.0;
  return spec.score == kReciprocal ? 1.0 / rank : 1.0 / log2(1.0 + rank);
}

// Share of the own anchors that are inside the top P of the whole bank, the own group included.
RIME_FN double share_in_top(const double* state, const double* own, int64_t positives) {
  int64_t inside = 0;
  for (int64_t p = 0; p < positives; ++p) {
    double rank = 1.0 + state[kRanks + p];
    for (int64_t q = 0; q < positives; ++q)
      if (q != p) rank += rank_step(static_cast<float>(own[q]), static_cast<float>(own[p]));
    inside += rank <= static_cast<double>(positives);
  }
  return static_cast<double>(inside) / static_cast<double>(positives);
}

// length and disc_similarity are null where that term is left out.
RIME_FN RewardTerms reward_terms(const double* state, const double* own, int64_t positives, bool format_ok,
                                 const double* length, const double* disc_similarity, const RewardSpec& spec) {
  RewardTerms out{};
  if (length != nullptr) {
    const double over = *length - spec.length_limit;
    out.length = over > 0.0 ? -spec.w_len * over / spec.length_limit : (over != over ? over : 0.0);  // NaN stays
  }
  for (int64_t p = 0; p < positives; ++p) {
    out.missing = out.missing || !is_finite(own[p]);
    out.positive += own[p];
    out.rank += 1.0 + state[kRanks + p];
  }
  if (out.missing) {
    out.positive = out.rank = 0.0;
    return out;
  }
  out.positive /= static_cast<double>(positives);
  out.rank /= static_cast<double>(positives);
  out.negative = negative_value(state, spec.negative);
  const bool grouped = spec.score == kUmeR1;
  out.hit = grouped ? share_in_top(state, own, positives) : (out.rank <= static_cast<double>(spec.hit_k) ? 1.0 : 0.0);
  const double factor = grouped ? out.hit : rank_factor(out.rank, spec);
  out.format = format_ok ? spec.w_fmt : 0.0;
  out.score = spec.w_rank * factor * (out.positive - out.negative);
  if (disc_similarity != nullptr) out.refine = spec.w_refine * (out.positive - *disc_similarity);
  return out;
}

// Unbiased standard deviation from a sum of squared deviations; a group of one has none and counts as 0.
RIME_FN double group_deviation(double squares, int64_t group_size) {
  return group_size > 1 ? sqrt(squares / static_cast<double>(group_size - 1)) : 0.0;
}

RIME_FN double advantage(double centred, double deviation, const RewardSpec& spec) {
  return spec.normalize ? centred / (deviation + spec.eps) : centred;
}

}  // namespace rime::reward
