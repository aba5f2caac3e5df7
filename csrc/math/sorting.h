// Sorting without branches: a network of comparators, the same for all columns of a block.
#pragma once

#include "scalar.h"

namespace andmask {

// Puts the smaller of two values first. NaN may end up in either place, but none is lost.
template <typename F>
ANDMASK_INLINE void exchange(F& low, F& high) {
  const F a = low;
  const F b = high;
  low = a < b ? a : b;
  high = a < b ? b : a;
}

// Calls f(i, j), i < j, in order, for the comparators that sort `size` values of which each run of
// `sorted` (a power of two) is sorted already: Batcher's odd-even merge sort (1968), about
// size * log2(size)^2 / 4 comparators from the start.
template <typename F>
ANDMASK_METHOD constexpr void for_comparators(int64_t size, int64_t sorted, const F& f) {
  for (int64_t run = sorted; run < size; run *= 2) {
    for (int64_t distance = run; distance > 0; distance /= 2) {
      for (int64_t start = distance % run; start + distance < size; start += 2 * distance) {
        for (int64_t i = start; i < start + distance && i + distance < size; ++i) {
          if ((i & -2 * run) == ((i + distance) & -2 * run)) f(i, i + distance);
        }
      }
    }
  }
}

}  // namespace andmask
