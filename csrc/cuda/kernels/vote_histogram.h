// Kernel body of vote_histograms, for a list of tensors. Counts are exact. Squares are added in the
// order in which threads come by: their last bits may differ from run to run.
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
  static constexpr int kThreads = kListThreads;
  static constexpr int kMinBlocks = 4;
  static constexpr int kWidth = kPackSize<F>;
  static constexpr int64_t kBins = 1024;

  struct State {};
  struct Shared {
    double squares[kBins];
    uint32_t counts[kBins];
  };

  List<VoteHistogramItem> list;
  int64_t bins;
  int64_t copies;  // of the bins in shared memory, for threads side by side; 0: they do not fit

  // Where there is room, threads of a warp do not wait for each other.
  static int64_t most_copies(int64_t bins) { return kBins / bins < kWarp ? kBins / bins : kWarp; }

  // A vote that cannot be is left out: the host is not asked.
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

  template <typename Crew>
  ANDMASK_METHOD void operator()(Crew& crew, Shared& shared, const Place& place) const {
    const int64_t chunk = list.first_chunk[0] + place.block;
    const int64_t index = list.item_of(chunk);
    const VoteHistogramItem& item = list.items[index];
    const int64_t own = chunk - list.first_chunk[index];
    int64_t* const all_counts = item.counts;
    double* const all_squares = item.squares;
    if (copies == 0) {
      crew.each([&](int thread, State&) {
        for_votes(item, own, thread, [&](int64_t bin, double square) {
          add_atomically(all_counts + bin, int64_t{1});
          add_atomically(all_squares + bin, square);
        });
      });
      return;
    }
    crew.each([&](int thread, State&) {
      for (int64_t i = thread; i < bins * copies; i += kThreads) {
        shared.squares[i] = 0;
        shared.counts[i] = 0;
      }
    });
    crew.barrier();
    crew.each([&](int thread, State&) {
      const int64_t copy = thread % copies;
      for_votes(item, own, thread, [&](int64_t bin, double square) {
        add_atomically(shared.counts + bin * copies + copy, uint32_t{1});
        add_atomically(shared.squares + bin * copies + copy, square);
      });
    });
    crew.barrier();
    crew.each([&](int thread, State&) {
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
