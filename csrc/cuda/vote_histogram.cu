#include "kernels/vote_histogram.h"

#include <algorithm>

#include "../tasks/vote_histogram.h"
#include "fill_tables.h"

namespace andmask {
namespace {

template <typename F>
void add_histograms(const Stream& stream, const std::vector<VoteHistogramTask>& tasks,
                    Dtype dtype) {
  using Body = VoteHistogramBody<F>;
  const int64_t bins = tasks[0].out.bins();
  std::vector<VoteHistogramItem> items;
  for (const VoteHistogramTask& task : tasks) {
    if (task.dtype != dtype || task.columns == 0) continue;
    items.push_back({task.moments.sum, task.moments.votes, task.moments.vote_bytes, task.columns,
                     task.out.counts, task.out.squares,
                     packs(task.moments, Body::kWidth, sizeof(F))});
  }
  for_tables(items, [&](const KernelTable<VoteHistogramItem>& table) {
    launch(stream, table.chunks(), Body{table, bins, Body::most_copies(bins)});
  });
}

}  // namespace

void run(const Stream& stream, const std::vector<VoteHistogramTask>& tasks) {
  add_histograms<float>(stream, tasks, Dtype::float32);
  add_histograms<double>(stream, tasks, Dtype::float64);
}

// Takes a part of the columns at a time, so that its moments are in L2 when they are read again.
void run(const Stream& stream, const StackedHistogramTask& task) {
  constexpr int64_t kColumns = int64_t{1} << 20;
  const Dtype wide = task.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  const int64_t most = std::min(task.columns, kColumns);
  const MomentArrays moments{.sum = stream.scratch<char>(most * item_size(wide)),
                             .votes = stream.scratch<int32_t>(most),
                             .vote_bytes = sizeof(int32_t)};
  for (int64_t begin = 0; begin < task.columns; begin += kColumns) {
    const int64_t columns = std::min(kColumns, task.columns - begin);
    const AccumulateTask accumulate{
        .grads = static_cast<const char*>(task.grads) + begin * item_size(task.dtype),
        .rows = task.out.environments,
        .stride = task.stride,
        .moments = moments,
        .dtype = task.dtype,
        .columns = columns};
    run(stream, std::vector{accumulate});
    run(stream, std::vector{VoteHistogramTask{moments, wide, columns, task.out}});
  }
}

}  // namespace andmask
