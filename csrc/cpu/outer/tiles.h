// Moments of the weight gradients W_e = sum over the rows r of environment e of d_r a_r^T. No W_e
// is ever stored: a tile of it stays in registers until it is added to the moments.
//
// This folder is free of torch, so that the test harness can drive it too.
#pragma once

#include <cstdint>
#include <functional>

#include "../../tasks/outer.h"
#include "kernels/outer.h"

namespace andmask {

// Calls body(i) for every i in [0, count), in any order, on any threads.
using ParallelFor =
    std::function<void(int64_t count, const std::function<void(int64_t index)>& body)>;

// Adds all environments of `task` to its moments. Both sources are float64, or neither is.
// `threads` is the number of parts that are worth having; the result does not depend on it. Votes
// must be wide enough for all environments. Arguments are not checked.
void accumulate_outer_tiles(const OuterTask& task, Isa isa, int64_t threads,
                            const ParallelFor& parallel_for);

}  // namespace andmask
