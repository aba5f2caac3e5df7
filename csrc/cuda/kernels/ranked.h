// Kernel bodies of the rules on ranked values. A thread owns a column: up to kRun values are sorted
// in its registers, of more only the ranks at the two ends of those that count are looked for.
#pragma once

#include "../../math/columns.h"
#include "../../math/sorting.h"
#include "columns.h"

namespace andmask {

// ---- few environments ----

// `size` is a power of two, so that there are few kernels. The CPU sorts as many values as fit into
// whole units; behind those that it makes up come infinities here, which sort behind everything and
// are left out of the sum. So results have the same bits.
template <typename T, int size>
struct SortBody {
  static constexpr int kThreads = 128;
  using F = accumulate_t<T>;

  ColumnGrads task;
  F weights[size];  // of the ranks; 0 beyond the environments
  F total;
  void* out;  // T

  ANDMASK_METHOD void operator()(const Place& place) const {
    const int environments = static_cast<int>(task.environments);
    const int ranks = (environments + static_cast<int>(kUnit) - 1) / static_cast<int>(kUnit) *
                      static_cast<int>(kUnit);
    for (int64_t column = place.index(kThreads); column < task.columns;
         column += place.blocks * kThreads) {
      const T* const grads = static_cast<const T*>(task.grads) + column;
      F values[size];
#pragma unroll
      for (int row = 0; row < size; ++row) {
        values[row] = row < ranks ? largest(F()) : static_cast<F>(float_of(0x7f800000u));
        if (row < environments) values[row] = widen(grads[row * task.stride]);
      }
      // NaN may be sorted to a rank that is left out.
      F poison = 0;
#pragma unroll
      for (int row = 0; row < size; ++row)
        poison = values[row] == values[row] ? poison : values[row];
      sort_registers(values);
      F sum = 0;
#pragma unroll
      for (int rank = 0; rank < size; ++rank) {
        // A weight of 0 hides nothing: 0 * infinity is NaN.
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
struct Keys {
  using Bits = uint16_t;
  static constexpr int kBits = 16;
  ANDMASK_INLINE Bits bits(T value) { return value.bits; }
  ANDMASK_INLINE T value(Bits bits) { return {bits}; }
};

template <>
struct Keys<float> {
  using Bits = uint32_t;
  static constexpr int kBits = 32;
  ANDMASK_INLINE Bits bits(float value) { return bits_of(value); }
  ANDMASK_INLINE float value(Bits bits) { return float_of(bits); }
};

template <>
struct Keys<double> {
  using Bits = uint64_t;
  static constexpr int kBits = 64;
  ANDMASK_INLINE Bits bits(double value) { return bits_of(value); }
  ANDMASK_INLINE double value(Bits bits) { return double_of(bits); }
};

template <typename T>
using key_t = typename Keys<T>::Bits;

template <typename T>
constexpr key_t<T> kTopBit = static_cast<key_t<T>>(key_t<T>{1} << (Keys<T>::kBits - 1));

template <typename T>
ANDMASK_INLINE key_t<T> key_of(T value) {
  using Key = key_t<T>;
  const Key bits = Keys<T>::bits(value);
  return static_cast<Key>((bits & kTopBit<T>) != 0 ? ~bits : bits | kTopBit<T>);
}

template <typename T>
ANDMASK_INLINE accumulate_t<T> value_of(key_t<T> key) {
  using Key = key_t<T>;
  return widen(Keys<T>::value(static_cast<Key>((key & kTopBit<T>) != 0 ? key ^ kTopBit<T> : ~key)));
}

// A rule whose ranks weigh 1 between the outermost two at either end, and nothing beyond them.
struct RankWeights {
  int32_t first, last;  // of the ranks that count
  // What first, first + 1, last - 1 and last weigh more than 1. Of ranks that are the same one, or
  // beyond the other end, only one has a share.
  double more[4];
  double total;
};

// Keys that begin with the bits of the one at the wanted rank, as far as those are known.
template <typename Key>
struct Bracket {
  Key low = 0;         // the smallest key that begins so
  int32_t before = 0;  // keys below the bracket
  int32_t end;         // and those in it

  ANDMASK_METHOD void halve(int32_t rank, Key middle, int32_t below) {
    if (below <= rank) {
      low = middle;
      before = below;
    } else {
      end = below;
    }
  }
};

// In two sums, lest each key waits for the one before.
template <int count, typename Key>
ANDMASK_INLINE int32_t count_below(const Key (&keys)[count], Key middle) {
  int32_t even = 0;
  int32_t odd = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) (i % 2 == 0 ? even : odd) += keys[i] < middle ? 1 : 0;
  return even + odd;
}

// The columns of a block lie in its scratch memory, as keys, so that memory is read once; or they
// do not fit (`tiled` is false), and are read again at every step. Threads do not share columns.
template <typename T, bool tiled>
struct SelectBody {
  static constexpr int kThreads = 32;
  static constexpr int kBatch = 8;  // keys on their way at once
  using F = accumulate_t<T>;
  using Key = key_t<T>;

  ColumnGrads task;
  RankWeights ranks;
  void* out;  // T

  // What `environments` need.
  ANDMASK_INLINE int64_t tile_bytes(int64_t environments) {
    return environments * kThreads * static_cast<int64_t>(sizeof(Key));
  }
  int64_t scratch_bytes() const { return tiled ? tile_bytes(task.environments) : 0; }

  ANDMASK_METHOD void operator()(const Place& place, unsigned char* scratch) const {
    Key* const tile = reinterpret_cast<Key*>(scratch) + place.thread;
    for (int64_t column = place.index(kThreads); column < task.columns;
         column += place.blocks * kThreads) {
      const T* const grads = static_cast<const T*>(task.grads) + column;
      const auto read = [&](int64_t row) { return key_of(grads[row * task.stride]); };
      double sum = 0;
      if constexpr (tiled) {
#pragma unroll 8
        for (int64_t row = 0; row < task.environments; ++row) tile[row * kThreads] = read(row);
        sum = weigh([&](int64_t row) { return tile[row * kThreads]; });
      } else {
        sum = weigh(read);
      }
      static_cast<T*>(out)[column] = Rounder<T>::from(sum / ranks.total);
    }
  }

  // Calls f with all keys of a column, some at a time.
  template <typename Read, typename Use>
  ANDMASK_METHOD void for_keys(const Read& read, const Use& f) const {
    int64_t row = 0;
    for (; row + kBatch <= task.environments; row += kBatch) {
      Key keys[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) keys[i] = read(row + i);
      f(keys);
    }
#pragma unroll 1
    for (; row < task.environments; ++row) {
      const Key keys[] = {read(row)};
      f(keys);
    }
  }

  // The weighted sum of one column, whose keys read(row) gives.
  template <typename Read>
  ANDMASK_METHOD double weigh(const Read& read) const {
    // Next to the first rank that counts there is no need to look for the last.
    const bool two = ranks.last - ranks.first > 1;
    Bracket<Key> first;
    Bracket<Key> last;
    first.end = last.end = static_cast<int32_t>(task.environments);
    Key width = 0;  // of the brackets; 0 stands for all keys
    do {
      width = width == 0 ? kTopBit<T> : static_cast<Key>(width >> 1);
      const Key first_middle = static_cast<Key>(first.low + width);
      const Key last_middle = static_cast<Key>(last.low + width);
      int32_t below_first = 0;
      int32_t below_last = 0;
      if (two) {
        for_keys(read, [&](const auto& keys) {
          below_first += count_below(keys, first_middle);
          below_last += count_below(keys, last_middle);
        });
        last.halve(ranks.last, last_middle, below_last);
      } else {
        for_keys(read, [&](const auto& keys) { below_first += count_below(keys, first_middle); });
      }
      first.halve(ranks.first, first_middle, below_first);
      // All bits are known, or one key alone begins with those that are.
    } while (width > 1 && (first.end - first.before > 1 || (two && last.end - last.before > 1)));
    if (!two) last = first;
    return add_up(read, two, width, first, last);
  }

  // Each bracket holds one key, perhaps several times.
  template <typename Read>
  ANDMASK_METHOD double add_up(const Read& read, bool two, Key width, const Bracket<Key>& first,
                               const Bracket<Key>& last) const {
    const Key first_end = static_cast<Key>(first.low + (width - 1));  // the last key in it
    const Key last_end = static_cast<Key>(last.low + (width - 1));
    Key at_first = 0;
    Key at_last = 0;
    Key above = static_cast<Key>(~Key{0});  // the next key above the first
    Key below = 0;                          // and below the last
    double between = 0;
    double poison = 0;  // or NaN where anything is not finite
    for_keys(read, [&](const auto& keys) {
#pragma unroll
      for (const Key key : keys) {
        const F value = value_of<T>(key);
        poison += static_cast<double>(value * F(0));
        if (key >= first.low && key <= first_end) at_first = key;
        if (key >= last.low && key <= last_end) at_last = key;
        if (key > first_end && key < above) above = key;
        if (key < last.low && key > below) below = key;
        if (key > first_end && key < last.low) between += static_cast<double>(value);
      }
    });
    const auto number = [](Key key) { return static_cast<double>(value_of<T>(key)); };
    const double ends[] = {number(at_first), number(first.end > ranks.first + 1 ? at_first : above),
                           number(last.before < ranks.last ? at_last : below), number(at_last)};
    double sum = poison;
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
    // The key that stands for nothing where there is no such rank is not a number.
#pragma unroll
    for (int end = 0; end < 4; ++end) {
      if (ranks.more[end] != 0) sum += ranks.more[end] * ends[end];
    }
    return sum;
  }
};

}  // namespace andmask
