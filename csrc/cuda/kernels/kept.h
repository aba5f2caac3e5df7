// Kernel bodies that find the thresholds of a test, for a table of tensors: bins for all that the
// votes of a coordinate can be, and then thresholds that fit what the bins hold. No host waits.
#pragma once

#include "../../math/vote_test.h"
#include "block_ops.h"
#include "kernel_table.h"

namespace andmask {

// What the votes of a coordinate can be: |votes| up to the environments, or with `abstain` every
// pair of |votes| and voters.
struct VoteBins {
  int64_t environments;
  bool abstain;

  ANDMASK_METHOD int64_t count() const {
    return abstain ? pair_row(environments + 1) : environments + 1;
  }
  // Votes that cannot be are in no bin.
  ANDMASK_METHOD int64_t of(int32_t votes, int32_t voters) const {
    const int64_t size = agreement(votes);
    if (!abstain) return size <= environments ? size : -1;
    const bool can_be = voters >= 0 && voters <= environments && size <= voters;
    return can_be ? pair_index(size, voters) : -1;
  }
};

struct VoteCountItem {
  const void* votes;
  const void* voters;  // null without `abstain`
  int vote_bytes;
  int64_t size;
  int64_t* counts;  // [bins]
  bool packed;
};

struct VoteCountBody {
  static constexpr int kThreads = kTableThreads;
  static constexpr int kWidth = 8;
  static constexpr int64_t kCounts = 4096;  // in shared memory

  struct State {};
  struct Shared {
    uint32_t counts[kCounts];
  };

  KernelTable<VoteCountItem> table;
  VoteBins bins;
  int64_t copies;  // of the bins in shared memory, for threads side by side; 0: they do not fit

  static int64_t most_copies(int64_t bins) {
    return kCounts / bins < kWarp ? kCounts / bins : kWarp;
  }

  template <typename Use>
  ANDMASK_METHOD void for_bins(const VoteCountItem& item, int64_t chunk, int thread,
                               const Use& use) const {
    for_tiles<kWidth>(item, chunk, thread, [&](const Tile<kWidth>& tile) {
      tile.at([&](const auto& at) {
        int32_t votes[kWidth];
        int32_t voters[kWidth] = {};
        if (bins.abstain) get_votes<kWidth>(at, item.voters, item.vote_bytes, voters);
        get_votes<kWidth>(at, item.votes, item.vote_bytes, votes);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const int64_t bin = bins.of(votes[i], voters[i]);
          if (at.has(i) && bin >= 0) use(bin);
        }
      });
    });
  }

  template <typename Threads>
  ANDMASK_METHOD void operator()(Threads& threads, Shared& shared, const ThreadIndex& index) const {
    const int64_t chunk = table.first_chunk[0] + index.block;
    const int64_t entry = table.item_of(chunk);
    const VoteCountItem& item = table.items[entry];
    const int64_t item_chunk = chunk - table.first_chunk[entry];
    int64_t* const counts = item.counts;
    if (copies == 0) {
      threads.each([&](int thread, State&) {
        for_bins(item, item_chunk, thread,
                 [&](int64_t bin) { add_atomically(counts + bin, int64_t{1}); });
      });
      return;
    }
    threads.each([&](int thread, State&) {
      for (int64_t i = thread; i < bins.count() * copies; i += kThreads) shared.counts[i] = 0;
    });
    threads.barrier();
    threads.each([&](int thread, State&) {
      const int64_t copy = thread % copies;
      for_bins(item, item_chunk, thread, [&](int64_t bin) {
        add_atomically(shared.counts + bin * copies + copy, uint32_t{1});
      });
    });
    threads.barrier();
    threads.each([&](int thread, State&) {
      for (int64_t bin = thread; bin < bins.count(); bin += kThreads) {
        int64_t count = 0;
        for (int64_t copy = 0; copy < copies; ++copy) count += shared.counts[bin * copies + copy];
        if (count > 0) add_atomically(counts + bin, count);
      }
    });
  }
};

