// Rules that need only sums over the environments, one formula each.
//
// To add one: a struct with the members of `Mean`, its name in `MomentRules`, a twin in
// andmask_ext/reference.py, a class in andmask_ext/rules/, a line in the table of
// tests/rules/rule_table.py.
#pragma once

#include "elementary.h"
#include "vote_test.h"

namespace andmask {

// The sums that a rule may ask for.
enum Moment : unsigned { kSum = 1, kVotes = 2, kSquares = 4, kLogs = 8, kVoters = 16 };

// The sums of one coordinate. Sums that a rule does not need are 0.
template <typename F>
struct Sums {
  F sum;              // of the gradients
  int32_t votes;      // of their signs
  int32_t voters;     // signs that are not zero, or all environments if zeros do not abstain
  int32_t threshold;  // |votes| that keep the coordinate
  F squares;          // of their squared deviations from their mean
  F logs;             // of log(|gradient| + kLogFloor)
};

// What makes a rule.
struct RuleSetup {
  const double* arguments;
  int64_t environments;
  VoteTest test = {};
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

  static constexpr bool kTests = false;
  static constexpr bool kMasks = false;

  double count;

  explicit Mean(const RuleSetup& call) : count(static_cast<double>(call.environments)) {}

  template <typename F>
  ANDMASK_METHOD Aggregate<F> operator()(const Sums<F>& sums) const {
    return {F(1), sums.sum / static_cast<F>(count)};
  }
};

// Rules whose first argument is the level of a test of the votes. `kTests`: the test is one of
// VoteTest. `kMasks`: the factor is 1 where the votes reach the threshold, and else 0.
struct Voting {
  static constexpr int kArguments = 1;
  static constexpr bool kTests = true;
  static constexpr bool kMasks = true;
  static const char* invalid(const double* args) { return invalid_tau(args[0]); }

  double count;

  explicit Voting(const RuleSetup& call) : count(static_cast<double>(call.environments)) {}

  template <typename F>
  ANDMASK_METHOD F mask(const Sums<F>& sums) const {
    return agrees(sums.votes, sums.threshold) ? F(1) : F(0);
  }
};

// By how large a share of the voters the majority wins.
template <typename F>
ANDMASK_INLINE F majority(int32_t votes, int32_t voters) {
  return static_cast<F>(votes < 0 ? -votes : votes) / static_cast<F>(voters > 0 ? voters : 1);
}

// Parascandolo et al. 2021, sec. 2.3.
struct AndMask : Voting {
  static constexpr const char* kName = "and_mask";
  static constexpr unsigned kMoments = kSum | kVotes;
  using Voting::Voting;

  template <typename F>
  ANDMASK_METHOD Aggregate<F> operator()(const Sums<F>& sums) const {
    return {mask(sums), sums.sum / static_cast<F>(count)};
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
    return {mask(sums), direction * magnitude};
  }
};

// Shahtalebi et al. 2021 (arXiv 2106.02266).
struct SandMask {
  static constexpr const char* kName = "sand_mask";
  static constexpr int kArguments = 2;  // tau, k
  static constexpr unsigned kMoments = kSum | kVotes | kSquares;
  static constexpr bool kTests = true;
  static constexpr bool kMasks = false;
  static const char* invalid(const double* args) {
    return invalid_tau(args[0]) ? invalid_tau(args[0]) : args[1] > 0 ? nullptr : "expected k > 0";
  }

  double count, tau, k;
  bool fixed;  // tau is given

  explicit SandMask(const RuleSetup& call)
      : count(static_cast<double>(call.environments)),
        tau(call.arguments[0]),
        k(call.arguments[1]),
        fixed(call.test.criterion == Criterion::tau) {}

  template <typename F>
  ANDMASK_METHOD Aggregate<F> operator()(const Sums<F>& sums) const {
    const double agreement = majority<double>(sums.votes, sums.voters);
    // A test keeps what it keeps of an AND-mask: tau is the last agreement that is not enough.
    const double bar = fixed ? tau
                             : static_cast<double>(sums.threshold - 1) /
                                   static_cast<double>(sums.voters > 0 ? sums.voters : 1);
    const bool kept = fixed || agrees(sums.votes, sums.threshold);
    // The authors' code takes 1e-17 for what is not a number: the variance of one environment, and
    // 0 / 0 where an agreement of exactly tau meets a variance of 0.
    const double variance = count > 1 ? static_cast<double>(sums.squares) / (count - 1) : 1e-17;
    const double mask = tanh_of(k * (agreement - bar) / variance);
    const double factor = !kept ? 0 : mask == mask ? (mask > 0 ? mask : 0) : 1e-17;
    return {static_cast<F>(factor), sums.sum / static_cast<F>(count)};
  }
};

// Gradient masked averaging: Tenison et al. 2022 (arXiv 2201.11986).
struct MaskedAverage : Voting {
  static constexpr const char* kName = "masked_average";
  static constexpr unsigned kMoments = kSum | kVotes;
  static constexpr bool kMasks = false;
  using Voting::Voting;

  template <typename F>
  ANDMASK_METHOD Aggregate<F> operator()(const Sums<F>& sums) const {
    const F factor =
        agrees(sums.votes, sums.threshold) ? F(1) : majority<F>(sums.votes, sums.voters);
    return {factor, sums.sum / static_cast<F>(count)};
  }
};

// Agr-Sum: Mansilla et al. 2021 (arXiv 2108.01621).
struct AgreementSum {
  static constexpr const char* kName = "agreement_sum";
  static constexpr int kArguments = 0;
  static constexpr unsigned kMoments = kSum | kVotes;
  static const char* invalid(const double*) { return nullptr; }

  static constexpr bool kTests = false;
  static constexpr bool kMasks = true;

  int32_t environments;

  explicit AgreementSum(const RuleSetup& call)
      : environments(static_cast<int32_t>(call.environments)) {}

  template <typename F>
  ANDMASK_METHOD Aggregate<F> operator()(const Sums<F>& sums) const {
    return {agrees(sums.votes, environments) ? F(1) : F(0), sums.sum};
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

// True if the factors of the rule of this index are what its test keeps.
template <typename... Rules>
constexpr bool masks_by_test(int rule, RuleList<Rules...>) {
  constexpr bool masks[] = {(Rules::kTests && Rules::kMasks)...};
  return masks[rule];
}

// The index of the AND-mask.
constexpr int kAndMask = 1;

template <typename... Rules>
constexpr bool tests_votes(int rule, RuleList<Rules...>) {
  constexpr bool tests[] = {Rules::kTests...};
  return tests[rule];
}

}  // namespace andmask
