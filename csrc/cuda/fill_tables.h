// From lists of any length to launches.
#pragma once

#include <memory>
#include <vector>

#include "kernels/kernel_table.h"
#include "launch.h"

namespace andmask {

// Calls f(list) for lists of so many items that their table fits among the arguments of a kernel.
// Chunks are numbered through all of them; returns how many there are.
template <typename Item, typename F>
int64_t for_lists(const std::vector<Item>& items, const F& f) {
  const auto list = std::make_unique<List<Item>>();  // too large for the stack of any thread
  int64_t chunk = 0;
  const int64_t size = static_cast<int64_t>(items.size());
  for (int64_t first = 0; first < size; first += List<Item>::kItems) {
    list->count = std::min(List<Item>::kItems, size - first);
    list->first_chunk[0] = chunk;
    for (int64_t i = 0; i < list->count; ++i) {
      list->items[i] = items[first + i];
      chunk += chunks_of(items[first + i].size);
      list->first_chunk[i + 1] = chunk;
    }
    f(*list);
  }
  return chunk;
}

// Whether an array can be moved in packs of `width` elements.
inline bool packs(const void* array, int width, int64_t bytes) {
  return !array || aligned_for(array, width, bytes);
}

inline bool packs(const MomentArrays& moments, int width, int64_t bytes) {
  return packs(moments.sum, width, bytes) && packs(moments.squares, width, bytes) &&
         packs(moments.logs, width, bytes) && packs(moments.votes, width, moments.vote_bytes);
}

}  // namespace andmask
