// A CUDA stream: a device that tasks run on.
#pragma once

#include <cstdint>
#include <functional>

namespace andmask {

struct Stream {
  void* handle = nullptr;  // cudaStream_t
  int64_t multiprocessors = 1;
  // Returns device memory for the time of the op, aligned to 256 bytes and not initialised.
  std::function<void*(int64_t bytes)> memory;

  template <typename T>
  T* scratch(int64_t count) const {
    return static_cast<T*>(memory(count * static_cast<int64_t>(sizeof(T))));
  }
};

int64_t multiprocessor_count(int32_t device);

}  // namespace andmask
