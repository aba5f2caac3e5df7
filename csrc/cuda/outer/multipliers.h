// Multipliers of tiles. A multiplier defines how the rows of a stage lie in shared memory, and adds
// their products to the elements of a tile that a thread holds.
#pragma once

#include <math.h>

#include "../../math/agreement.h"
#include "../kernels/block_ops.h"
#include "operands.h"

namespace andmask {

ANDMASK_INLINE float fused(float a, float b, float c) { return ::fmaf(a, b, c); }

ANDMASK_INLINE double fused(double a, double b, double c) { return ::fma(a, b, c); }

// Multiply-adds of single elements. A thread reads 4 outputs and 8 (float64: 4) columns of each row
// for 32 (16) multiply-adds.
template <typename T>
struct SimpleMultiplier {
  using Element = T;
  using Value = accumulate_t<T>;
  static constexpr bool kSigns = false;
  static constexpr int kStage = 16;  // rows
  static constexpr int kGroup = 1;
  static constexpr int kPack = kPackSize<Value>;
  static constexpr int kHeight = 4;
  static constexpr int kWidth = sizeof(Value) == 8 ? 4 : 8;
  static constexpr int kValues = kHeight * kWidth;  // of a thread
  static constexpr int kThreads = kOuterTile * kOuterTile / kValues;
  static constexpr int kAcross = kOuterTile / kWidth;  // threads
  // Rows begin 4 banks apart, so that writes of neighbouring threads to 8 rows meet each bank at
  // most twice.
  static constexpr int kPitch = kOuterTile + kPack;

  struct Stage {
    alignas(kVectorBytes) Value values[2][kStage][kPitch];
  };

  struct State {
    Value values[kValues];
  };

  ANDMASK_METHOD static int row(int thread, int i) {
    return thread / kAcross * kHeight + i / kWidth;
  }
  // A thread's packs are next to those of its neighbours.
  ANDMASK_METHOD static int column(int thread, int i) {
    const int pack = i % kWidth / kPack;
    return (pack * kAcross + thread % kAcross) * kPack + i % kPack;
  }

  // Stores a thread's elements of one row, `size` columns.
  template <int size>
  ANDMASK_METHOD static void put(Stage& stage, int operand, int stack, int column,
                                 const T (*values)[size], Value factor) {
    if constexpr (size % kPack == 0) {
#pragma unroll
      for (int begin = 0; begin < size; begin += kPack) {
        Pack<Value, kPack> pack;
#pragma unroll
        for (int i = 0; i < kPack; ++i) pack[i] = widen(values[0][begin + i]) * factor;
        store_shared(&stage.values[operand][stack][column + begin], pack);
      }
    } else {
#pragma unroll
      for (int i = 0; i < size; ++i) {
        stage.values[operand][stack][column + i] = widen(values[0][i]) * factor;
      }
    }
  }

  ANDMASK_METHOD static void add_row(const Stage& stage, int row, int thread, Value* sums) {
    Pack<Value, kHeight> outputs;
#pragma unroll
    for (int i = 0; i < kHeight; i += kPack) {
      const auto pack = load<kPack>(&stage.values[0][row][thread / kAcross * kHeight + i]);
#pragma unroll
      for (int j = 0; j < kPack; ++j) outputs[i + j] = pack[j];
    }
#pragma unroll
    for (int begin = 0; begin < kWidth; begin += kPack) {
      const auto columns = load<kPack>(&stage.values[1][row][column(thread, begin)]);
#pragma unroll
      for (int i = 0; i < kHeight; ++i) {
#pragma unroll
        for (int j = 0; j < kPack; ++j) {
          Value& sum = sums[i * kWidth + begin + j];
          sum = fused(outputs[i], columns[j], sum);
        }
      }
    }
  }

  // Adds the products of rows [begin, end) of a stage.
  template <typename Threads>
  ANDMASK_METHOD static void multiply(Threads& threads, const Stage& stage, int begin, int end) {
    threads.each([&](int thread, auto& state) {
      if (end - begin == kStage) {
#pragma unroll
        for (int row = 0; row < kStage; ++row) add_row(stage, row, thread, state.tile.values);
      } else {
#pragma unroll 1
        for (int row = begin; row < end; ++row) add_row(stage, row, thread, state.tile.values);
      }
    });
  }
};

// A tile of 64 x 64 elements on tensor cores: four warps of 32 x 32, with 2 x 4 products each. For
// these 8 instructions a thread loads 16 words.
template <typename Value_, int group>
struct TensorTile {
  using Value = Value_;
  static constexpr int kGroup = group;  // rows that share a word
  static constexpr int kStage = 8 * group;
  static constexpr int kThreads = 128;
  static constexpr int kHigh = 2;
  static constexpr int kWide = 4;
  static constexpr int kValues = kHigh * kWide * 4;
  static constexpr int kPitch = kOuterTile + 8;  // the words of a fragment lie in 32 banks

