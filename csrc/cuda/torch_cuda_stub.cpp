// Replaces torch's libtorch_cuda.so for the linker, and is not installed. So the CUDA library is
// the same whether the installed torch has CUDA or not: it names libtorch_cuda.so, and finds the
// real one at run time.
#include <cstdint>

extern "C" __attribute__((visibility("default"))) int32_t
aoti_torch_get_current_cuda_stream(int32_t, void**) {
  return 1;
}
