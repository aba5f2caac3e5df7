// Operations of all threads of a block: the only code that differs between a GPU and the host that
// stands in for it in tests. On the host the values of all threads are in an array.
#pragma once

#include <type_traits>

#include "thread.h"

#if !defined(__CUDACC__)
#include <vector>
#endif

namespace andmask {

constexpr int kWarp = 32;

// ---- tensor cores: a warp multiplies 16 x k outputs by k x 8 columns, k = 16 (32 in int8) ----
// The PTX manual defines where the operands and the products of a warp lie ("Matrix fragments for
// mma.m16n8k16"; m16n8k32 is the same in words of 4 bytes).

// The part of a product that one thread holds.
template <typename Sum>
struct TensorOperands {
  Sum* sums;                // [4]
  const uint32_t* outputs;  // [4] words of elements that follow one another along k
  const uint32_t* columns;  // [2]
};

// The thread's position in a product.
struct TensorLane {
  int eighth;   // row of the outputs, column of the columns
  int quarter;  // word along k

  ANDMASK_METHOD explicit TensorLane(int thread)
      : eighth(thread % kWarp / 4), quarter(thread % 4) {}

  // The row and the column of sums[value].
  ANDMASK_METHOD int row(int value) const { return eighth + value / 2 * 8; }
  ANDMASK_METHOD int column(int value) const { return quarter * 2 + value % 2; }
};

// ---- sums that any thread may add to ----

template <typename T>
ANDMASK_INLINE void add_atomically(T* sum, T value) {
#if defined(__CUDA_ARCH__)
  if constexpr (std::is_same_v<T, int64_t>) {  // its bits add up like those of the unsigned type
    atomicAdd(reinterpret_cast<unsigned long long*>(sum), static_cast<unsigned long long>(value));
  } else {
    atomicAdd(sum, value);
  }
#else
  *sum += value;
#endif
}

#if defined(__CUDACC__)

template <typename T>
__device__ __forceinline__ T from_lane_above(const T& value, int distance) {
  static_assert(sizeof(T) % 4 == 0);
  T other;
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &value, sizeof value);
#pragma unroll
  for (uint32_t& word : words) word = __shfl_down_sync(0xffffffffu, word, distance);
  memcpy(&other, words, sizeof other);
  return other;
}

template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += from_lane_above(value, distance);
  }
  return value;
}

// The sum over all threads of the block, in thread 0; always in the same order.
template <int threads, typename T>
__device__ __forceinline__ T block_sum(const T& value) {
  constexpr int warps = threads / kWarp;
  static_assert(threads % kWarp == 0 && warps <= kWarp);
  __shared__ T sums[warps];
  const T sum = warp_sum(value);
  if (threadIdx.x % kWarp == 0) sums[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x >= kWarp) return sum;
  return warp_sum(threadIdx.x < warps ? sums[threadIdx.x] : T{});
}

__device__ __forceinline__ void tensor_multiply(Half, const TensorOperands<float>& at) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(at.sums[0]), "+f"(at.sums[1]), "+f"(at.sums[2]), "+f"(at.sums[3])
      : "r"(at.outputs[0]), "r"(at.outputs[1]), "r"(at.outputs[2]), "r"(at.outputs[3]),
        "r"(at.columns[0]), "r"(at.columns[1]));
}

__device__ __forceinline__ void tensor_multiply(BFloat16, const TensorOperands<float>& at) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(at.sums[0]), "+f"(at.sums[1]), "+f"(at.sums[2]), "+f"(at.sums[3])
      : "r"(at.outputs[0]), "r"(at.outputs[1]), "r"(at.outputs[2]), "r"(at.outputs[3]),
        "r"(at.columns[0]), "r"(at.columns[1]));
}

__device__ __forceinline__ void tensor_multiply(int8_t, const TensorOperands<int32_t>& at) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(at.sums[0]), "+r"(at.sums[1]), "+r"(at.sums[2]), "+r"(at.sums[3])
      : "r"(at.outputs[0]), "r"(at.outputs[1]), "r"(at.outputs[2]), "r"(at.outputs[3]),
        "r"(at.columns[0]), "r"(at.columns[1]));
}

// The threads of a block, each with a State. They run in turns: a thread may read what others wrote
// to shared memory before the last barrier.
template <typename State, int threads>
class ThreadBlock {
 public:
  template <typename F>
  __device__ __forceinline__ void each(const F& f) {
    f(static_cast<int>(threadIdx.x), state_);
  }

  __device__ __forceinline__ void barrier() { __syncthreads(); }

  // Computes one product in every warp; operands(state) returns the part of a thread.
  template <typename T, typename F>
  __device__ __forceinline__ void multiply(const F& operands) {
    tensor_multiply(T(), operands(state_));
  }

 private:
  State state_;
};

#else

template <typename T>
T warp_sum(T* values) {
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    for (int lane = 0; lane < distance; ++lane) values[lane] += values[lane + distance];
  }
  return values[0];
}

template <typename T>
T block_sum(std::vector<T> values) {
  T sums[kWarp] = {};
  for (size_t warp = 0; warp < values.size() / kWarp; ++warp) {
    sums[warp] = warp_sum(values.data() + warp * kWarp);
  }
  return warp_sum(sums);
}

inline double tensor_element(Half, uint32_t word, int i) {
  return static_cast<double>(widen(Half{static_cast<uint16_t>(word >> 16 * i)}));
}
inline double tensor_element(BFloat16, uint32_t word, int i) {
  return static_cast<double>(widen(BFloat16{static_cast<uint16_t>(word >> 16 * i)}));
}
inline double tensor_element(int8_t, uint32_t word, int i) {
  return static_cast<double>(static_cast<int8_t>(word >> 8 * i));
}

template <typename T, typename Sum>
void tensor_multiply(const std::vector<TensorOperands<Sum> >& lanes) {
  constexpr int kElements = 4 / sizeof(T);  // in a word
  constexpr int kWords = 8;                 // along k
  double outputs[16][kWords * kElements];
  double columns[kWords * kElements][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const TensorLane at(lane);
    for (int i = 0; i < kElements; ++i) {
      for (int half = 0; half < 2; ++half) {
        const int k = (at.quarter + 4 * half) * kElements + i;
        outputs[at.eighth][k] = tensor_element(T(), lanes[lane].outputs[2 * half], i);
        outputs[at.eighth + 8][k] = tensor_element(T(), lanes[lane].outputs[2 * half + 1], i);
        columns[k][at.eighth] = tensor_element(T(), lanes[lane].columns[half], i);
      }
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const TensorLane at(lane);
    for (int value = 0; value < 4; ++value) {
      double sum = static_cast<double>(lanes[lane].sums[value]);
      for (int k = 0; k < kWords * kElements; ++k) {
        sum += outputs[at.row(value)][k] * columns[k][at.column(value)];
      }
      lanes[lane].sums[value] = static_cast<Sum>(sum);
    }
  }
}

template <typename State, int threads>
class ThreadBlock {
 public:
  template <typename F>
  void each(const F& f) {
    for (int thread = 0; thread < threads; ++thread) f(thread, states_[thread]);
  }

  void barrier() {}

  template <typename T, typename F>
  void multiply(const F& operands) {
    for (int first = 0; first < threads; first += kWarp) {
      std::vector<decltype(operands(states_[0]))> lanes;
      for (int lane = 0; lane < kWarp; ++lane) lanes.push_back(operands(states_[first + lane]));
      tensor_multiply<T>(lanes);
    }
  }

 private:
  std::vector<State> states_ = std::vector<State>(threads);
};

#endif

}  // namespace andmask