  struct Stage {
    alignas(kVectorBytes) uint32_t words[2][kStage / kGroup][kPitch];
  };

  struct State {
    Value values[kValues];
    uint32_t outputs[kHigh][4];
    uint32_t columns[kWide][2];
  };

  ANDMASK_METHOD static int first_row(int thread) { return thread / kWarp / 2 * (kHigh * 16); }
  ANDMASK_METHOD static int first_column(int thread) { return thread / kWarp % 2 * (kWide * 8); }

  ANDMASK_METHOD static int row(int thread, int i) {
    return first_row(thread) + i / (kWide * 4) * 16 + TensorLane(thread).row(i % 4);
  }
  ANDMASK_METHOD static int column(int thread, int i) {
    return first_column(thread) + i / 4 % kWide * 8 + TensorLane(thread).column(i % 4);
  }

  // A bit mask of the rows of a word that lie in [begin, end). The others belong to other
  // environments, and become zeros in both operands, because they may be infinite.
  ANDMASK_METHOD static uint32_t counted(int word, int begin, int end) {
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const int row = word * kGroup + i;
      constexpr uint32_t kOnes = kGroup == 2 ? 0xffffu : 0xffu;
      if (row >= begin && row < end) bits |= kOnes << (32 / kGroup * i);
    }
    return bits;
  }

  // Adds the products of rows [begin, end) of a stage, elements of T.
  template <typename T, typename Threads>
  ANDMASK_METHOD static void multiply_rows(Threads& threads, const Stage& stage, int begin,
                                           int end) {
    threads.each([&](int thread, auto& state) {
      const TensorLane at(thread);
      const uint32_t low = counted(at.quarter, begin, end);
      const uint32_t high = counted(at.quarter + 4, begin, end);
      const auto* const outputs = stage.words[0];
      const auto* const columns = stage.words[1];
#pragma unroll
      for (int i = 0; i < kHigh; ++i) {
        const int first = first_row(thread) + i * 16 + at.eighth;
        state.tile.outputs[i][0] = outputs[at.quarter][first] & low;
        state.tile.outputs[i][1] = outputs[at.quarter][first + 8] & low;
        state.tile.outputs[i][2] = outputs[at.quarter + 4][first] & high;
        state.tile.outputs[i][3] = outputs[at.quarter + 4][first + 8] & high;
      }
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        const int first = first_column(thread) + j * 8 + at.eighth;
        state.tile.columns[j][0] = columns[at.quarter][first] & low;
        state.tile.columns[j][1] = columns[at.quarter + 4][first] & high;
      }
    });
#pragma unroll
    for (int i = 0; i < kHigh; ++i) {
#pragma unroll
      for (int j = 0; j < kWide; ++j) {
        threads.template multiply<T>([&](auto& state) {
          return TensorOperands<Value>{state.tile.values + (i * kWide + j) * 4,
                                       state.tile.outputs[i], state.tile.columns[j]};
        });
      }
    }
  }
};

// Multiplies 16-bit operands. Their products are exact in float32, in which they are added.
template <typename T>
struct HalfMultiplier : TensorTile<float, 2> {
  using Element = T;
  static constexpr bool kSigns = false;

  template <int size>
  ANDMASK_METHOD static void put(Stage& stage, int operand, int stack, int column,
                                 const T (*values)[size], float) {
    Pack<uint32_t, size> words;
#pragma unroll
    for (int i = 0; i < size; ++i) {
      words[i] = uint32_t{values[0][i].bits} | uint32_t{values[1][i].bits} << 16;
    }
    store_shared(&stage.words[operand][stack][column], words);
  }

  template <typename Threads>
  ANDMASK_METHOD static void multiply(Threads& threads, const Stage& stage, int begin, int end) {
    multiply_rows<T>(threads, stage, begin, end);
  }
};

// Multiplies the signs of the operands, whose products are the votes if every row is an
// environment. int8 products are exact, and the loaded operands take an eighth of the space of
// float32.
template <typename T>
struct SignMultiplier : TensorTile<int32_t, 4> {
  using Element = T;
  static constexpr bool kSigns = true;

  template <int size>
  ANDMASK_METHOD static void put(Stage& stage, int operand, int stack, int column,
                                 const T (*values)[size], int32_t) {
    Pack<uint32_t, size> words;
#pragma unroll
    for (int i = 0; i < size; ++i) {
      words[i] = 0;
#pragma unroll
      for (int row = 0; row < kGroup; ++row) {
        words[i] |= (static_cast<uint32_t>(sign(widen(values[row][i]))) & 0xffu) << 8 * row;
      }
    }
    store_shared(&stage.words[operand][stack][column], words);
  }

  template <typename Threads>
  ANDMASK_METHOD static void multiply(Threads& threads, const Stage& stage, int begin, int end) {
    multiply_rows<int8_t>(threads, stage, begin, end);
  }
};

}  // namespace andmask
