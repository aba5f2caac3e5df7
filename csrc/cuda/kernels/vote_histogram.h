// Kernel body of vote_histograms, for a table of tensors. Counts are exact. Squares are added in
// the order in which threads arrive, so that their last bits may differ from run to run.
#pragma once

#include "../../math/agreement.h"
#include "../../tasks/moments.h"
#include "block_ops.h"
#include "kernel_table.h"

namespace andmask {

struct VoteHistogramItem {
  const void* sum;    // F
  const void* votes;  // int8, int16 or int32
  int vote_bytes;
  int64_t size;
  int64_t* counts;  // [bins]
  double* squares;
  bool packed;
};

// Every block has a chunk of a tensor, and bins in shared memory if they fit there.
template <typename F>
struct VoteHistogramBody {
  static constexpr int kThreads = kTableThreads;
  static constexpr int kMinBlocks = 4;
  static constexpr int kWidth = kPackSize<F>;
  static constexpr int64_t kBins = 1024;

  struct State {};
  struct Shared {
    double squares[kBins];
    uint32_t counts[kBins];
  };

  KernelTable<VoteHistogramItem> table;
  int64_t bins;
  int64_t copies;  // of the bins in shared memory, for threads side by side; 0: they do not fit

  // With several copies, the threads of a warp do not wait for each other.
  static int64_t most_copies(int64_t bins) { return kBins / bins < kWarp ? kBins / bins : kWarp; }

  // Ignores votes that are too large: the host does not wait for the result, and cannot raise.
  template <typename Use>
  ANDMASK_METHOD void for_votes(const VoteHistogramItem& item, int64_t chunk, int thread,
                                const Use& use) const {
    for_tiles<kWidth>(item, chunk, thread, [&](const Tile<kWidth>& tile) {
      tile.at([&](const auto& at) {
        const Pack<F, kWidth> sum = at.get(static_cast<const F*>(item.sum));
        int32_t votes[kWidth];
        get_votes<kWidth>(at, item.votes, item.vote_bytes, votes);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) {
          const int64_t bin = agreement(votes[i]);
          const double wide = static_cast<double>(sum[i]);
          if (at.has(i) && bin < bins) use(bin, wide * wide);
        }
      });
    });
  }

  template <typename Threads>
  ANDMASK_METHOD void operator()(Threads& threads, Shared& shared, const ThreadIndex& index) const {
    const int64_t chunk = table.first_chunk[0] + index.block;
    const int64_t entry = table.item_of(chunk);
    const VoteHistogramItem& item = table.items[entry];
    const int64_t item_chunk = chunk - table.first_chunk[entry];
    int64_t* const all_counts = item.counts;
    double* const all_squares = item.squares;
    if (copies == 0) {
      threads.each([&](int thread, State&) {
        for_votes(item, item_chunk, thread, [&](int64_t bin, double square) {
          add_atomically(all_counts + bin, int64_t{1});
          add_atomically(all_squares + bin, square);
        });
      });
      return;
    }
    threads.each([&](int thread, State&) {
      for (int64_t i = thread; i < bins * copies; i += kThreads) {
        shared.squares[i] = 0;
        shared.counts[i] = 0;
      }
    });
    threads.barrier();
    threads.each([&](int thread, State&) {
      const int64_t copy = thread % copies;
      for_votes(item, item_chunk, thread, [&](int64_t bin, double square) {
        add_atomically(shared.counts + bin * copies + copy, uint32_t{1});
        add_atomically(shared.squares + bin * copies + copy, square);
      });
    });
    threads.barrier();
    threads.each([&](int thread, State&) {
      for (int64_t bin = thread; bin < bins; bin += kThreads) {
        int64_t count = 0;
        double square = 0;
        for (int64_t copy = 0; copy < copies; ++copy) {
          count += shared.counts[bin * copies + copy];
          square += shared.squares[bin * copies + copy];
        }
        if (count == 0) continue;
        add_atomically(all_counts + bin, count);
        add_atomically(all_squares + bin, square);
      }
    });
  }
};

}  // namespace andmask