struct ThresholdItem {
  const int64_t* counts;  // [bins]
  int32_t* table;         // [environments + 1], or [1] without `abstain`
  int64_t* kept;          // 0-dim, like `tested`; null: not wanted
  int64_t* tested;
  int64_t columns;
  int64_t size = 1;  // a chunk of its own
  bool packed = false;
};

// One block for each tensor. As on the CPU, thresholds rise from those that no result is below,
// until what they keep allows them.
struct ThresholdBody {
  static constexpr int kThreads = 128;

  struct State {};
  struct Shared {
    int64_t parts[kThreads];
    int64_t total;
    int raised;
  };

  KernelTable<ThresholdItem> table;
  VoteBins bins;
  VoteTest test;
  const int32_t* first;  // the table to begin with; null: `threshold`
  int32_t threshold;
  const double* tails;   // of fdr, in the order of the bins' parity
  int64_t least_voters;  // that could be significant

  ANDMASK_METHOD int64_t first_voters() const { return bins.abstain ? 0 : bins.environments; }

  // The number of coordinates whose votes and voters meet a condition.
  template <typename Threads, typename Condition>
  ANDMASK_METHOD int64_t count(Threads& threads, Shared& shared, const ThresholdItem& item,
                               const Condition& condition) const {
    threads.each([&](int thread, State&) {
      int64_t part = 0;
      if (bins.abstain) {
        for (int64_t voters = thread; voters <= bins.environments; voters += kThreads) {
          for (int64_t votes = voters % 2; votes <= voters; votes += 2) {
            if (condition(votes, voters)) part += item.counts[pair_index(votes, voters)];
          }
        }
      } else {
        for (int64_t votes = thread; votes <= bins.environments; votes += kThreads) {
          if (condition(votes, bins.environments)) part += item.counts[votes];
        }
      }
      shared.parts[thread] = part;
    });
    threads.barrier();
    threads.each([&](int thread, State&) {
      if (thread > 0) return;
      shared.raised = 0;
      shared.total = 0;
      for (int64_t part : shared.parts) shared.total += part;
    });
    threads.barrier();
    return shared.total;
  }

  template <typename Threads>
  ANDMASK_METHOD void operator()(Threads& threads, Shared& shared, const ThreadIndex& index) const {
    const ThresholdItem& item = table.items[index.block];
    const int64_t places = bins.environments - first_voters() + 1;
    threads.each([&](int thread, State&) {
      for (int64_t i = thread; i < places; i += kThreads) {
        item.table[i] = first ? first[i] : threshold;
      }
    });
    threads.barrier();
    int64_t tested = item.columns;
    if (test.criterion == Criterion::fdr && bins.abstain) {
      tested = count(threads, shared, item,
                     [&](int64_t, int64_t voters) { return voters >= least_voters; });
    }
    int64_t kept = 0;
#pragma unroll 1
    while (true) {
      kept = count(threads, shared, item, [&](int64_t votes, int64_t voters) {
        return votes >= item.table[voters - first_voters()];
      });
      if (test.criterion != Criterion::fdr) break;
      const double level =
          test.level * (static_cast<double>(kept) / static_cast<double>(tested > 0 ? tested : 1));
      threads.each([&](int thread, State&) {
        for (int64_t i = thread; i < places; i += kThreads) {
          const int64_t voters = first_voters() + i;
          const double* const own = bins.abstain ? tails + pair_row(voters) : tails;
          const int64_t to =
              kept == 0 ? voters + 1 : least_votes(own, voters, level, item.table[i]);
          if (to <= item.table[i]) continue;
          item.table[i] = static_cast<int32_t>(to);
          shared.raised = 1;
        }
      });
      threads.barrier();
      const bool raised = shared.raised != 0;
      threads.barrier();
      if (!raised || kept == 0) break;
    }
    threads.each([&](int thread, State&) {
      if (thread > 0 || !item.kept) return;
      *item.kept = kept;
      *item.tested = tested;
    });
  }
};

struct ZeroBody {
  static constexpr int kThreads = 256;

  int64_t* values;
  int64_t count;

  ANDMASK_METHOD void operator()(const ThreadIndex& index) const {
    for (int64_t i = index.in_grid(kThreads); i < count; i += index.blocks * kThreads) {
      values[i] = 0;
    }
  }
};

}  // namespace andmask
