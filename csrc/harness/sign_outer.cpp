// Votes of environments of one row each on numpy arrays, for tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

#include "../cpu/outer/kernels/sign_outer.h"
#include "bindings.h"

namespace py = pybind11;

namespace andmask {
namespace {

int64_t panels_of(const py::array& values) {
  return (values.shape(1) + kSignPanel - 1) / kSignPanel;
}

std::vector<uint8_t> pack(const SignOuterKernels& kernels, const py::array& values) {
  const SignMatrix matrix{values.data(), values.shape(0), values.shape(1),
                          values.strides(0) / values.itemsize(),
                          values.strides(1) / values.itemsize()};
  const int64_t groups = (matrix.environments + kSignGroup - 1) / kSignGroup;
  std::vector<uint8_t> packed(panels_of(values) * groups * kSignPanel);
  const auto kernel = kernels.pack[static_cast<int>(parse_dtype(values))];
  for (int64_t group = groups; group > 0; --group) {
    kernel(matrix, group - 1, group, packed.data());
  }
  return packed;
}

// Adds to `votes` [outputs, inputs], in place; `panels` of inputs in each call.
void sign_outer(const std::string& isa, const py::array& activations, const py::array& grad_outputs,
                py::array votes, bool first, int64_t panels) {
  const SignOuterKernels& kernels = sign_outer_kernels(parse_isa(isa));
  const std::vector<uint8_t> a = pack(kernels, activations), d = pack(kernels, grad_outputs);
  const SignOuterTask task{a.data(),
                           d.data(),
                           activations.shape(0),
                           activations.shape(1),
                           grad_outputs.shape(1),
                           first,
                           votes.mutable_data(),
                           static_cast<int>(votes.itemsize()),
                           votes.strides(0) / votes.itemsize()};
  for (int64_t row = 0; row < panels_of(grad_outputs); ++row) {
    for (int64_t begin = 0; begin < panels_of(activations); begin += panels) {
      kernels.vote(task, row, begin, std::min(begin + panels, panels_of(activations)));
    }
  }
}

}  // namespace

ANDMASK_BINDINGS(m) {
  m.def("sign_outer", &sign_outer, py::arg("isa"), py::arg("activations"), py::arg("grad_outputs"),
        py::arg("votes"), py::arg("first") = true, py::arg("panels") = kSignPanels);
}

}  // namespace andmask
