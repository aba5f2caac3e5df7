#include "device.h"

#include "../ops/implement.h"

namespace andmask {
namespace {

std::string device_text(const Tensor& tensor) {
  if (tensor.is_cpu()) return "the CPU";
  if (tensor.is_cuda()) return "cuda:" + std::to_string(tensor.get_device_index());
  return "another device";
}

void* current_stream([[maybe_unused]] const Tensor& tensor) {
  void* stream = nullptr;
#if !defined(ANDMASK_ON_HOST)
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
#endif
  return stream;
}

}  // namespace

Cuda::Cuda(const char* op, const Tensor& first)
    : op_(op),
      first_(first),
#if !defined(ANDMASK_ON_HOST)
      guard_(first.get_device_index()),
#endif
      stream_{current_stream(first), multiprocessor_count(first.get_device_index()), nullptr} {
  stream_.memory = [this](int64_t bytes) {
    memory_.push_back(torch::stable::new_empty(first_, {bytes}, ScalarType::Byte));
    return memory_.back().mutable_data_ptr();
  };
}

void Cuda::check_here(const char* name, int64_t index, const Tensor& tensor) const {
  if (tensor.is_cpu() == first_.is_cpu() && tensor.is_cuda() == first_.is_cuda() &&
      tensor.get_device_index() == first_.get_device_index()) {
    return;
  }
  fail(op_, "expected ", argument(name, index), " on ", device_text(first_),
       ", as the other tensors are, but got it on ", device_text(tensor));
}

}  // namespace andmask

// In tests the kernels run on the host, instead of the CPU's.
#if defined(ANDMASK_ON_HOST)
STABLE_TORCH_LIBRARY_IMPL(andmask, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(andmask, CUDA, m) {
#endif
  andmask::implement<andmask::Cuda>(m);
}
