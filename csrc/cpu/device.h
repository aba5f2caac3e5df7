// The CPU, as the ops of csrc/ops see a device.
#pragma once

#include <vector>

#include "../tasks/aggregate.h"
#include "../tasks/lists.h"
#include "../tasks/masked_mean.h"
#include "../tasks/outer.h"
#include "../tasks/vote_histogram.h"
#include "../tensors.h"

namespace andmask {

class Cpu {
 public:
  static constexpr bool kCountsSteps = false;

  Cpu(const char* op, const Tensor&) : op(op) {}

  // The dispatcher sends an op here only if all tensors are on the CPU.
  void check_here(const char*, int64_t, const Tensor&) const {}

  const char* const op;  // for messages

  void masked_mean(const MaskedMeanTask& task, Dtype dtype, int64_t columns, void* scaled) const;
  void aggregate(const AggregateTask& task) const;
  void accumulate(const AccumulateList& list) const;
  void accumulate_outer(const OuterTask& task) const;
  void vote_histograms(const VoteHistogramList& list) const;
  void vote_histogram(const StackedHistogramTask& task) const;
  void resolve(const UpdateList& list, const std::vector<void*>& out) const;
  void sgd(const UpdateList& list, const std::vector<SgdTask>& tasks,
           const std::vector<Dtype>& dtypes) const;
  void adam(const UpdateList& list, const std::vector<AdamTask>& tasks,
            const std::vector<Dtype>& dtypes) const;
  void temporal_adam(const UpdateList& list, const std::vector<TemporalAdamTask>& tasks,
                     const std::vector<Dtype>& dtypes) const;
};

}  // namespace andmask
