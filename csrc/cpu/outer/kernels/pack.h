// Packs the operands of outer products: rows of columns, planes of outputs. The dimension that runs
// fastest in memory is read with vector loads, and transposed in registers if necessary.
#pragma once

#include "../../kernels/load.h"
#include "outer.h"
#include "vectors.h"

namespace andmask {
namespace {

// ---- loads ----

template <typename T>
ANDMASK_INLINE Vector<accumulate_t<T>> load_wide(const T* values) {
  using F = accumulate_t<T>;
  if constexpr (sizeof(T) == sizeof(F)) {
    return load(values);
  } else {
    F wide[kLanes<F>];
    widen_columns(values, kLanes<F>, wide);
    return load(wide);
  }
}

// Loads the first `count` lanes, and zeros.
template <typename T>
ANDMASK_INLINE Vector<accumulate_t<T>> load_part(const T* values, int64_t count) {
  using F = accumulate_t<T>;
  if (count >= kLanes<F>) return load_wide(values);
  T part[kLanes<F>] = {};
  for (int64_t i = 0; i < count; ++i) part[i] = values[i];
  return load_wide(part);
}

// ---- the range of magnitudes ----

template <typename F>
class RangeFinder {
 public:
  ANDMASK_METHOD void add(Vector<F> values) {
    if constexpr (kUseful) {
      const Bits bits = (Bits)values & kMagnitude;
      largest_ = bits > largest_ ? bits : largest_;
      const Bits less_one = bits - 1;
      smallest_ = less_one < smallest_ ? less_one : smallest_;
    }
  }

  ANDMASK_METHOD void put(MagnitudeRange* range) const {
    if constexpr (kUseful) {
      for (int lane = 0; lane < kLanes<F>; ++lane) {
        if (largest_[lane] > range->largest) range->largest = largest_[lane];
        if (smallest_[lane] < range->smallest_less_one) range->smallest_less_one = smallest_[lane];
      }
    }
  }

 private:
#if defined(__AVX2__)
  static constexpr bool kUseful = sizeof(F) == sizeof(float);
#else
  static constexpr bool kUseful = false;  // votes are exact anyway
#endif
  typedef uint32_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr uint32_t kMagnitude = 0x7fffffffu;
  Bits largest_{};
  Bits smallest_ = ~Bits{};
};

// ---- transposition ----

// A perfect shuffle rotates the bits of (row, column). One for each bit of the column make a
// transposition.
template <typename F>
ANDMASK_INLINE void transpose(Vector<F> (&rows)[kLanes<F>]) {
  constexpr int kSize = kLanes<F>;
  typename Register<F>::indices low, high;
  for (int i = 0; i < kSize; ++i) {
    low[i] = i / 2 + i % 2 * kSize;
    high[i] = low[i] + kSize / 2;
  }
#pragma GCC unroll 8
  for (int round = 1; round < kSize; round *= 2) {
    Vector<F> next[kSize];
#pragma GCC unroll 16
    for (int i = 0; i < kSize / 2; ++i) {
      next[2 * i] = __builtin_shuffle(rows[i], rows[i + kSize / 2], low);
      next[2 * i + 1] = __builtin_shuffle(rows[i], rows[i + kSize / 2], high);
    }
#pragma GCC unroll 16
    for (int i = 0; i < kSize; ++i) rows[i] = next[i];
  }
}

// ---- columns: target[target_offsets[position] + channel] ----

template <typename T>
void copy_rows(const OuterPack& task, const int32_t* target_offsets, int64_t padded,
               MagnitudeRange* range) {
  using F = accumulate_t<T>;
  constexpr int64_t kSize = kLanes<F>;
  RangeFinder<F> finder;
  for (int64_t position = 0; position < task.positions; ++position) {
    const T* const from = static_cast<const T*>(task.source) + task.source_offsets[position];
    F* const to = static_cast<F*>(task.target) + target_offsets[position];
    int64_t channel = 0;
    for (; channel + kSize <= task.channels; channel += kSize) {
      const Vector<F> values = load_wide(from + channel);
      finder.add(values);
      store(to + channel, values);
    }
    for (; channel < task.channels; ++channel) {
      to[channel] = widen(from[channel]);
      finder.add(broadcast(to[channel]));
    }
    for (; channel < padded; ++channel) to[channel] = 0;
  }
  finder.put(range);
}

template <typename T>
void copy_elements(const OuterPack& task, const int32_t* target_offsets, int64_t padded,
                   MagnitudeRange* range) {
  using F = accumulate_t<T>;
  RangeFinder<F> finder;
  for (int64_t position = 0; position < task.positions; ++position) {
    const T* const from = static_cast<const T*>(task.source) + task.source_offsets[position];
    F* const to = static_cast<F*>(task.target) + target_offsets[position];
    for (int64_t channel = 0; channel < task.channels; ++channel) {
      to[channel] = widen(from[channel * task.channel_stride]);
      finder.add(broadcast(to[channel]));
    }
    for (int64_t channel = task.channels; channel < padded; ++channel) to[channel] = 0;
  }
  finder.put(range);
}

// Stores whole registers. Their lanes beyond the channels are 0, and are overwritten by the next
// position if that follows immediately.
template <typename T>
void turn_planes(const OuterPack& task, const int32_t* target_offsets, MagnitudeRange* range) {
  using F = accumulate_t<T>;
  constexpr int64_t kSize = kLanes<F>;
  RangeFinder<F> finder;
  const T* const source = static_cast<const T*>(task.source) + task.source_offsets[0];
  for (int64_t position = 0; position < task.positions; position += kSize) {
    const int64_t positions = task.positions - position < kSize ? task.positions - position : kSize;
    for (int64_t channel = 0; channel < task.channels; channel += kSize) {
      Vector<F> block[kSize];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSize; ++i) {
        block[i] = Vector<F>{};
        if (channel + i < task.channels) {
          const T* const from = source + (channel + i) * task.channel_stride + position;
          __builtin_prefetch(from + 4 * kSize, 0, 2);
          block[i] = load_part(from, positions);
          finder.add(block[i]);
        }
      }
      transpose<F>(block);
      F* const to = static_cast<F*>(task.target) + channel;
      if (positions == kSize) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < kSize; ++i) store(to + target_offsets[position + i], block[i]);
      } else {
        for (int64_t i = 0; i < positions; ++i) store(to + target_offsets[position + i], block[i]);
      }
    }
  }
  finder.put(range);
}

