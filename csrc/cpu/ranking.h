// The ranking of a rule on ranked values: weights of ranks, and the comparators that they need.
#pragma once

#include <algorithm>
#include <vector>

#include "../math/sorting.h"
#include "kernels/columns.h"

namespace andmask {

struct Ranking {
  std::vector<double> weights;
  double total = 0;
  std::vector<Comparator> comparators;

  // Longer networks are not listed: the list would be larger than the columns that it sorts.
  static constexpr int64_t kListedRows = 512;

  void describe(ColumnTask& task) const {
    task.weights = weights.data();
    task.total = total;
    task.comparators = task.environments <= kListedRows ? comparators.data() : nullptr;
    task.comparator_count = static_cast<int64_t>(comparators.size());
  }
};

// The comparators that merge sorted runs and that can change a rank with a weight.
inline std::vector<Comparator> needed_comparators(const std::vector<double>& weights,
                                                  int64_t environments) {
  std::vector<Comparator> all;
  for_comparators(environments, kRun, [&](int64_t low, int64_t high) {
    all.push_back({static_cast<int32_t>(low), static_cast<int32_t>(high)});
  });
  std::vector<bool> wanted(environments);
  for (int64_t rank = 0; rank < environments; ++rank) wanted[rank] = weights[rank] != 0;
  std::vector<Comparator> needed;
  for (size_t index = all.size(); index-- > 0;) {
    const Comparator& comparator = all[index];
    if (!wanted[comparator.low] && !wanted[comparator.high]) continue;
    wanted[comparator.low] = wanted[comparator.high] = true;
    needed.push_back(comparator);
  }
  std::reverse(needed.begin(), needed.end());
  return needed;
}

// The ranking is empty for a rule that is not ranked.
template <typename Rule>
Ranking make_ranking(const double* arguments, int64_t environments) {
  Ranking ranking;
  if constexpr (Rule::kRanked) {
    const Rule rule(arguments, environments);
    ranking.total = rule.total();
    ranking.weights.assign(environments + 3, 0);
    for (int64_t rank = 0; rank < environments; ++rank) ranking.weights[rank] = rule.weight(rank);
    if (environments <= Ranking::kListedRows) {
      ranking.comparators = needed_comparators(ranking.weights, environments);
    }
  }
  return ranking;
}

}  // namespace andmask
