// Moments of W_e = sum over the rows r of environment e of d_r a_r^T: the arguments of the kernels,
// and the walk through rows of sources that are not stored as matrices.
#pragma once

#include "../../tasks/outer.h"
#include "../kernels/thread.h"

namespace andmask {

// A block adds up a tile of this many outputs and columns (channels and taps, with channels running
// fastest).
constexpr int kOuterTile = 64;

// The way in which threads share the elements of a stage: neighbours read neighbouring columns, or
// packs of them in one instruction, or neighbouring rows.
enum class OuterReading { columns, packs, rows };

struct OuterOperand {
  RowSource source;
  int64_t columns;       // channels times taps
  int64_t group_stride;  // elements from one group to the next
  OuterReading reading;
  bool checked[kWindowAxes];  // the window may look beyond the input, where it reads zeros
};

// Examples [begin(e), begin(e + 1)) of the order belong to environment e.
struct OuterEnvironments {
  const int64_t* offsets;  // null: `size` examples each from `first` on; the last may have fewer
  int64_t first, end;      // of the examples
  int64_t size;
  int64_t count;

  ANDMASK_METHOD int64_t begin(int64_t environment) const {
    if (offsets) return offsets[environment];
    const int64_t index = first + environment * size;
    return index < end ? index : end;
  }
};

// A row: an index in the order and a position of the window. Divisions are made once; after that
// rows are counted up digit by digit.
struct OuterCursor {
  int64_t index;
  int64_t position[kWindowAxes];

  ANDMASK_METHOD static OuterCursor at(const int64_t* positions, int64_t row) {
    OuterCursor cursor;
#pragma unroll
    for (int axis = kWindowAxes - 1; axis >= 0; --axis) {
      cursor.position[axis] = row % positions[axis];
      row /= positions[axis];
    }
    cursor.index = row;
    return cursor;
  }

  ANDMASK_METHOD void advance(const int64_t* positions, const OuterCursor& by) {
    int64_t carry = 0;
#pragma unroll
    for (int axis = kWindowAxes - 1; axis >= 0; --axis) {
      position[axis] += by.position[axis] + carry;
      carry = position[axis] >= positions[axis] ? 1 : 0;
      if (carry) position[axis] -= positions[axis];
    }
    index += by.index + carry;
  }

  ANDMASK_METHOD void advance(const int64_t* positions) {
    ++position[kWindowAxes - 1];
#pragma unroll
    for (int axis = kWindowAxes - 1; axis >= 0; --axis) {
      if (position[axis] < positions[axis]) return;
      position[axis] = 0;
      if (axis > 0) {
        ++position[axis - 1];
      } else {
        ++index;
      }
    }
  }
};

struct OuterArguments {
  OuterOperand outputs, activations;
  const int64_t* order;  // null: as they lie
  OuterEnvironments environments;
  int64_t positions[kWindowAxes];  // rows of an example
  int64_t example_rows;            // their product
  OuterCursor stage;               // rows from one stage to the next
  const double* weights;           // of each environment; null: `weight`
  double weight;
  const double* row_weights;  // of each example, where rows are scaled one by one; null: 1
  int64_t count;              // environments added before
  MomentArrays moments;
  OuterLayout layout;
  int64_t groups, row_tiles, column_tiles;
  // The number of parts that share the environments. Each stores its sums [splits, groups, outputs,
  // columns] and votes, which OuterJoinBody adds in their order. 1: a block writes to the moments.
  int64_t splits;
  void* part_sums;      // F; null: not wanted
  int32_t* part_votes;  // null: not wanted

  ANDMASK_METHOD int64_t blocks() const { return groups * row_tiles * column_tiles * splits; }
  ANDMASK_METHOD int64_t elements() const { return groups * outputs.columns * activations.columns; }
};

// The channel and the taps of a column of a source.
struct OuterColumn {
  int64_t channel;
  int64_t taps[kWindowAxes];

  ANDMASK_METHOD OuterColumn(const RowSource& source, int64_t column) {
    channel = column % source.channels;
    column /= source.channels;
#pragma unroll
    for (int axis = kWindowAxes - 1; axis >= 0; --axis) {
      taps[axis] = column % source.axes[axis].taps;
      column /= source.axes[axis].taps;
    }
  }

  // The distance from the beginning of a row.
  ANDMASK_METHOD int64_t offset(const RowSource& source) const {
    int64_t offset = channel * source.channel_stride;
#pragma unroll
    for (int axis = 0; axis < kWindowAxes; ++axis) {
      offset += taps[axis] * source.axes[axis].dilation * source.axes[axis].stride;
    }
    return offset;
  }

  ANDMASK_METHOD int64_t offset(const OuterLayout& layout) const {
    int64_t offset = channel * layout.channel_stride;
#pragma unroll
    for (int axis = 0; axis < kWindowAxes; ++axis) offset += taps[axis] * layout.tap_strides[axis];
    return offset;
  }
};

// A table that a block makes of the columns of one operand in its tile.
struct OuterTable {
  int64_t offsets[kOuterTile];            // in the source
  int64_t taps[kWindowAxes][kOuterTile];  // times dilation

  ANDMASK_METHOD void fill(const OuterOperand& operand, int64_t first, int slot) {
    if (first + slot >= operand.columns) return;
    const OuterColumn column(operand.source, first + slot);
    offsets[slot] = column.offset(operand.source);
#pragma unroll
    for (int axis = 0; axis < kWindowAxes; ++axis) {
      taps[axis][slot] = column.taps[axis] * operand.source.axes[axis].dilation;
    }
  }
};

// One row of an operand.
template <typename T>
struct OuterRow {
  const T* data;
  int64_t place[kWindowAxes];  // of the window in the input

  ANDMASK_METHOD OuterRow(const OuterOperand& operand, const T* source, int64_t example,
                          const OuterCursor& cursor) {
    int64_t offset = example * operand.source.example_stride;
#pragma unroll
    for (int axis = 0; axis < kWindowAxes; ++axis) {
      const WindowAxis& window = operand.source.axes[axis];
      place[axis] = cursor.position[axis] * window.step - window.padding;
      offset += place[axis] * window.stride;
    }
    data = source + offset;
  }

  ANDMASK_METHOD bool holds(const OuterOperand& operand, const OuterTable& table,
                            int column) const {
    bool inside = true;
#pragma unroll
    for (int axis = 0; axis < kWindowAxes; ++axis) {
      if (!operand.checked[axis]) continue;
      const int64_t at = place[axis] + table.taps[axis][column];
      inside = inside &&
               static_cast<uint64_t>(at) < static_cast<uint64_t>(operand.source.axes[axis].size);
    }
    return inside;
  }
};

// A thread's share of a stage of `rows` rows: `group` neighbouring rows, and `kColumns` columns of
// each, in packs or far apart.
template <int threads, int rows, int group>
struct OuterShare {
  static constexpr int kStacks = rows / group;
  static constexpr int kLanes = threads / kStacks;
  static constexpr int kColumns = kOuterTile / kLanes;
  static_assert(threads % kStacks == 0 && kOuterTile % kLanes == 0);

  int stack;  // rows [stack * group, (stack + 1) * group)
  int lane;

  ANDMASK_METHOD OuterShare(OuterReading reading, int thread)
      : stack(reading == OuterReading::rows ? thread % kStacks : thread / kLanes),
        lane(reading == OuterReading::rows ? thread / kStacks : thread % kLanes) {}

  ANDMASK_METHOD int column(int i) const { return lane + i * kLanes; }
  ANDMASK_METHOD int pack(int i, int size) const { return (lane + i * kLanes) * size; }
};

}  // namespace andmask