template <typename T>
void pack_columns(const OuterPack& task, const int32_t* target_offsets, int64_t round,
                  MagnitudeRange* range) {
  using F = accumulate_t<T>;
  const int64_t padded = (task.channels + round - 1) / round * round;
  if (task.positions == 0) return;
  if (task.unit_positions && (padded % kLanes<F> == 0 || task.channels <= kLanes<F>)) {
    turn_planes<T>(task, target_offsets, range);
  } else if (task.channel_stride == 1) {
    copy_rows<T>(task, target_offsets, padded, range);
  } else {
    copy_elements<T>(task, target_offsets, padded, range);
  }
}

// ---- outputs: target[channel * kOuterPitch + position] ----

template <typename T>
void copy_planes(const OuterPack& task, MagnitudeRange* range) {
  using F = accumulate_t<T>;
  constexpr int64_t kSize = kLanes<F>;
  RangeFinder<F> finder;
  for (int64_t channel = 0; channel < task.channels; ++channel) {
    const T* const from =
        static_cast<const T*>(task.source) + task.source_offsets[0] + channel * task.channel_stride;
    F* const to = static_cast<F*>(task.target) + channel * kOuterPitch;
    for (int64_t position = 0; position < task.positions; position += kSize) {
      __builtin_prefetch(from + position + task.positions, 0, 2);  // probably the next block
      const Vector<F> values = load_part(from + position, task.positions - position);
      finder.add(values);
      store(to + position, values);  // beyond the positions there is room
    }
  }
  finder.put(range);
}

template <typename T>
void turn_rows(const OuterPack& task, MagnitudeRange* range) {
  using F = accumulate_t<T>;
  constexpr int64_t kSize = kLanes<F>;
  RangeFinder<F> finder;
  for (int64_t position = 0; position < task.positions; position += kSize) {
    const int64_t positions = task.positions - position < kSize ? task.positions - position : kSize;
    const int64_t* const offsets = task.source_offsets + position;
    for (int64_t channel = 0; channel < task.channels; channel += kSize) {
      const int64_t channels = task.channels - channel < kSize ? task.channels - channel : kSize;
      const T* const from = static_cast<const T*>(task.source) + channel;
      Vector<F> block[kSize];
#pragma GCC unroll 16
      for (int64_t i = 0; i < kSize; ++i) {
        block[i] = Vector<F>{};
        if (i < positions) {
          block[i] = load_part(from + offsets[i], channels);
          finder.add(block[i]);
        }
      }
      transpose<F>(block);
      F* const to = static_cast<F*>(task.target) + channel * kOuterPitch + position;
      if (channels == kSize) {
#pragma GCC unroll 16
        for (int64_t i = 0; i < kSize; ++i) store(to + i * kOuterPitch, block[i]);
      } else {
        for (int64_t i = 0; i < channels; ++i) store(to + i * kOuterPitch, block[i]);
      }
    }
  }
  finder.put(range);
}

template <typename T>
void pack_outputs(const OuterPack& task, MagnitudeRange* range) {
  using F = accumulate_t<T>;
  if (task.positions == 0) return;
  if (task.unit_positions) return copy_planes<T>(task, range);
  if (task.channel_stride == 1) return turn_rows<T>(task, range);
  RangeFinder<F> finder;
  for (int64_t channel = 0; channel < task.channels; ++channel) {
    F* const to = static_cast<F*>(task.target) + channel * kOuterPitch;
    for (int64_t position = 0; position < task.positions; ++position) {
      to[position] = widen(static_cast<const T*>(
          task.source)[task.source_offsets[position] + channel * task.channel_stride]);
      finder.add(broadcast(to[position]));
    }
  }
  finder.put(range);
}

}  // namespace
}  // namespace andmask
