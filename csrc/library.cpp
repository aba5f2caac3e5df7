// Every schema of the library, and what it knows about itself.
// Autograd formulas, fake kernels and vmap rules are registered in Python (andmask_ext/_*.py).
#include <torch/csrc/stable/library.h>
#include <torch/headeronly/version.h>

#include <string>

#include "cpu/capability.h"

namespace {

// Lines of "key value", parsed by andmask_ext.build_info().
std::string native_info() {
  return std::string("libtorch_built ") + TORCH_VERSION + "\ncompiler " + ANDMASK_COMPILER +
         "\nisa " + andmask::name(andmask::active_isa()) + "\nisa_available " +
         andmask::name(andmask::best_isa());
}

}  // namespace

STABLE_TORCH_LIBRARY(andmask, m) {
  m.def("masked_mean(Tensor grads, float tau=1.0, bool rescale=False) -> Tensor");
  m.def("agreement_mask(Tensor grads, float tau=1.0, bool rescale=False) -> Tensor");
  m.def("_native_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(andmask, CompositeExplicitAutograd, m) {
  m.impl("_native_info", TORCH_BOX(&native_info));
}
