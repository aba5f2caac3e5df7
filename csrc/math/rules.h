// Rules that need only sums over the environments, one formula each.
//
// To add one: a struct with the members of `Mean`, its name in `MomentRules`, a twin in
// andmask_ext/reference.py, a class in andmask_ext/rules/, a line in the table of
// tests/rules/rule_table.py.
#pragma once

#include "agreement.h"
#include "elementary.h"

namespace andmask {

// The sums that a rule may ask for.
enum Moment : unsigned { kSum = 1, kVotes = 2, kSquares = 4, kLogs = 8 };

// The sums of one coordinate. Sums that a rule does not need are 0.
template <typename F>
struct Sums {
  F sum;          // of the gradients
  int32_t votes;  // of their signs
  F squares;      // of their squared deviations from their mean
  F logs;         // of log(|gradient| + kLogFloor)
};

constexpr double kLogFloor = 1e-10;

template <typename F>
ANDMASK_INLINE F log_magnitude(F grad) {
  return log_of((grad < 0 ? -grad : grad) + static_cast<F>(kLogFloor));
}

// The sum of squared deviations after one more value. Unlike the sum of squares it has nothing to
// cancel: `sum / count` is the mean of the `count >= 1` values before (Chan, Golub and LeVeque
// 1979).
template <typename F>
ANDMASK_INLINE F add_square(F squares, F sum, F count, F share, F value) {
  const F deviation = value - sum / count;
  return squares + deviation * deviation * share;  // share = count / (count + 1)
}

// update = factor * value. `rescale` divides by the mean factor of the parameter tensor.
template <typename F>
struct Aggregate {
  F factor;
  F value;
};

// Returns what was expected of the arguments of a rule, or nullptr if they are valid.
ANDMASK_INLINE const char* invalid_tau(double tau) {
  return tau >= 0 && tau <= 1 ? nullptr : "expected tau in [0, 1]";
}

// Stacked environments are added in groups of this many, and the groups in float64, so that
// rounding does not grow with their number. The grouping is part of the result.
constexpr int64_t kJoinedRows = 16;

// The sum of squared deviations of `before` values and of `rows` others, joined (Chan, Golub and
// LeVeque 1979).
ANDMASK_INLINE double join_squares(double squares, double sum, double before, double more_squares,
                                   double more_sum, double rows) {
  const double deviation = more_sum / rows - sum / before;
  return squares + more_squares + deviation * deviation * (before * rows / (before + rows));
}

struct Mean {
  static constexpr const char* kName = "mean";
  static constexpr int kArguments = 0;
  static constexpr unsigned kMoments = kSum;
  static const char* invalid(const double*) { return nullptr; }

  double count;

  Mean(const double*, int64_t environments) : count(static_cast<double>(environments)) {}

  template <typename F>
  ANDMASK_METHOD Aggregate<F> operator()(const Sums<F>& sums) const {
    return {F(1), sums.sum / static_cast<F>(count)};
  }
};

// Rules whose one argument is the threshold of a vote.
struct Voting {
  static constexpr int kArguments = 1;  // tau
  static const char* invalid(const double* args) { return invalid_tau(args[0]); }

  double count;
  int32_t threshold;

  Voting(const double* args, int64_t environments)
      : count(static_cast<double>(environments)),
        threshold(static_cast<int32_t>(vote_threshold(args[0], environments))) {}
};

// Parascandolo et al. 2021, sec. 2.3.
struct AndMask : Voting {
  static constexpr const char* kName = "and_mask";
  static constexpr unsigned kMoments = kSum | kVotes;
  using Voting::Voting;

  template <typename F>
  ANDMASK_METHOD Aggregate<F> operator()(const Sums<F>& sums) const {
    return {agrees(sums.votes, threshold) ? F(1) : F(0), sums.sum / static_cast<F>(count)};
  }
};

// The authors' released code: the mask on the geometric mean of magnitudes, with the sign of the
// mean.
struct GeometricMean : Voting {
  static constexpr const char* kName = "geometric_mean";
  static constexpr unsigned kMoments = kSum | kVotes | kLogs;
  using Voting::Voting;

  template <typename F>
  ANDMASK_METHOD Aggregate<F> operator()(const Sums<F>& sums) const {
    const F direction = (sums.sum > 0 ? F(1) : F(0)) - (sums.sum < 0 ? F(1) : F(0));
    const F magnitude = static_cast<F>(exp_of(static_cast<double>(sums.logs) / count));
    return {agrees(sums.votes, threshold) ? F(1) : F(0), direction * magnitude};
  }
};

// Shahtalebi et al. 2021 (arXiv 2106.02266).
struct SandMask {
  static constexpr const char* kName = "sand_mask";
  static constexpr int kArguments = 2;  // tau, k
  static constexpr unsigned kMoments = kSum | kVotes | kSquares;
  static const char* invalid(const double* args) {
    return invalid_tau(args[0]) ? invalid_tau(args[0]) : args[1] > 0 ? nullptr : "expected k > 0";
  }

  double count, tau, k;

  SandMask(const double* args, int64_t environments)
      : count(static_cast<double>(environments)), tau(args[0]), k(args[1]) {}

  template <typename F>
  ANDMASK_METHOD Aggregate<F> operator()(const Sums<F>& sums) const {
    const double agreement = static_cast<double>(sums.votes < 0 ? -sums.votes : sums.votes) / count;
    // The authors' code takes 1e-17 for what is not a number: the variance of one environment, and
    // 0 / 0 where an agreement of exactly tau meets a variance of 0.
    const double variance = count > 1 ? static_cast<double>(sums.squares) / (count - 1) : 1e-17;
    const double mask = tanh_of(k * (agreement - tau) / variance);
    const double factor = mask == mask ? (mask > 0 ? mask : 0) : 1e-17;
    return {static_cast<F>(factor), sums.sum / static_cast<F>(count)};
  }
};

// Gradient masked averaging: Tenison et al. 2022 (arXiv 2201.11986).
struct MaskedAverage : Voting {
  static constexpr const char* kName = "masked_average";
  static constexpr unsigned kMoments = kSum | kVotes;
  using Voting::Voting;

  template <typename F>
  ANDMASK_METHOD Aggregate<F> operator()(const Sums<F>& sums) const {
    const F agreement =
        static_cast<F>(sums.votes < 0 ? -sums.votes : sums.votes) / static_cast<F>(count);
    return {agrees(sums.votes, threshold) ? F(1) : agreement, sums.sum / static_cast<F>(count)};
  }
};

// Agr-Sum: Mansilla et al. 2021 (arXiv 2108.01621).
struct AgreementSum {
  static constexpr const char* kName = "agreement_sum";
  static constexpr int kArguments = 0;
  static constexpr unsigned kMoments = kSum | kVotes;
  static const char* invalid(const double*) { return nullptr; }

  int32_t threshold;

  AgreementSum(const double*, int64_t environments)
      : threshold(static_cast<int32_t>(environments)) {}

  template <typename F>
  ANDMASK_METHOD Aggregate<F> operator()(const Sums<F>& sums) const {
    return {agrees(sums.votes, threshold) ? F(1) : F(0), sums.sum};
  }
};

template <typename... Rules>
struct RuleList {
  static constexpr int kSize = sizeof...(Rules);
};

using MomentRules = RuleList<Mean, AndMask, GeometricMean, SandMask, MaskedAverage, AgreementSum>;

// The moments that the rule of this index needs.
template <typename... Rules>
constexpr unsigned moments_of(int rule, RuleList<Rules...>) {
  constexpr unsigned moments[] = {Rules::kMoments...};
  return moments[rule];
}

}  // namespace andmask
