// Moments of weight gradients of environments that have one row each, W_e = d_e a_e^T. The sum over
// environments is one matrix product, and the votes follow from the signs of d and a.
#pragma once

#include "tiles.h"

namespace andmask {

// Does the work of accumulate_outer_tiles for sums and votes of one row per environment, in one
// group and with one tap. A product that underflows to zero votes nevertheless.
void accumulate_sign_outer(const OuterTask& task, Isa isa, int64_t threads,
                           const ParallelFor& parallel_for);

}  // namespace andmask
