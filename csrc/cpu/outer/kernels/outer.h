// Tiles of sums of outer products: packing operands, adding up, and what becomes of a finished
// tile.
#pragma once

#include <cstdint>

#include "../../kernels/moments.h"

namespace andmask {

// Columns come in vectors of this many, whatever the registers hold.
constexpr int kOuterLanes = 16;
// Rows of the two operands that are packed together: a packed panel of activations, 64 columns
// wide, leaves room in L1.
constexpr int64_t kOuterDepth = 128;
// Between two planes of packed grad_outputs. Not a power of two, so that they spread over the
// cache.
constexpr int64_t kOuterPitch = kOuterDepth + 16;
// From one row to the next of grad_outputs that are packed like columns, which is how layers with
// one channel a group want them: there, lanes are groups, and products are taken lane by lane.
constexpr int64_t kOuterLanePitch = 64;
constexpr int kOuterMaxVectors = 12;

// The magnitudes that an operand holds, as bits, zeros aside. They tell whether a tile can meet an
// underflow, an overflow or NaN at all.
struct MagnitudeRange {
  uint64_t largest = 0;
  uint64_t smallest_less_one = ~uint64_t{0};  // less one, so that a zero wraps and is never least
};

// Positions and channels of one operand, copied and widened. `F` is float, or double for float64.
struct OuterPack {
  const void* source;
  const int64_t* source_offsets;  // [positions]
  int64_t positions;
  int64_t channels;
  int64_t channel_stride;
  bool unit_positions;  // source_offsets rise by one
  void* target;         // F
};

// One tile over one block of rows: environments that follow one another.
struct OuterTile {
  const void* columns[kOuterMaxVectors];  // F: where the first row of each vector would lie
  const int32_t* row_offsets;             // [rows of the block], from there
  const void* outputs;  // F [tile rows][kOuterPitch], or lane by lane [rows][kOuterLanePitch]
  const int32_t* rows;  // [environments]: of each in the block
  int64_t environments;
  bool resumes;   // the first environment began in another block: `partial` holds its sum so far
  bool suspends;  // the last environment goes on in another block: `partial` takes its sum so far
  bool careful;   // an element of a tile may be -0 or NaN, or there are weights
  const double* weights;  // [environments]; multiply what is added to the sum. Null: 1
  void* partial;          // F [tile rows][vectors][lanes]
  void* sum;              // like partial; added to
  int8_t* votes;          // like partial, in the order of the instruction set; added to
};

// Writing a tile to the moments.
struct OuterFlush {
  const void* sum;
  int8_t* votes;    // put in order in place
  int64_t outputs;  // rows of the tile that exist
  int64_t output_stride;
  const int64_t* lane_offsets;  // [vectors * lanes]; -1: lane is not used
  bool first;                   // overwrites
  MomentArrays moments;         // at the first row of the tile
};

struct OuterTileShape {
  int64_t rows;
  int64_t vectors;  // of columns
};

// `narrow` tiles have half the vectors; those taken lane by lane have one row, and a vector for
// each tap.
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
