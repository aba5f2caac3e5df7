// A CUDA device, as the ops of csrc/ops see it.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include <vector>

#include "../tensors.h"
#include "launchers.h"

namespace andmask {

// For the time of one op: makes the device of its tensors the current one, and puts kernels on the
// stream that is current there. Nothing is waited for.
class Cuda {
 public:
  static constexpr bool kCountsSteps = true;

  Cuda(const char* op, const Tensor& first);
  Cuda(const Cuda&) = delete;

  void check_here(const char* name, int64_t index, const Tensor& tensor) const;

  void masked_mean(const MaskedMeanTask& task, Dtype dtype, int64_t columns, void* scaled) const {
    launch_masked_mean(stream_, task, dtype, columns, scaled);
  }
  void aggregate(const AggregateTask& task) const { launch_aggregate(stream_, task); }
  void accumulate(const AccumulateList& list) const { launch_accumulate(stream_, list); }
  void accumulate_outer(const OuterTask& task) const { launch_accumulate_outer(stream_, task); }
  void vote_histograms(const VoteHistogramList& list) const {
    launch_vote_histograms(stream_, list);
  }
  void vote_histogram(const StackedHistogramTask& task) const {
    launch_vote_histogram(stream_, task);
  }
  void resolve(const UpdateList& list, const std::vector<void*>& out) const {
    launch_resolve(stream_, list, out);
  }
  void sgd(const UpdateList& list, const std::vector<SgdTask>& tasks,
           const std::vector<Dtype>& dtypes) const {
    launch_sgd(stream_, list, tasks, dtypes);
  }
  void adam(const UpdateList& list, const std::vector<AdamTask>& tasks,
            const std::vector<Dtype>& dtypes) const {
    launch_adam(stream_, list, tasks, dtypes);
  }
  void temporal_adam(const UpdateList& list, const std::vector<TemporalAdamTask>& tasks,
                     const std::vector<Dtype>& dtypes) const {
    launch_temporal_adam(stream_, list, tasks, dtypes);
  }

 private:
  const char* const op_;
  const Tensor first_;
#if !defined(ANDMASK_ON_HOST)
  const torch::stable::accelerator::DeviceGuard guard_;
#endif
  Stream stream_;
  // Scratch comes from torch's allocator, which gives it to others on the same stream only: it may
  // be let go of as soon as the last kernel is queued.
  mutable std::vector<Tensor> memory_;
};

}  // namespace andmask
