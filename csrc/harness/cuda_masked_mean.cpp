// The CUDA kernel bodies of masked_mean on numpy arrays, thread by thread.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>

#include "../cuda/launchers.h"
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
  const MaskedMeanTask task{grads.data(),
                            grads.shape(0),
                            grads.strides(0) / grads.itemsize(),
                            threshold,
                            output == "masked_mean"        ? Output::masked_mean
                            : output == "masked_mean_wide" ? Output::masked_mean_wide
                                                           : Output::mask,
                            out.mutable_data()};
  launch_masked_mean(stream, task, parse_dtype(grads), grads.shape(1),
                     scaled ? scaled->mutable_data() : nullptr);
}

}  // namespace

void bind_cuda_masked_mean(py::module_& m) {
  m.def("cuda_masked_mean", &masked_mean, py::arg("grads"), py::arg("threshold"), py::arg("output"),
        py::arg("out"), py::arg("scaled") = py::none(), py::arg("multiprocessors") = 2);
}

}  // namespace andmask
