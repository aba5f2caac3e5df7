// Kernel bodies.
//
// A body is a struct of arguments. Its methods do the work of one thread, as plain functions of the
// thread's index that also compile for the host. The test harness calls them for every thread of
// every block (csrc/cuda/launch.h). Operations of several threads are in block_ops.h only.
#pragma once

#include <cstdint>

#include "../../math/scalar.h"
#include "../../tasks/dtype.h"

namespace andmask {

struct ThreadIndex {
  int64_t block;  // of `blocks`
  int64_t blocks;
  int thread;  // of Body::kThreads

  // Among all threads of the kernel.
  ANDMASK_METHOD int64_t in_grid(int threads) const { return block * threads + thread; }
};

// The most bytes that one memory instruction of a thread moves.
constexpr int kVectorBytes = 16;

// Neighbouring elements of one thread. They are moved in as few instructions as possible.
template <typename T, int size>
struct alignas(sizeof(T) * size < kVectorBytes ? sizeof(T) * size : kVectorBytes) Pack {
  T values[size];

  ANDMASK_METHOD T& operator[](int index) { return values[index]; }
  ANDMASK_METHOD const T& operator[](int index) const { return values[index]; }
};

template <int size, typename T>
ANDMASK_INLINE Pack<T, size> load(const T* from) {
  return *reinterpret_cast<const Pack<T, size>*>(from);
}

template <int size, typename T>
ANDMASK_INLINE void store_shared(T* to, const Pack<T, size>& pack) {
  *reinterpret_cast<Pack<T, size>*>(to) = pack;
}

template <int size, typename T>
ANDMASK_INLINE void store(T* to, const Pack<T, size>& pack) {
#if defined(__CUDA_ARCH__)
  // Written as asm, because ptxas (for sm_80 and sm_90) makes four stores of a copied struct.
  if constexpr (sizeof pack % kVectorBytes == 0) {
    uint32_t words[sizeof pack / 4];
    memcpy(words, &pack, sizeof pack);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof pack / 4); i += 4) {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                   :
                   : "l"(__cvta_generic_to_global(reinterpret_cast<char*>(to) + 4 * i)),
                     "r"(words[i]), "r"(words[i + 1]), "r"(words[i + 2]), "r"(words[i + 3])
                   : "memory");
    }
    return;
  }
#endif
  *reinterpret_cast<Pack<T, size>*>(to) = pack;
}

// The number of elements of T that fill one instruction.
template <typename T>
constexpr int kPackSize = kVectorBytes / static_cast<int>(sizeof(T));

// True if packs of `size` elements of `bytes` each may be moved at this address.
ANDMASK_INLINE bool aligned_for(const void* pointer, int64_t size, int64_t bytes) {
  const int64_t pack = size * bytes < kVectorBytes ? size * bytes : kVectorBytes;
  return reinterpret_cast<uintptr_t>(pointer) % static_cast<uintptr_t>(pack) == 0;
}

}  // namespace andmask
