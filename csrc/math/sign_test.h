// Tails of the sign test, and the thresholds that follow from them. For the host only.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <vector>

#include "vote_test.h"

namespace andmask {

// P(|V| >= k) for V = 2 B - m, B ~ Bin(m, 1/2), for one m.
class SignTest {
 public:
  explicit SignTest(int64_t voters) : voters_(voters), tails_(voters / 2 + 1) {
    // The chances of the values next to 0, and from there outwards. Long doubles keep the error of
    // millions of factors below that of one float64.
    long double chance = 1;
    for (int64_t i = 1; i <= (voters + 1) / 2; ++i) {
      chance *= static_cast<long double>(2 * i - 1) / static_cast<long double>(2 * i);
    }
    std::vector<long double> chances(tails_.size());
    for (int64_t votes = voters % 2; votes <= voters; votes += 2) {
      chances[votes / 2] = votes > 0 ? 2 * chance : chance;
      chance *=
          static_cast<long double>(voters - votes) / static_cast<long double>(voters + votes + 2);
    }
    long double tail = 0;  // the smallest first
    for (size_t i = tails_.size(); i-- > 0;) {
      tail += chances[i];
      tails_[i] = static_cast<double>(tail);
    }
    tails_[0] = 1;
  }

  double tail(int64_t votes) const {
    const int64_t attained = votes + ((votes ^ voters_) & 1);  // the next that votes can be
    return attained > voters_ ? 0 : tails_[attained / 2];
  }

  // The least k >= `from` with tail(k) <= level; none() if there is none.
  int32_t least(double level, int64_t from = 0) const {
    return static_cast<int32_t>(
        std::min(least_votes(tails_.data(), voters_, level, from), int64_t{none()}));
  }

  // More votes than there can be.
  int32_t none() const { return static_cast<int32_t>(std::min(voters_ + 1, int64_t{INT32_MAX})); }

  // [m / 2 + 1]: the tails of the votes that can be.
  const std::vector<double>& tails() const { return tails_; }

 private:
  int64_t voters_;
  std::vector<double> tails_;
};

// The thresholds of a test by the number of voters, or without `abstain` that of d voters only. For
// fdr they are those at the level q: no threshold of a tensor is below them.
class VoteThresholds {
 public:
  VoteThresholds(const VoteTest& test, int64_t environments)
      : test_(test), environments_(environments) {
    if (test.criterion == Criterion::tau) {
      for_voters([&](int64_t voters) {
        table_.push_back(static_cast<int32_t>(vote_threshold(test.level, voters)));
      });
      if (test.abstain) table_[0] = table_[1];  // no vote at all is no agreement
      return;
    }
    double level = test.level;
    if (test.criterion == Criterion::significance) {
      level = std::max(level, unanimity(environments));  // then unanimity of all is enough
    }
    for_voters([&](int64_t voters) {
      SignTest one(voters);
      table_.push_back(one.least(level));
      if (test.criterion == Criterion::fdr) tests_.push_back(std::move(one));
    });
    while (!(unanimity(least_voters_) <= level * (1 + kLevelTolerance))) ++least_voters_;
  }

  // [environments + 1], or [1] without `abstain`.
  const std::vector<int32_t>& table() const { return table_; }

  // ---- fdr ----

  // With fewer voters a coordinate cannot be significant at the level q.
  int64_t least_voters() const { return least_voters_; }

  // Raises the thresholds of a tensor, which keep `kept` of its coordinates that could be
  // significant, to those at the level q kept / coordinates. Returns false if they stay: then they
  // are the least with coordinates p <= q kept. What keeps nothing is raised to keep nothing ever.
  bool raise(int64_t kept, int64_t coordinates, int32_t* table) const {
    bool raised = false;
    const double level =
        test_.level * (static_cast<double>(kept) / static_cast<double>(coordinates));
    for (size_t i = 0; i < tests_.size(); ++i) {
      const int32_t to = kept == 0 ? tests_[i].none() : tests_[i].least(level, table[i]);
      raised = raised || to > table[i];
      table[i] = std::max(table[i], to);
    }
    return raised && kept > 0;
  }

  // The tails of all tests, one after the other: in the order of pair_index with `abstain`.
  std::vector<double> tails() const {
    std::vector<double> all;
    for (const SignTest& test : tests_) {
      all.insert(all.end(), test.tails().begin(), test.tails().end());
    }
    return all;
  }

 private:
  template <typename F>
  void for_voters(const F& f) const {
    for (int64_t voters = test_.abstain ? 0 : environments_; voters <= environments_; ++voters) {
      f(voters);
    }
  }

  // The tail of the largest number of votes: 2^(1 - m).
  static double unanimity(int64_t voters) {
    return voters == 0 ? 1 : std::ldexp(1.0, 1 - static_cast<int>(std::min<int64_t>(voters, 2000)));
  }

  VoteTest test_;
  int64_t environments_;
  std::vector<int32_t> table_;
  std::vector<SignTest> tests_;
  int64_t least_voters_ = 0;
};

// The same for every call: the last few are kept, because a table of many environments takes
// longer than a step.
inline std::shared_ptr<const VoteThresholds> vote_thresholds(const VoteTest& test,
                                                             int64_t environments) {
  using Key = std::tuple<int, double, bool, int64_t>;
  static std::mutex mutex;
  static std::map<Key, std::shared_ptr<const VoteThresholds>> kept;
  constexpr size_t kMost = 16;
  const Key key(static_cast<int>(test.criterion), test.level, test.abstain, environments);
  const std::lock_guard<std::mutex> lock(mutex);
  if (kept.size() >= kMost && kept.count(key) == 0) kept.clear();
  std::shared_ptr<const VoteThresholds>& one = kept[key];
  if (!one) one = std::make_shared<const VoteThresholds>(test, environments);
  return one;
}

}  // namespace andmask
