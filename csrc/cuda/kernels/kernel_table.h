// A table of many tensors for one launch. The table is an argument of the kernel, so that nothing
// has to be copied to the device first. Tensors are cut into chunks, one for each block.
#pragma once

#include <type_traits>

#include "thread.h"

namespace andmask {

constexpr int kTableThreads = 256;
constexpr int64_t kChunk = 4096;  // elements

ANDMASK_INLINE int64_t chunks_of(int64_t size) { return (size + kChunk - 1) / kChunk; }

// The arguments of a kernel may take 32764 bytes. The rest is for arguments beside the table.
constexpr int64_t kTableBytes = 32000;

// Some of the tensors of a call. An item has `size`, in elements, and `packed`, which says that all
// its arrays begin at multiples of whole packs.
template <typename Item>
struct KernelTable {
  static constexpr int64_t kItems = kTableBytes / static_cast<int64_t>(sizeof(Item) + 8) - 1;

  int64_t count;  // >= 1
  // The first chunk of each item, and the end of the last one. Chunks are numbered through all
  // tables of a call.
  int64_t first_chunk[kItems + 1];
  Item items[kItems];

  ANDMASK_METHOD int64_t chunks() const { return first_chunk[count] - first_chunk[0]; }

  // The item that has this chunk: of several items that begin there, all empty but the last, the
  // last.
  ANDMASK_METHOD int64_t item_of(int64_t chunk) const {
    int64_t low = 0;
    int64_t high = count;
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      if (first_chunk[middle] <= chunk) {
        low = middle;
      } else {
        high = middle;
      }
    }
    return low;
  }
};

// The elements of one thread, next to each other and aligned.
template <int width>
struct PackedElements {
  int64_t first;

  ANDMASK_METHOD bool has(int) const { return true; }

  template <typename T>
  ANDMASK_METHOD Pack<T, width> get(const T* from) const {
    return load<width>(from + first);
  }

  template <typename T>
  ANDMASK_METHOD void put(T* to, const Pack<T, width>& pack) const {
    store(to + first, pack);
  }
};

// The elements of one thread, `distance` apart. They need not be aligned, and some may be beyond
// the end.
template <int width>
struct SpacedElements {
  int64_t first;
  int distance;
  int rest;  // elements from `first` to the end

  ANDMASK_METHOD bool has(int i) const { return i * distance < rest; }

  template <typename T>
  ANDMASK_METHOD Pack<T, width> get(const T* from) const {
    Pack<T, width> pack{};
#pragma unroll
    for (int i = 0; i < width; ++i) {
      if (has(i)) pack[i] = from[first + i * distance];
    }
    return pack;
  }

  template <typename T>
  ANDMASK_METHOD void put(T* to, const Pack<T, width>& pack) const {
#pragma unroll
    for (int i = 0; i < width; ++i) {
      if (has(i)) to[first + i * distance] = pack[i];
    }
  }
};

// The elements that the threads of a block process in one step, `width` each.
template <int width>
struct Tile {
  static constexpr int64_t kElements = kTableThreads * width;
  static_assert(kChunk % kElements == 0);

  int64_t begin;
  int64_t end;  // of the chunk
  int thread;
  bool packed;

  // Calls f(PackedElements) or f(SpacedElements), the same for all threads. Neighbouring threads
  // take neighbouring elements, unless `ordered` asks that a thread gets the elements of its pack.
  template <bool ordered = false, typename F>
  ANDMASK_METHOD void at(const F& f) const {
    if (packed && begin + kElements <= end) {
      f(PackedElements<width>{begin + thread * width});
    } else {
      const int64_t first = begin + thread * (ordered ? width : 1);
      const int64_t rest = end - first;
      f(SpacedElements<width>{first, ordered ? 1 : kTableThreads,
                              static_cast<int>(rest < kElements ? rest : kElements)});
    }
  }
};

// Calls f(tile) for the tiles of a chunk of `item`.
template <int width, typename Item, typename F>
ANDMASK_INLINE void for_tiles(const Item& item, int64_t chunk, int thread, const F& f) {
  const int64_t begin = chunk * kChunk;
  const int64_t end = begin + kChunk < item.size ? begin + kChunk : item.size;
#pragma unroll 1
  for (int64_t tile = begin; tile < end; tile += Tile<width>::kElements) {
    f(Tile<width>{tile, end, thread, item.packed});
  }
}

// ---- votes: their type is known at run time only ----

template <int width, typename V>
ANDMASK_INLINE void widen_votes(const Pack<V, width>& votes, int32_t* wide) {
#pragma unroll
  for (int i = 0; i < width; ++i) wide[i] = votes[i];
}

template <int width, typename At>
ANDMASK_INLINE void get_votes(const At& at, const void* votes, int bytes, int32_t* wide) {
  switch (bytes) {
    case 1: return widen_votes(at.get(static_cast<const int8_t*>(votes)), wide);
    case 2: return widen_votes(at.get(static_cast<const int16_t*>(votes)), wide);
    default: return widen_votes(at.get(static_cast<const int32_t*>(votes)), wide);
  }
}

template <typename V, int width>
ANDMASK_INLINE Pack<V, width> narrowed(const int32_t* votes) {
  Pack<V, width> pack;
#pragma unroll
  for (int i = 0; i < width; ++i) pack[i] = static_cast<V>(votes[i]);
  return pack;
}

template <int width, typename At>
ANDMASK_INLINE void put_votes(const At& at, const int32_t* votes, int bytes, void* to) {
  switch (bytes) {
    case 1: return at.put(static_cast<int8_t*>(to), narrowed<int8_t, width>(votes));
    case 2: return at.put(static_cast<int16_t*>(to), narrowed<int16_t, width>(votes));
    default: return at.put(static_cast<int32_t*>(to), narrowed<int32_t, width>(votes));
  }
}

}  // namespace andmask
