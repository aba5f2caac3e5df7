#include "launch.h"

namespace andmask {

int64_t multiprocessor_count([[maybe_unused]] int32_t device) {
#if defined(__CUDACC__)
  int count = 0;
  check_cuda(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device),
             "cudaDeviceGetAttribute");
  return count;
#else
  return 4;
#endif
}

}  // namespace andmask
