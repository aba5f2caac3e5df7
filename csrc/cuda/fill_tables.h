// Fills tables of tensors for launches.
#pragma once

#include <memory>
#include <vector>

#include "kernels/kernel_table.h"
#include "launch.h"

namespace andmask {

// Calls f(table) for tables that together hold all items; a table fits into the arguments of a
// kernel. Chunks are numbered through all tables. Returns the number of chunks.
template <typename Item, typename F>
int64_t for_tables(const std::vector<Item>& items, const F& f) {
  const auto table =
      std::make_unique<KernelTable<Item>>();  // too large for the stack of any thread
  int64_t chunk = 0;
  const int64_t size = static_cast<int64_t>(items.size());
  for (int64_t first = 0; first < size; first += KernelTable<Item>::kItems) {
    table->count = std::min(KernelTable<Item>::kItems, size - first);
    table->first_chunk[0] = chunk;
    for (int64_t i = 0; i < table->count; ++i) {
      table->items[i] = items[first + i];
      chunk += chunks_of(items[first + i].size);
      table->first_chunk[i + 1] = chunk;
    }
    f(*table);
  }
  return chunk;
}

// True if an array can be moved in packs of `width` elements.
inline bool packs(const void* array, int width, int64_t bytes) {
  return !array || aligned_for(array, width, bytes);
}

inline bool packs(const MomentArrays& moments, int width, int64_t bytes) {
  return packs(moments.sum, width, bytes) && packs(moments.squares, width, bytes) &&
         packs(moments.logs, width, bytes) && packs(moments.votes, width, moments.vote_bytes) &&
         packs(moments.voters, width, moments.vote_bytes);
}

}  // namespace andmask
