// Sums of outer products on numpy arrays, for tests: convolutions of any strides, and linear layers
// as convolutions with one tap.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <vector>

#include "../cpu/outer/tiles.h"
#include "bindings.h"
#include "host_stream.h"

namespace py = pybind11;

namespace andmask {
namespace {

using Array = std::optional<py::array>;
using Sizes = std::vector<int64_t>;

void* pointer(const Array& array) {
  return array ? const_cast<py::array&>(*array).mutable_data() : nullptr;
}

int64_t stride(const py::array& array, py::ssize_t dim) {
  return array.strides(dim) / array.itemsize();
}

// An array [examples, channels, *sizes].
RowSource source(const py::array& array) {
  const py::ssize_t axes = array.ndim() - 2;
  if (axes < 0 || axes > kWindowAxes) throw std::invalid_argument("expected 2 to 5 dims");
  RowSource rows{array.data(),   parse_dtype(array), stride(array, 0),
                 array.shape(1), stride(array, 1),   {}};
  for (py::ssize_t i = 0; i < axes; ++i) {
    WindowAxis& axis = rows.axes[kWindowAxes - axes + i];
    axis.size = axis.positions = array.shape(2 + i);
    axis.stride = stride(array, 2 + i);
  }
  return rows;
}

// `window` has a list [taps, step, padding, dilation] for each axis. Moments are
// [outputs, channels, *taps] and lie alike. Parts are done one after the other, in reverse.
void outer(const std::string& isa, const py::array& activations, const py::array& grad_outputs,
           const Sizes& offsets, const py::array& sum, const Array& votes, const Array& squares,
           const Array& logs, const std::vector<Sizes>& window, const std::optional<Sizes>& order,
           const std::vector<double>& weights, int64_t count, int64_t groups, int64_t threads) {
  OuterTask task;
  task.activations = source(activations);
  task.grad_outputs = source(grad_outputs);
  task.activations.channels /= groups;
  task.grad_outputs.channels /= groups;
  task.layout = {stride(sum, 0), stride(sum, 1), {}};
  const size_t skipped = kWindowAxes - window.size();
  for (size_t i = 0; i < window.size(); ++i) {
    WindowAxis& axis = task.activations.axes[skipped + i];
    axis.positions = task.grad_outputs.axes[skipped + i].positions;
    axis.taps = window[i].at(0);
    axis.step = window[i].at(1);
    axis.padding = window[i].at(2);
    axis.dilation = window[i].at(3);
    task.layout.tap_strides[skipped + i] = stride(sum, 2 + static_cast<py::ssize_t>(i));
  }
  task.order = order ? order->data() : nullptr;
  task.offsets = offsets.data();
  task.environments = static_cast<int64_t>(offsets.size()) - 1;
  task.weights = weights.empty() ? nullptr : weights.data();
  task.count = count;
  task.moments = {const_cast<py::array&>(sum).mutable_data(), pointer(votes),
                  votes ? static_cast<int>(votes->itemsize()) : 0, pointer(squares), pointer(logs)};
  task.groups = groups;
  if (isa == "cuda") {  // its kernel bodies, thread by thread
    run(HostStream(2), task);
    return;
  }
  accumulate_outer_tiles(task, parse_isa(isa), threads,
                         [](int64_t parts, const std::function<void(int64_t)>& body) {
                           while (parts > 0) body(--parts);
                         });
}

}  // namespace

ANDMASK_BINDINGS(m) {
  m.def("outer", &outer, py::arg("isa"), py::arg("activations"), py::arg("grad_outputs"),
        py::arg("offsets"), py::arg("sum"), py::arg("votes") = py::none(),
        py::arg("squares") = py::none(), py::arg("logs") = py::none(),
        py::arg("window") = std::vector<Sizes>(), py::arg("order") = py::none(),
        py::arg("weights") = std::vector<double>(), py::arg("count") = 0, py::arg("groups") = 1,
        py::arg("threads") = 1);
}

}  // namespace andmask
