// What the ops ask of CUDA: tasks whose pointers are the device's, put on a stream. Arguments have
// been checked. Kernel bodies are in kernels/.
#pragma once

#include <vector>

#include "../tasks/aggregate.h"
#include "../tasks/lists.h"
#include "../tasks/masked_mean.h"
#include "../tasks/outer.h"
#include "../tasks/vote_histogram.h"
#include "stream.h"

namespace andmask {

int64_t multiprocessor_count(int32_t device);

// `scaled`: where the results rescaled by the share of kept columns go; null: not wanted.
void launch_masked_mean(const Stream& stream, const MaskedMeanTask& task, Dtype dtype,
                        int64_t columns, void* scaled);

void launch_aggregate(const Stream& stream, const AggregateTask& task);

void launch_accumulate(const Stream& stream, const AccumulateList& list);

void launch_accumulate_outer(const Stream& stream, const OuterTask& task);

void launch_vote_histograms(const Stream& stream, const VoteHistogramList& list);
void launch_vote_histogram(const Stream& stream, const StackedHistogramTask& task);

// The updates themselves, rounded to the type of each sum. `out` may be the sums.
void launch_resolve(const Stream& stream, const UpdateList& list, const std::vector<void*>& out);

// Optimizer steps with the updates; `dtypes` are those of the parameters.
void launch_sgd(const Stream& stream, const UpdateList& list, const std::vector<SgdTask>& tasks,
                const std::vector<Dtype>& dtypes);
void launch_adam(const Stream& stream, const UpdateList& list, const std::vector<AdamTask>& tasks,
                 const std::vector<Dtype>& dtypes);
void launch_temporal_adam(const Stream& stream, const UpdateList& list,
                          const std::vector<TemporalAdamTask>& tasks,
                          const std::vector<Dtype>& dtypes);

}  // namespace andmask
