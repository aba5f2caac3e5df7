#include "kept.h"

#include <algorithm>

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
  if (counts_.empty() && !updates_.empty()) {
    counts_.resize(updates_.size());
    count(std::vector<bool>(updates_.size(), true), counts_);
  }
  return counts_;
}

// From thresholds that no result is below they rise, until what they keep allows them. Every round
// reads the votes alone; there are at most as many as a table has levels, and commonly a handful.
void Kept::find_fdr() {
  const size_t tensors = updates_.size();
  const std::vector<int32_t>& first = thresholds_->table();
  counts_.resize(tensors);
  std::vector<bool> open(tensors);
  for (size_t i = 0; i < tensors; ++i) open[i] = updates_[i].columns > 0;
  if (updates_[0].test.abstain) {
    std::vector<int32_t> any(first.size(), 0);
    std::fill_n(any.begin(), std::min<size_t>(thresholds_->least_voters(), any.size()), INT32_MAX);
    for (Update& update : updates_) update.thresholds = any.data();
    count(open, tested_);
  }
  tables_.resize(tensors * first.size());
  for (size_t i = 0; i < tensors; ++i) {
    int32_t* const table = tables_.data() + i * first.size();
    std::copy(first.begin(), first.end(), table);
    updates_[i].thresholds = table;
    open[i] = open[i] && tested_[i] > 0;
  }
  while (std::find(open.begin(), open.end(), true) != open.end()) {
    count(open, counts_);
    for (size_t i = 0; i < tensors; ++i) {
      if (!open[i]) continue;
      open[i] = thresholds_->raise(counts_[i], tested_[i], tables_.data() + i * first.size());
    }
  }
}

void Kept::count(const std::vector<bool>& chosen, std::vector<int64_t>& counts) const {
  const auto count_kept = moment_kernels(active_isa()).count_kept;
  std::vector<int64_t> parts(units_.count());
  units_.parallel(1, [&](int64_t index, int64_t unit, int64_t begin, int64_t end) {
    if (chosen[index]) parts[unit] = count_kept(updates_[index], begin, end);
  });
  for (size_t i = 0; i < counts.size(); ++i) {
    if (!chosen[i]) continue;
    counts[i] = 0;
    for (int64_t unit = units_.first(i); unit < units_.first(i + 1); ++unit) {
      counts[i] += parts[unit];
    }
  }
}

}  // namespace andmask
