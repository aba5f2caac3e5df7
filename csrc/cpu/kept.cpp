#include "kept.h"

#include <algorithm>
#include <numeric>

#include "kernels/moments.h"

namespace andmask {

Kept::Kept(std::vector<Update>& updates, const Units& units) : updates_(updates), units_(units) {
  if (updates.empty() || !tests_votes(updates[0].rule, MomentRules())) return;
  const Update& first = updates[0];
  thresholds_ = vote_thresholds(first.test, first.count);
  for (Update& update : updates) {
    update.thresholds = thresholds_->table().data();
    tested_.push_back(update.columns);
  }
  if (first.test.criterion == Criterion::fdr) find_fdr();
}

const std::vector<int64_t>& Kept::counts() {
  if (!counts_.empty()) return counts_;
  const auto count_kept = moment_kernels(active_isa()).count_kept;
  std::vector<int64_t> parts(units_.count());
  units_.parallel(1, [&](int64_t index, int64_t unit, int64_t begin, int64_t end) {
    parts[unit] = count_kept(updates_[index], begin, end);
  });
  for (size_t i = 0; i < updates_.size(); ++i) {
    const auto part = parts.begin();
    counts_.push_back(
        std::accumulate(part + units_.first(i), part + units_.first(i + 1), int64_t{0}));
  }
  return counts_;
}

void Kept::find_fdr() {
  const size_t places = thresholds_->table().size();
  counts_.resize(updates_.size());
  tables_.resize(updates_.size() * places);
  // Every round reads the votes of a tensor again, so small ones take all their rounds in cache.
  constexpr int64_t kSmall = int64_t{1} << 18;
  std::vector<int64_t> small;
  std::vector<int64_t> sizes;
  for (size_t i = 0; i < updates_.size(); ++i) {
    if (updates_[i].columns > kSmall) continue;
    small.push_back(static_cast<int64_t>(i));
    sizes.push_back(std::max<int64_t>(1, updates_[i].columns));
  }
  const auto count_kept = moment_kernels(active_isa()).count_kept;
  Units(sizes, kSmall).parallel(4, [&](int64_t number, int64_t, int64_t, int64_t) {
    find_fdr(small[number],
             [&](const Update& update) { return count_kept(update, 0, update.columns); });
  });
  for (size_t i = 0; i < updates_.size(); ++i) {
    if (updates_[i].columns <= kSmall) continue;
    const Units units({updates_[i].columns});
    find_fdr(static_cast<int64_t>(i), [&](const Update& update) {
      std::vector<int64_t> parts(units.count());
      units.parallel(1, [&](int64_t, int64_t unit, int64_t begin, int64_t end) {
        parts[unit] = count_kept(update, begin, end);
      });
      return std::accumulate(parts.begin(), parts.end(), int64_t{0});
    });
  }
}

// From thresholds that no result is below they rise, until what they keep allows them. There are at
// most as many rounds as a table has levels, and commonly a handful.
template <typename Count>
void Kept::find_fdr(int64_t index, const Count& count) {
  Update& update = updates_[index];
  const std::vector<int32_t>& first = thresholds_->table();
  if (update.test.abstain) {
    std::vector<int32_t> any(first.size(), 0);
    std::fill_n(any.begin(), std::min<size_t>(thresholds_->least_voters(), any.size()), INT32_MAX);
    update.thresholds = any.data();
    tested_[index] = count(update);
  }
  int32_t* const table = tables_.data() + index * static_cast<int64_t>(first.size());
  std::copy(first.begin(), first.end(), table);
  update.thresholds = table;
  const int64_t tested = std::max<int64_t>(1, tested_[index]);
  do {
    counts_[index] = count(update);
  } while (thresholds_->raise(counts_[index], tested, table));
}

}  // namespace andmask
