#include "kernels/vote_histogram.h"

#include <algorithm>

#include "launchers.h"
#include "lists.h"

namespace andmask {
namespace {

template <typename F>
void histograms_of(const Stream& stream, const VoteHistogramList& list, Dtype dtype) {
  using Body = VoteHistogramBody<F>;
  std::vector<VoteHistogramItem> items;
  for (size_t i = 0; i < list.tasks.size(); ++i) {
    const VoteHistogramTask& task = list.tasks[i];
    if (task.dtype != dtype || list.sizes[i] == 0) continue;
    items.push_back({task.moments.sum, task.moments.votes, task.moments.vote_bytes, list.sizes[i],
                     static_cast<int64_t>(i), packs(task.moments, Body::kWidth, sizeof(F))});
  }
  for_lists(items, [&](const List<VoteHistogramItem>& some) {
    launch(stream, some.chunks(),
           Body{some, list.out.bins(), Body::most_copies(list.out.bins()), list.out.counts,
                list.out.squares});
  });
}

}  // namespace

void launch_vote_histograms(const Stream& stream, const VoteHistogramList& list) {
  histograms_of<float>(stream, list, Dtype::float32);
  histograms_of<double>(stream, list, Dtype::float64);
}

// Moments of a part of the columns at a time: they are read again while they are in L2.
void launch_vote_histogram(const Stream& stream, const StackedHistogramTask& task) {
  constexpr int64_t kColumns = int64_t{1} << 20;
  const Dtype wide = task.dtype == Dtype::float64 ? Dtype::float64 : Dtype::float32;
  const int64_t most = std::min(task.columns, kColumns);
  const MomentArrays moments{stream.scratch<char>(most * item_size(wide)),
                             stream.scratch<int32_t>(most), sizeof(int32_t), nullptr, nullptr};
  for (int64_t begin = 0; begin < task.columns; begin += kColumns) {
    const int64_t columns = std::min(kColumns, task.columns - begin);
    const void* const grads = static_cast<const char*>(task.grads) + begin * item_size(task.dtype);
    launch_accumulate(stream, {{{grads, task.out.environments, task.stride, nullptr, 0, moments}},
                               {task.dtype},
                               {columns}});
    launch_vote_histograms(stream, {{{moments, wide}}, {columns}, task.out});
  }
}

}  // namespace andmask
