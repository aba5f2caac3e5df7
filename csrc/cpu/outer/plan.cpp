#include "plan.h"

#include <algorithm>
#include <cstring>
#include <new>

namespace andmask {
namespace {

// The most bytes of moments of the tiles of one part, and of all threads' parts. Larger parts would
// pack less often, but would leave the caches between two visits of a tile.
constexpr int64_t kPartBytes = int64_t{9} << 19;
constexpr int64_t kScratchBytes = int64_t{24} << 20;
constexpr int64_t kAlignment = 4096;

OuterRange share(int64_t size, int64_t parts, int64_t index) {
  return {size * index / parts, size * (index + 1) / parts};
}

int64_t ceil_div(int64_t size, int64_t part) { return (size + part - 1) / part; }

// Returns the task without the places that no window sees, unless that separates places that are
// neighbours in memory.
OuterTask without_gaps(OuterTask task) {
  RowSource& source = task.activations;
  for (int i = 0; i < kWindowAxes; ++i) {
    WindowAxis& axis = source.axes[i];
    if (axis.taps > 1 || axis.padding > 0) continue;
    if (i == kWindowAxes - 1 && axis.stride == 1 && source.channel_stride != 1) continue;
    axis.stride *= axis.step;
    axis.size = axis.positions;
    axis.step = 1;
  }
  return task;
}

// Turns groups that have one channel each into channels. Their outputs remain.
bool put_groups_into_lanes(OuterTask& task) {
  if (task.groups == 1 || task.activations.channels != 1) return false;
  task.activations.channels = task.groups;
  task.layout.channel_stride = task.grad_outputs.channels * task.layout.output_stride;
  task.groups = 1;
  return true;
}

}  // namespace

int64_t OuterScratch::rounded(int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; }

void OuterScratch::reserve(int64_t bytes) {
  used_ = 0;
  if (bytes <= size_) return;
  size_ = 0;
  memory_.reset();
  memory_.reset(static_cast<char*>(std::aligned_alloc(kAlignment, rounded(bytes))));
  if (!memory_) throw std::bad_alloc();
  size_ = rounded(bytes);
  std::memset(memory_.get(), 0, size_);
}

OuterPlan::OuterPlan(const OuterTask& task_, Isa isa, int64_t threads)
    : task(without_gaps(task_)),
      lanewise(put_groups_into_lanes(task)),
      kernels(outer_kernels(isa)),
      moment_kernels(andmask::moment_kernels(isa)),
      width(task.activations.dtype == Dtype::float64 ? Width::float64 : Width::float32),
      shapes(kernels.shape[static_cast<int>(width)]),
      shape(shapes[static_cast<int>(lanewise ? OuterTileKind::lanes : OuterTileKind::wide)]),
      geometry(task, shapes, lanewise),
      row_tiles(ceil_div(task.grad_outputs.channels, shape.rows)),
      general(task.moments.squares || task.moments.logs || task.moments.voters),
      longest(0) {
  for (int64_t e = 0; e < task.environments; ++e) {
    longest = std::max(longest, task.offsets[e + 1] - task.offsets[e]);
  }
  longest *= task.activations.rows();
  share_out(std::clamp<int64_t>(work() / kGrain, 1, std::max<int64_t>(1, threads)));
}

OuterRange OuterPlan::groups(int64_t part) const {
  return share(task.groups, group_parts, part / (column_parts * row_parts));
}

OuterRange OuterPlan::columns(int64_t part) const {
  return share(static_cast<int64_t>(geometry.tiles().size()), column_parts, part % column_parts);
}

OuterRange OuterPlan::rows(int64_t part) const {
  return share(row_tiles, row_parts, part / column_parts % row_parts);
}

int64_t OuterPlan::tile_bytes() const {
  const int64_t arrays = 2 + (task.moments.squares != nullptr) + (task.moments.logs != nullptr);
  const int64_t votes = task.moments.voters ? 2 : 1;
  return tile_elements() * (arrays * wide() + votes * vote_bytes());
}

// Chooses parts that keep the longest share of a thread short: the tiles themselves, and the
// packing, which every part does for itself. The result does not depend on the parts.
void OuterPlan::share_out(int64_t threads) {
  const int64_t columns = static_cast<int64_t>(geometry.tiles().size());
  const int64_t most =
      std::max<int64_t>(1, std::min(kPartBytes, kScratchBytes / threads) / tile_bytes());
  if (task.groups > 1 && columns * row_tiles <= most) {
    group_parts = std::min(task.groups, threads);
    group_parts = std::max(
        group_parts, ceil_div(task.groups, std::max<int64_t>(1, most / (columns * row_tiles))));
    return;
  }
  group_parts = task.groups;
  // The time of packing a column or a row, relative to that of a tile.
  const double column_cost = .5 / static_cast<double>(task.activations.taps());
  constexpr double kRowCost = .1;
  double best = 0;
  for (int64_t i = 1; i <= columns; ++i) {
    const int64_t tile_columns = ceil_div(columns, i);
    for (int64_t j = 1; j <= row_tiles; ++j) {
      const int64_t tile_rows = ceil_div(row_tiles, j);
      if (tile_columns * tile_rows > most && tile_columns * tile_rows > 1) continue;
      const double cost = static_cast<double>(ceil_div(i * j, threads)) *
                          (static_cast<double>(tile_columns * tile_rows) +
                           column_cost * static_cast<double>(tile_columns) +
                           kRowCost * static_cast<double>(tile_rows));
      if (best == 0 || cost < best) {
        best = cost;
        column_parts = i;
        row_parts = j;
      }
      if (i * j > 4 * threads) break;
    }
  }
}

}  // namespace andmask
