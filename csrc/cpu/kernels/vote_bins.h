// The bins of a histogram of votes.
#pragma once

#include <cstdint>

#include "../../math/agreement.h"

namespace andmask {

// The coordinates with one number of votes. Both fields are float64, so that one vector addition
// serves both. A count is exact up to 2^53.
struct alignas(16) VoteBin {
  double squares;  // of the sums
  double count;
};

// Coordinate i goes to bin |votes| * lanes + i % lanes, with 1 or kBinLanes lanes. With lanes, an
// addition does not have to wait for the previous one to the same place.
constexpr int64_t kBinLanes = 8;

namespace {

constexpr int64_t kBinBlock = 256;

template <int64_t lanes>
ANDMASK_INLINE void add_to_bins(const double* squares, const uint32_t* votes, int64_t columns,
                                VoteBin* bins) {
  const auto add = [&](int64_t i, int64_t lane) {
    VoteBin& bin = bins[votes[i] * lanes + lane];
    bin.squares += squares[i];
    bin.count += 1;
  };
  int64_t i = 0;
  for (; i + kBinLanes <= columns; i += kBinLanes) {
    for (int64_t lane = 0; lane < kBinLanes; ++lane) add(i + lane, lane % lanes);
  }
  for (; i < columns; ++i) add(i, i % lanes);
}

// Returns false if some |votes| were larger than `environments`; their blocks are left out.
template <int64_t lanes, typename Sum, typename Votes>
bool add_to_bins(const Sum* __restrict sums, const Votes* __restrict votes, int64_t columns,
                 int64_t environments, VoteBin* bins) {
  alignas(64) double squares[kBinBlock];
  alignas(64) uint32_t magnitudes[kBinBlock];
  bool possible = true;
  for (int64_t block = 0; block < columns; block += kBinBlock) {
    const int64_t size = columns - block < kBinBlock ? columns - block : kBinBlock;
    uint32_t most = 0;
    for (int64_t i = 0; i < size; ++i) {
      const double sum = static_cast<double>(sums[block + i]);
      squares[i] = sum * sum;
    }
    for (int64_t i = 0; i < size; ++i) {
      magnitudes[i] = agreement(votes[block + i]);
      most = magnitudes[i] > most ? magnitudes[i] : most;
    }
    if (most > environments) {
      possible = false;
    } else {
      add_to_bins<lanes>(squares, magnitudes, size, bins);
    }
  }
  return possible;
}

template <typename Sum, typename Votes>
bool add_to_bins(const Sum* sums, const Votes* votes, int64_t columns, int64_t environments,
                 int64_t lanes, VoteBin* bins) {
  return lanes == 1 ? add_to_bins<1>(sums, votes, columns, environments, bins)
                    : add_to_bins<kBinLanes>(sums, votes, columns, environments, bins);
}

}  // namespace
}  // namespace andmask
