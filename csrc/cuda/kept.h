// The thresholds of a test on the device.
#pragma once

#include <vector>

#include "../tasks/moments.h"
#include "stream.h"

namespace andmask {

// Points the updates to the tables of their test, in memory of the op; null where one threshold,
// which is returned, stands for all. No host waits for them.
int32_t set_thresholds(const Stream& stream, std::vector<Update>& updates);

}  // namespace andmask
