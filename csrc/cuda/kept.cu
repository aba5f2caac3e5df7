#include "kept.h"

#include <algorithm>

#include "../math/rules.h"
#include "../math/sign_test.h"
#include "fill_tables.h"
#include "kernels/kept.h"

namespace andmask {
namespace {

// Bins of this many bytes are in memory at once.
constexpr int64_t kBinBytes = int64_t{64} << 20;

// Fills in [tensors, places] thresholds, and what they keep if that is wanted.
void find_thresholds(const Stream& stream, const std::vector<Update>& updates,
                     const VoteThresholds& shared, int32_t* tables, int64_t* kept,
                     int64_t* tested) {
  const Update& first = updates[0];
  const VoteBins bins{first.count, first.test.abstain};
  const int64_t places = static_cast<int64_t>(shared.table().size());
  const std::vector<double> tails = shared.tails();
  const double* const device_tails =
      tails.empty() ? nullptr : upload(stream, tails.data(), static_cast<int64_t>(tails.size()));
  const int32_t* const device_first =
      places > 1 ? upload(stream, shared.table().data(), places) : nullptr;
  const int64_t tensors = static_cast<int64_t>(updates.size());
  const int64_t at_once = std::clamp<int64_t>(
      kBinBytes / (bins.count() * static_cast<int64_t>(sizeof(int64_t))), 1, tensors);
  int64_t* const counts = stream.scratch<int64_t>(at_once * bins.count());
  for (int64_t begin = 0; begin < tensors; begin += at_once) {
    const int64_t end = std::min(begin + at_once, tensors);
    launch(stream, blocks_for(stream, (end - begin) * bins.count(), ZeroBody::kThreads),
           ZeroBody{counts, (end - begin) * bins.count()});
    std::vector<VoteCountItem> votes;
    std::vector<ThresholdItem> items;
    for (int64_t i = begin; i < end; ++i) {
      const Update& update = updates[i];
      const MomentArrays& moments = update.moments;
      int64_t* const own = counts + (i - begin) * bins.count();
      if (update.columns > 0) {
        const int width = VoteCountBody::kWidth;
        votes.push_back({moments.votes, moments.voters, moments.vote_bytes, update.columns, own,
                         packs(moments.votes, width, moments.vote_bytes) &&
                             packs(moments.voters, width, moments.vote_bytes)});
      }
      items.push_back({own, tables + i * places, kept ? kept + i : nullptr,
                       tested ? tested + i : nullptr, update.columns});
    }
    for_tables(votes, [&](const KernelTable<VoteCountItem>& table) {
      launch(stream, table.chunks(),
             VoteCountBody{table, bins, VoteCountBody::most_copies(bins.count())});
    });
    for_tables(items, [&](const KernelTable<ThresholdItem>& table) {
      launch(stream, table.count,
             ThresholdBody{table, bins, first.test, device_first, shared.table()[0], device_tails,
                           shared.least_voters()});
    });
  }
}

}  // namespace

int32_t set_thresholds(const Stream& stream, std::vector<Update>& updates) {
  if (updates.empty() || !tests_votes(updates[0].rule, MomentRules())) return 0;
  const Update& first = updates[0];
  const auto shared = vote_thresholds(first.test, first.count);
  const int64_t places = static_cast<int64_t>(shared->table().size());
  if (first.test.criterion == Criterion::fdr) {
    const int64_t tensors = static_cast<int64_t>(updates.size());
    int32_t* const tables = stream.scratch<int32_t>(tensors * places);
    find_thresholds(stream, updates, *shared, tables, nullptr, nullptr);
    for (int64_t i = 0; i < tensors; ++i) updates[i].thresholds = tables + i * places;
  } else if (first.test.abstain) {
    const int32_t* const table = upload(stream, shared->table().data(), places);
    for (Update& update : updates) update.thresholds = table;
  }
  return shared->table()[0];
}

void run(const Stream& stream, const VoteThresholdsTask& task) {
  const Update& first = task.updates[0];
  find_thresholds(stream, task.updates, *vote_thresholds(first.test, first.count), task.thresholds,
                  task.kept, task.tested);
}

}  // namespace andmask
