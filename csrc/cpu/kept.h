// Which coordinates the tests of updates keep.
#pragma once

#include <memory>
#include <vector>

#include "../math/sign_test.h"
#include "../tasks/moments.h"
#include "units.h"

namespace andmask {

// The thresholds of a list of updates of one test, and the number of coordinates that they keep.
class Kept {
 public:
  // Points the updates to their thresholds, which live as long as this object.
  Kept(std::vector<Update>& updates, const Units& units);

  // [tensors]: the coordinates that are kept.
  const std::vector<int64_t>& counts();

  // [tensors]: the coordinates that have votes enough to be kept by fdr.
  const std::vector<int64_t>& tested() const { return tested_; }

 private:
  void find_fdr();
  // count(update) returns what the thresholds of an update keep.
  template <typename Count>
  void find_fdr(int64_t index, const Count& count);

  std::vector<Update>& updates_;
  const Units& units_;
  std::shared_ptr<const VoteThresholds> thresholds_;
  std::vector<int32_t> tables_;  // of fdr: one for each tensor
  std::vector<int64_t> counts_;  // empty: not counted yet
  std::vector<int64_t> tested_;
};

}  // namespace andmask
