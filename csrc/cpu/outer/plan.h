// The plan by which threads share the tiles of a weight gradient, and the memory of a thread.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <memory>

#include "blocks.h"

namespace andmask {

struct OuterRange {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};

// Memory of one thread, kept from one call to the next.
class OuterScratch {
 public:
  // Frees all that was taken, and provides `bytes` for what will be, each rounded up. Memory that
  // was never taken before is zero.
  void reserve(int64_t bytes);

  template <typename T>
  T* take(int64_t bytes) {
    T* const begin = reinterpret_cast<T*>(memory_.get() + used_);
    used_ += rounded(bytes);
    return begin;
  }

  static int64_t rounded(int64_t bytes);

 private:
  struct Free {
    void operator()(char* memory) const { std::free(memory); }
  };
  std::unique_ptr<char, Free> memory_;
  int64_t size_ = 0;
  int64_t used_ = 0;
};

struct OuterPlan {
  OuterPlan(const OuterTask& task, Isa isa, int64_t threads);

  OuterTask task;
  bool lanewise;  // groups of one channel each, which the task calls channels
  const OuterKernels& kernels;
  const MomentKernels& moment_kernels;
  Width width;
  const OuterTileShape* shapes;  // of each kind
  OuterTileShape shape;          // of the largest tile
  OuterGeometry geometry;
  int64_t row_tiles;  // tiles along the outputs
  bool general;       // moments that the kernel of tiles does not know
  int64_t longest;    // rows of an environment
  // The work is cut into parts: ranges of groups, columns and outputs.
  int64_t group_parts = 1;
  int64_t column_parts = 1;
  int64_t row_parts = 1;

  int64_t tiles() const {
    return task.groups * static_cast<int64_t>(geometry.tiles().size()) * row_tiles;
  }
  // The number of products of a row with a tile. Another thread is worth waking for kGrain of them.
  int64_t work() const {
    return (task.offsets[task.environments] - task.offsets[0]) * task.activations.rows() * tiles();
  }
  static constexpr int64_t kGrain = 8192;
  int64_t parts() const { return group_parts * column_parts * row_parts; }
  OuterRange groups(int64_t part) const;
  OuterRange columns(int64_t part) const;
  OuterRange rows(int64_t part) const;

  int64_t wide() const { return width == Width::float64 ? 8 : 4; }
  int64_t tile_elements() const { return shape.rows * shape.vectors * kOuterLanes; }
  int64_t vote_bytes() const {
    return !general ? 1 : task.moments.votes ? task.moments.vote_bytes : 0;
  }
  int64_t tile_bytes() const;

 private:
  void share_out(int64_t threads);
};

}  // namespace andmask
