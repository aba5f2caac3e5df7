// Sorting without branches, by a network of comparators, which is the same for all columns.
#pragma once

#include <array>
#include <utility>

#include "elementary.h"

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

// The largest finite number, which stands for missing values.
ANDMASK_INLINE float largest(float) { return float_of(0x7f7fffffu); }
ANDMASK_INLINE double largest(double) { return double_of(0x7fefffffffffffffu); }

// The comparators of the network, as template arguments: a value that is known only when a kernel
// runs cannot choose a register.
template <int size>
struct SortingNetwork {
  static constexpr int count() {
    int comparators = 0;
    for_comparators(size, 1, [&](int64_t, int64_t) { ++comparators; });
    return comparators;
  }

  static constexpr auto list() {
    std::array<std::pair<int, int>, static_cast<size_t>(count())> comparators{};
    size_t next = 0;
    for_comparators(size, 1, [&](int64_t i, int64_t j) {
      comparators[next].first = static_cast<int>(i);
      comparators[next++].second = static_cast<int>(j);
    });
    return comparators;
  }

  template <int low, int high, typename F>
  ANDMASK_INLINE void exchange_at(F* values) {
    exchange(values[low], values[high]);
  }

  template <typename F, size_t... index>
  ANDMASK_INLINE void sort(F* values, std::index_sequence<index...>) {
    constexpr auto comparators = list();
    (exchange_at<comparators[index].first, comparators[index].second>(values), ...);
  }

  template <typename F>
  ANDMASK_INLINE void sort(F* values) {
    sort(values, std::make_index_sequence<static_cast<size_t>(count())>());
  }
};

}  // namespace andmask
