// Rules that need whole columns (the gradients of all environments at one coordinate) or random
// numbers: one formula each.
//
// To add one: a struct with the members of `Median` (a mean of ranked values) or of `SignDropout`
// (a formula of sums over the environments), its name in `ColumnRules`, a twin in
// andmask_ext/reference.py, a class in andmask_ext/rules, a line in the table of
// tests/rules/rule_table.py.
#pragma once

#include "rules.h"

namespace andmask {

enum class Noise { none, uniform, normal };

// ---- weighted means of ranked values: result = sum(weight(rank) * value) / total ----

struct Ranked {
  static constexpr bool kRanked = true;
  static constexpr Noise kNoise = Noise::none;
  static constexpr bool kFillsMissing = false;
};

// Yin et al. 2018 (arXiv 1803.01498).
struct TrimmedMean : Ranked {
  static constexpr const char* kName = "trimmed_mean";
  static constexpr int kArguments = 1;  // b
  static const char* invalid(const double* args, int64_t environments) {
    return !(args[0] >= 0 && args[0] == __builtin_floor(args[0])) ? "expected a whole b >= 0"
           : 2 * args[0] < static_cast<double>(environments)
               ? nullptr
               : "expected more than 2 b environments";
  }

  int64_t first, last;  // of the ranks that count

  TrimmedMean(const double* args, int64_t environments)
      : TrimmedMean(static_cast<int64_t>(args[0]), environments) {}
  TrimmedMean(int64_t dropped, int64_t environments)
      : first(dropped), last(environments - 1 - dropped) {}

  double total() const { return static_cast<double>(last - first + 1); }
  double weight(int64_t rank) const { return rank >= first && rank <= last ? 1 : 0; }
};

// Yang et al. 2020 (arXiv 2003.07422). For an even number: the mean of the two in the middle.
struct Median : TrimmedMean {
  static constexpr const char* kName = "median";
  static constexpr int kArguments = 0;
  static const char* invalid(const double*, int64_t) { return nullptr; }

  Median(const double*, int64_t environments) : TrimmedMean((environments - 1) / 2, environments) {}
};

// arXiv 2002.10657. A percentile lies between two ranks, as in numpy.percentile. The values beyond
// it, which are the lowest `rank + 1` (and the highest), are replaced by it.
struct WinsorizedMean : Ranked {
  static constexpr const char* kName = "winsorized_mean";
  static constexpr int kArguments = 1;  // c
  static const char* invalid(const double* args, int64_t) {
    return args[0] >= 0 && args[0] <= 50 ? nullptr : "expected c in [0, 50]";
  }

  int64_t environments, low, high;  // the ranks up to `low` and from `high` on are clipped
  double clipped_low, clipped_high, fraction;

  WinsorizedMean(const double* args, int64_t count) : environments(count) {
    const double position = args[0] / 100 * static_cast<double>(count - 1);
    low = static_cast<int64_t>(position);
    high = count - 1 - low;
    fraction = position - static_cast<double>(low);
    clipped_low = static_cast<double>(low + 1);
    clipped_high = static_cast<double>(high > low ? low + 1 : low);
  }

  double total() const { return static_cast<double>(environments); }
  double weight(int64_t rank) const {
    return (rank > low && rank < high ? 1 : 0) +
           clipped_low * ((rank == low ? 1 - fraction : 0) + (rank == low + 1 ? fraction : 0)) +
           clipped_high * ((rank == high ? 1 - fraction : 0) + (rank == high - 1 ? fraction : 0));
  }
};

// ---- formulas of sums of terms over the environments ----

// GradDrop: Chen et al. 2020 (arXiv 2010.06808). Its (1 + sum g / sum |g|) / 2 is the share of the
// positive gradients in sum |g|.
struct SignDropout {
  static constexpr const char* kName = "sign_dropout";
  static constexpr int kArguments = 0;
  static constexpr bool kRanked = false;
  static constexpr Noise kNoise = Noise::uniform;
  static constexpr bool kFillsMissing = false;
  static constexpr int kSums = 2;
  static const char* invalid(const double*, int64_t) { return nullptr; }

