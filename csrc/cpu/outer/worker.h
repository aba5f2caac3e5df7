// Runs one part of a plan, from packing to the moments.
#pragma once

#include "plan.h"

namespace andmask {

// Any thread may run any part, each once.
void run_outer_part(const OuterPlan& plan, int64_t part);

}  // namespace andmask
