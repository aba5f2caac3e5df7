// Kernel bodies of the rules on ranked values. A thread owns a column. It sorts up to kSorted
// values in its registers; among more it looks only for the first and the last rank that count.
// Kernels know weights of ranks, not rules.
#pragma once

#include "../../math/sorting.h"
#include "columns.h"

namespace andmask {

// ---- few environments ----

constexpr int kSorted = 32;
// The CPU fills up columns to a multiple of this with the largest number, which has no weight.
constexpr int kSortedUnit = 4;

// `size` is a power of two, so that there are few kernels. After the values that the CPU fills up
// come infinities here, which sort last and are left out of the sum. So results have the same bits.
template <typename T, int size>
struct SortBody {
  static constexpr int kThreads = kColumnThreads;
  using F = accumulate_t<T>;

  ColumnGrads task;
  F weights[size];  // of the ranks; 0 beyond the environments
  F total;
  void* out;  // T

  ANDMASK_METHOD void operator()(const ThreadIndex& index) const {
    const int environments = static_cast<int>(task.environments);
    const int ranks = (environments + kSortedUnit - 1) / kSortedUnit * kSortedUnit;
#pragma unroll 1
    for (int64_t column = index.in_grid(kThreads); column < task.columns;
         column += index.blocks * kThreads) {
      const T* const grads = static_cast<const T*>(task.grads) + column;
      T stored[size] = {};
#pragma unroll
      for (int row = 0; row < size; ++row) {
        if (row < environments) stored[row] = grads[row * task.stride];
      }
      F values[size];
#pragma unroll
      for (int row = 0; row < size; ++row) {
        values[row] = row < environments ? widen(stored[row])
                      : row < ranks      ? largest(F())
                                         : static_cast<F>(float_of(0x7f800000u));
      }
      // NaN may be sorted to a rank that is left out.
      F poison = 0;
#pragma unroll
      for (int row = 0; row < size; ++row) {
        poison = values[row] == values[row] ? poison : values[row];
      }
      SortingNetwork<size>::sort(values);
      F sum = 0;
#pragma unroll
      for (int rank = 0; rank < size; ++rank) {
        // A weight of 0 does not hide infinities: they become NaN.
        if (rank < ranks) sum += weights[rank] * values[rank];
      }
      sum = poison == poison ? sum : poison;
      static_cast<T*>(out)[column] = Rounder<T>::from(static_cast<double>(sum / total));
    }
  }
};

// ---- many environments ----

// Unsigned integers in the order of the values; -0 comes before 0, and NaN at either end.
template <typename T>
struct Keys {  // of 16 bits
  using Key = uint16_t;
  ANDMASK_INLINE Key bits(T value) { return value.bits; }
  ANDMASK_INLINE T value(Key bits) { return {bits}; }
};

template <>
struct Keys<float> {
  using Key = uint32_t;
  ANDMASK_INLINE Key bits(float value) { return bits_of(value); }
  ANDMASK_INLINE float value(Key bits) { return float_of(bits); }
};

template <>
struct Keys<double> {
  using Key = uint64_t;
  ANDMASK_INLINE Key bits(double value) { return bits_of(value); }
  ANDMASK_INLINE double value(Key bits) { return double_of(bits); }
};

template <typename T>
using key_t = typename Keys<T>::Key;

template <typename T>
constexpr key_t<T> kTopBit = static_cast<key_t<T>>(key_t<T>{1} << (sizeof(T) * 8 - 1));

template <typename T>
ANDMASK_INLINE key_t<T> key_of(T value) {
  const key_t<T> bits = Keys<T>::bits(value);
  return static_cast<key_t<T>>((bits & kTopBit<T>) != 0 ? ~bits : bits | kTopBit<T>);
}

template <typename T>
ANDMASK_INLINE accumulate_t<T> value_of(key_t<T> key) {
  const auto bits = static_cast<key_t<T>>((key & kTopBit<T>) != 0 ? key ^ kTopBit<T> : ~key);
  return widen(Keys<T>::value(bits));
}

// Ranks that weigh 1 each, between the outermost two at either end, and nothing beyond them.
struct RankWeights {
  int64_t first, last;  // of the ranks that count
  // The weights of first, first + 1, last - 1 and last, less 1. If some of these are the same rank,
  // or beyond the other end, only one of them has a share.
  double more[4];
  double total;
};

// The keys that begin with the known bits of the key at a wanted rank.
template <typename Key>
struct Bracket {
  Key low = 0;         // the smallest possible key of the bracket
  int64_t before = 0;  // keys below the bracket
  int64_t end;         // keys below and in the bracket