  SignDropout(const double*, int64_t) {}

  template <typename F>
  ANDMASK_METHOD void terms(F grad, F* term) const {
    term[0] = grad > 0 ? grad : 0;
    term[1] = grad < 0 ? grad : 0;
  }

  ANDMASK_METHOD double operator()(const double* sums, double noise) const {
    const double share = sums[0] / (sums[0] - sums[1]);  // NaN where all are zero: nothing is kept
    return (share > noise ? sums[0] : 0) + (share < noise ? sums[1] : 0);
  }
};

// FedILC: Zhang et al. 2022 (arXiv 2205.09305).
struct FedIlc {
  static constexpr const char* kName = "fed_ilc";
  static constexpr int kArguments = 1;  // tau
  static constexpr bool kRanked = false;
  static constexpr Noise kNoise = Noise::none;
  static constexpr bool kFillsMissing = false;
  static constexpr int kSums = 4;
  static const char* invalid(const double* args, int64_t) { return invalid_tau(args[0]); }

  double count, threshold;  // the counts are whole numbers, exact in float64

  FedIlc(const double* args, int64_t environments)
      : count(static_cast<double>(environments)),
        threshold(static_cast<double>(vote_threshold(args[0], environments))) {}

  template <typename F>
  ANDMASK_METHOD void terms(F grad, F* term) const {
    const F log = log_of(grad < 0 ? -grad : grad);
    term[0] = grad > 0 ? F(1) : F(0);
    term[1] = grad < 0 ? F(1) : F(0);
    term[2] = grad > 0 ? log : 0;
    term[3] = grad < 0 ? log : 0;
  }

  // The mean over `count` of `size` gradients, each replaced by their geometric mean.
  ANDMASK_METHOD double geometric(double size, double logs) const {
    return size / count * exp_of(logs / (size > 1 ? size : 1));
  }

  ANDMASK_METHOD double operator()(const double* sums, double) const {
    const double votes = sums[0] - sums[1];
    const double kept = (votes < 0 ? -votes : votes) >= threshold ? 1 : 0;
    return kept * (geometric(sums[0], sums[2]) - geometric(sums[1], sums[3]));
  }
};

// Marks a coordinate that noise is to fill: a NaN with a payload, which no result has.
constexpr uint32_t kMissing = 0x7fc0beefu;

ANDMASK_INLINE float missing_value(float) { return float_of(kMissing); }
ANDMASK_INLINE double missing_value(double) { return double_of(kMissing | uint64_t{0x7ff8} << 48); }

// Agr-Rand: Mansilla et al. 2021 (arXiv 2108.01621). Where the signs do not all agree, the result
// is noise of the mean size of the kept sums of the tensor.
struct AgreementRandom {
  static constexpr const char* kName = "agreement_random";
  static constexpr int kArguments = 0;
  static constexpr bool kRanked = false;
  static constexpr Noise kNoise = Noise::normal;
  static constexpr bool kFillsMissing = true;
  static constexpr int kSums = 2;
  static const char* invalid(const double*, int64_t) { return nullptr; }

  double count;

  AgreementRandom(const double*, int64_t environments) : count(static_cast<double>(environments)) {}

  template <typename F>
  ANDMASK_METHOD void terms(F grad, F* term) const {
    term[0] = grad;
    term[1] = (grad > 0 ? F(1) : F(0)) - (grad < 0 ? F(1) : F(0));
  }

  ANDMASK_METHOD bool kept(const double* sums) const {
    return (sums[1] < 0 ? -sums[1] : sums[1]) >= count;
  }

  ANDMASK_METHOD double operator()(const double* sums, double) const { return sums[0]; }
};

using ColumnRules =
    RuleList<Median, TrimmedMean, WinsorizedMean, SignDropout, FedIlc, AgreementRandom>;

}  // namespace andmask
