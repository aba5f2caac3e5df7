// Votes of environments that have one row each. The sign of d a is sign(d) sign(a), so that votes
// are counted without products. The sign of NaN is 0, and so is that of 0 * infinity, which is NaN.
#pragma once

#include <cstdint>

#include "../../kernels/dispatch.h"

namespace andmask {

// Signs are packed four environments to a byte: bit e says that the sign is positive, bit e + 4
// that it is negative. The bytes of kSignPanel columns lie together, one group of four environments
// after the other: packed[panel][group][column].
constexpr int64_t kSignPanel = 64;
constexpr int64_t kSignGroup = 4;

// Votes of at most this many environments are counted in bytes before they are added to the rest.
constexpr int64_t kSignBlock = 124;

struct SignMatrix {
  const void* values;  // [environments, columns]
  int64_t environments;
  int64_t columns;
  int64_t row_stride;
  int64_t column_stride;
};

struct SignOuterTask {
  const uint8_t* activations;   // packed
  const uint8_t* grad_outputs;  // packed
  int64_t environments, inputs, outputs;
  bool first;      // what the votes hold is ignored
  void* votes;     // [outputs, inputs]; a row is contiguous
  int vote_bytes;  // 1, 2 or 4
  int64_t stride;  // elements from one row of votes to the next
};

struct SignOuterKernels {
  // Packs groups [begin, end) of environments.
  void (*pack[kDtypes])(const SignMatrix& matrix, int64_t begin, int64_t end, uint8_t* packed);
  // Votes of one panel of grad_outputs with panels [begin, end) of activations.
  void (*vote)(const SignOuterTask& task, int64_t row_panel, int64_t begin, int64_t end);
};

// The number of panels of activations that one call should get.
constexpr int64_t kSignPanels = 4;

ANDMASK_DECLARE_KERNELS(SignOuterKernels, sign_outer_kernels)

}  // namespace andmask
