// The CUDA kernel bodies of aggregate on numpy arrays, thread by thread.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/launchers.h"
#include "../math/columns.h"
#include "bindings.h"
#include "host_stream.h"

namespace py = pybind11;

namespace andmask {
namespace {

template <typename... Rules>
int find(const std::string& wanted, RuleList<Rules...>) {
  const std::vector<std::string> names = {Rules::kName...};
  for (size_t index = 0; index < names.size(); ++index) {
    if (names[index] == wanted) return static_cast<int>(index);
  }
  return -1;
}

// grads: [environments, columns], rows contiguous. `out` and `wide` (which may be `out`) are
// written.
void aggregate(const py::array& grads, const std::string& rule,
               const std::vector<double>& arguments, bool rescale,
               const std::optional<py::array>& noise, py::array wide, py::array out,
               int64_t multiprocessors) {
  if (grads.ndim() != 2) throw std::invalid_argument("grads: expected 2 dims");
  const HostStream stream(multiprocessors);
  const AggregateTask task{grads.data(),
                           grads.shape(0),
                           grads.strides(0) / grads.itemsize(),
                           grads.shape(1),
                           parse_dtype(grads),
                           find(rule, MomentRules()),
                           find(rule, ColumnRules()),
                           arguments.data(),
                           rescale,
                           noise ? noise->data() : nullptr,
                           wide.mutable_data(),
                           out.mutable_data()};
  if (task.moment_rule < 0 && task.column_rule < 0) {
    throw std::invalid_argument("rule: there is no " + rule);
  }
  launch_aggregate(stream, task);
}

}  // namespace

void bind_cuda_aggregate(py::module_& m) {
  m.def("cuda_aggregate", &aggregate, py::arg("grads"), py::arg("rule"), py::arg("arguments"),
        py::arg("rescale"), py::arg("noise"), py::arg("wide"), py::arg("out"),
        py::arg("multiprocessors") = 2);
}

}  // namespace andmask
