// What an op asks of a device, as plain structs: the tasks of csrc/tasks. They hold pointers into
// the device's memory, and know nothing of torch, so that the test harness can fill them in too.
#pragma once

namespace andmask {

// Element types in the order of every kernel table.
enum class Dtype { float16, bfloat16, float32, float64 };
constexpr int kDtypes = 4;

}  // namespace andmask