  // Decides the next bit of the key: it is set if the key is one of those from `middle` on.
  ANDMASK_METHOD void halve(int64_t rank, Key middle, int64_t below) {
    if (below <= rank) {
      low = middle;
      before = below;
    } else {
      end = below;
    }
  }

  // True if the bracket has one key only.
  ANDMASK_METHOD bool found() const { return end - before == 1; }
};

// Every step reads the columns again. The columns of a warp are neighbours, and come from L1 or L2.
template <typename T>
struct SelectBody {
  static constexpr int kThreads = 64;
  static constexpr int kInFlight = 8;  // environments
  using F = accumulate_t<T>;
  using Key = key_t<T>;

  ColumnGrads task;
  RankWeights ranks;
  void* out;  // T

  ANDMASK_METHOD void operator()(const ThreadIndex& index) const {
#pragma unroll 1
    for (int64_t column = index.in_grid(kThreads); column < task.columns;
         column += index.blocks * kThreads) {
      const double sum = weighted_sum(static_cast<const T*>(task.grads) + column);
      static_cast<T*>(out)[column] = Rounder<T>::from(sum / ranks.total);
    }
  }

  template <typename Use>
  ANDMASK_METHOD void for_keys(const T* grads, const Use& use) const {
    int64_t row = 0;
#pragma unroll 1
    for (; row + kInFlight <= task.environments; row += kInFlight) {
      T values[kInFlight];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) values[i] = grads[i * task.stride];
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) use(key_of(values[i]));
      grads += kInFlight * task.stride;
    }
#pragma unroll 1
    for (; row < task.environments; ++row, grads += task.stride) use(key_of(*grads));
  }

  // Returns the weighted sum of one column.
  ANDMASK_METHOD double weighted_sum(const T* grads) const {
    // The last rank that counts needs no search if it is next to the first.
    const bool two = ranks.last - ranks.first > 1;
    Bracket<Key> first{0, 0, task.environments};
    Bracket<Key> last = first;
    Key width = kTopBit<T>;  // of half a bracket
#pragma unroll 1
    for (;; width = static_cast<Key>(width >> 1)) {
      const Key first_middle = static_cast<Key>(first.low + width);
      const Key last_middle = static_cast<Key>(last.low + width);
      int64_t below_first = 0;
      int64_t below_last = 0;
      for_keys(grads, [&](Key key) {
        below_first += key < first_middle ? 1 : 0;
        below_last += key < last_middle ? 1 : 0;
      });
      first.halve(ranks.first, first_middle, below_first);
      last.halve(ranks.last, last_middle, below_last);
      if (width == 1 || (first.found() && (!two || last.found()))) break;
    }
    if (!two) last = first;
    return add_up(grads, two, static_cast<Key>(width - 1), first, last);
  }

  // Each bracket holds one key, perhaps several times, and ends `span` above its smallest one.
  ANDMASK_METHOD double add_up(const T* grads, bool two, Key span, const Bracket<Key>& first,
                               const Bracket<Key>& last) const {
    const Key first_end = static_cast<Key>(first.low + span);
    const Key last_end = static_cast<Key>(last.low + span);
    Key at_first = 0;
    Key at_last = 0;
    Key above = static_cast<Key>(~Key{0});  // the next key above the first
    Key below = 0;                          // and below the last
    double between = 0;
    F poison = 0;  // or NaN where anything is not finite
    for_keys(grads, [&](Key key) {
      const F value = value_of<T>(key);
      poison += value * F(0);
      if (key >= first.low && key <= first_end) at_first = key;
      if (key >= last.low && key <= last_end) at_last = key;
      if (key > first_end && key < above) above = key;
      if (key < last.low && key > below) below = key;
      if (key > first_end && key < last.low) between += static_cast<double>(value);
    });
    const auto number = [](Key key) { return static_cast<double>(value_of<T>(key)); };
    const double ends[] = {number(at_first), number(first.end > ranks.first + 1 ? at_first : above),
                           number(last.before < ranks.last ? at_last : below), number(at_last)};
    double sum = static_cast<double>(poison);
    if (!two) {
      sum += ends[0];
      if (ranks.last > ranks.first) sum += ends[1];
    } else if (first.low == last.low) {
      sum += ends[0] * static_cast<double>(ranks.last - ranks.first + 1);
    } else {
      sum += ends[0] * static_cast<double>(first.end - ranks.first);
      sum += between;
      sum += ends[3] * static_cast<double>(ranks.last + 1 - last.before);
    }
    // Without a share the key belongs to no rank, and may be no number.
#pragma unroll
    for (int end = 0; end < 4; ++end) {
      if (ranks.more[end] != 0) sum += ranks.more[end] * ends[end];
    }
    return sum;
  }
};

}  // namespace andmask
