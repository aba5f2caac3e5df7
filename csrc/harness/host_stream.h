// A stand-in for a CUDA stream, for kernel bodies that run on the host.
#pragma once

#include <cstdlib>
#include <memory>
#include <vector>

#include "../cuda/launch.h"

namespace andmask {

class HostStream {
 public:
  // The size of grids depends on the number of multiprocessors.
  explicit HostStream(int64_t multiprocessors) {
    stream_.multiprocessors = multiprocessors;
    stream_.memory = [this](int64_t bytes) {
      // The memory is exactly as large as requested, so that the address sanitizer sees accesses
      // beyond it.
      void* memory = nullptr;
      if (posix_memalign(&memory, 256, static_cast<size_t>(bytes > 0 ? bytes : 1)) != 0) abort();
      memory_.emplace_back(memory, free);
      return memory;
    };
  }
  HostStream(const HostStream&) = delete;

  operator const Stream&() const { return stream_; }

 private:
  Stream stream_;
  std::vector<std::unique_ptr<void, decltype(&free)>> memory_;
};

}  // namespace andmask
