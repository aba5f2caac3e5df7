// The CUDA kernel bodies of masked_mean on numpy arrays, thread by thread.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "../tasks/masked_mean.h"
#include "bindings.h"
#include "host_stream.h"

namespace py = pybind11;

namespace andmask {
namespace {

// grads: [environments, columns], rows contiguous. `out` and `scaled` (None: no rescaling) are
// written.
void masked_mean(const py::array& grads, int32_t threshold, const std::string& output,
                 py::array out, std::optional<py::array> scaled, int64_t multiprocessors) {
  const HostStream stream(multiprocessors);
  run(stream, MaskedMeanTask{.grads = grads.data(),
                             .environments = grads.shape(0),
                             .stride = grads.strides(0) / grads.itemsize(),
                             .threshold = threshold,
                             .output = parse_output(output),
                             .out = out.mutable_data(),
                             .columns = grads.shape(1),
                             .dtype = parse_dtype(grads),
                             .scaled = scaled ? scaled->mutable_data() : nullptr});
}

}  // namespace

ANDMASK_BINDINGS(m) {
  m.def("cuda_masked_mean", &masked_mean, py::arg("grads"), py::arg("threshold"), py::arg("output"),
        py::arg("out"), py::arg("scaled") = py::none(), py::arg("multiprocessors") = 2);
}

}  // namespace andmask
