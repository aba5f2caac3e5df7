// Tiles of sums of outer products: packing operands, adding up, and writing finished tiles.
#pragma once

#include <cstdint>

#include "../../kernels/moments.h"

namespace andmask {

// Columns of a vector, whatever the size of a register.
constexpr int kOuterLanes = 16;
// Rows of the two operands that are packed together. A packed panel of activations, 64 columns
// wide, leaves room in L1.
constexpr int64_t kOuterDepth = 128;
// Elements from one plane of packed grad_outputs to the next. It is no power of two, so that planes
// spread over the cache.
constexpr int64_t kOuterPitch = kOuterDepth + 16;
// Elements from one row to the next of grad_outputs that are packed like columns. Layers with one
// channel per group need them so: their lanes are groups, and products are taken lane by lane.
constexpr int64_t kOuterLanePitch = 64;
constexpr int kOuterMaxVectors = 12;

// The range of the nonzero magnitudes of an operand, as bits. It tells whether a tile can meet an
// underflow, an overflow or NaN.
struct MagnitudeRange {
  uint64_t largest = 0;
  uint64_t smallest_less_one = ~uint64_t{0};  // less one, so that a zero wraps and is never least
};

// Copies and widens positions and channels of one operand. `F` is float, or double for float64.
struct OuterPack {
  const void* source;
  const int64_t* source_offsets;  // [positions]
  int64_t positions;
  int64_t channels;
  int64_t channel_stride;
  bool unit_positions;  // source_offsets rise by one
  void* target;         // F
};

// One tile over one block of rows of consecutive environments.
struct OuterTile {
  const void* columns[kOuterMaxVectors];  // F: the start of each vector
  const int32_t* row_offsets;             // [rows of the block], from the start
  const void* outputs;  // F [tile rows][kOuterPitch], or lane by lane [rows][kOuterLanePitch]
  const int32_t* rows;  // [environments]: rows of each in the block
  int64_t environments;
  bool resumes;   // the first environment began in another block: `partial` holds its sum so far
  bool suspends;  // the last environment goes on in another block: `partial` takes its sum so far
  bool careful;   // an element of a tile may be -0 or NaN, or there are weights
  const double* weights;  // [environments]; multiply what is added to the sum. Null: 1
  void* partial;          // F [tile rows][vectors][lanes]
  void* sum;              // like partial; added to
  int8_t* votes;          // like partial, in the order of the instruction set; added to
};

// Writes a tile to the moments.
struct OuterFlush {
  const void* sum;
  int8_t* votes;    // reordered in place
  int64_t outputs;  // rows of the tile within the matrix
  int64_t output_stride;
  const int64_t* lane_offsets;  // [vectors * lanes]; -1: lane is not used
  bool first;                   // overwrites
  MomentArrays moments;         // at the first row of the tile
};

struct OuterTileShape {
  int64_t rows;
  int64_t vectors;  // of columns
};

// `narrow` tiles have half the vectors. Tiles of `lanes` are taken lane by lane: they have one row,
// and a vector for each tap.
enum class OuterTileKind { wide, narrow, lanes };
constexpr int kOuterTileKinds = 3;

struct OuterKernels {
  OuterTileShape shape[kWidths][kOuterTileKinds];
  // target[target_offsets[position] + channel]; channels up to the next multiple of `round` are 0.
  void (*pack_columns[kDtypes])(const OuterPack& pack, const int32_t* target_offsets, int64_t round,
                                MagnitudeRange* range);
  // target[channel * kOuterPitch + position].
  void (*pack_outputs[kDtypes])(const OuterPack& pack, MagnitudeRange* range);
  void (*accumulate[kWidths])(const OuterTile& tile, OuterTileKind kind);
  void (*flush[kWidths])(const OuterFlush& flush, OuterTileKind kind);
};

ANDMASK_DECLARE_KERNELS(OuterKernels, outer_kernels)

}  // namespace andmask
