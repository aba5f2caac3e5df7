// The sign test of one coordinate: how many votes keep it.
//
// If the gradients of a coordinate are noise around zero, then of m signs that are not zero each is
// + or - with even chances: V = 2 B - m, B ~ Bin(m, 1/2), and the tail p(k | m) = P(|V| >= k).
#pragma once

#include "agreement.h"

namespace andmask {

enum class Criterion : int {
  tau,           // |V| >= tau m
  significance,  // p(|V| | m) <= alpha
  fdr,           // Benjamini and Hochberg's step-up over a tensor, at the false discovery rate q
};
constexpr int kCriteria = 3;

struct VoteTest {
  Criterion criterion = Criterion::tau;
  double level = 0;      // tau, alpha or q
  bool abstain = false;  // zeros are no votes: m is counted at each coordinate. Else m = d

  // One threshold for all coordinates and all tensors, known without a table.
  bool is_plain() const { return criterion == Criterion::tau && !abstain; }
};

// Most environments of fdr with abstain: a device has bins for every pair of votes and voters.
constexpr int64_t kMostPairs = 1024;

// |votes| that keep a coordinate, by the number of its voters.
struct Thresholds {
  const int32_t* table = nullptr;  // [environments + 1] by voters; without abstain, [1]
  bool abstain = false;
};

// A level is compared with what is rounded, and often is a short decimal that should hold exactly.
constexpr double kLevelTolerance = 1e-9;

// The place of p(k | m) in a table of all m and all k of the parity of m.
ANDMASK_INLINE int64_t pair_row(int64_t voters) { return (voters + 1) * (voters + 1) / 4; }
ANDMASK_INLINE int64_t pair_index(int64_t votes, int64_t voters) {
  return pair_row(voters) + votes / 2;
}

// The least k >= `from` with p(k | voters) <= level; voters + 1 if there is none. `tails`: those of
// the k of the parity of `voters`. No vote is no evidence.
ANDMASK_INLINE int64_t least_votes(const double* tails, int64_t voters, double level,
                                   int64_t from) {
  const double allowed = level * (1 + kLevelTolerance);
  int64_t votes = from > 1 ? from : 1;
  while (votes <= voters) {
    const int64_t attained = votes + ((votes ^ voters) & 1);  // the next that votes can be
    if (attained <= voters && tails[attained / 2] <= allowed) break;
    ++votes;
  }
  return votes <= voters ? votes : voters + 1;
}

}  // namespace andmask
