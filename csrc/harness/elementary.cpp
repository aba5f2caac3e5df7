// The elementary functions of csrc/math on numpy arrays, for tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "../math/elementary.h"
#include "bindings.h"

namespace py = pybind11;

namespace andmask {
namespace {

// Calls the functions as kernels do: float32 takes exp and tanh through double.
template <typename T>
py::array evaluate(const std::string& function, const py::array& array) {
  const py::array_t<T, py::array::c_style | py::array::forcecast> input(array);
  py::array_t<T> output(input.size());
  const T* in = input.data();
  T* out = output.mutable_data();
  for (int64_t i = 0; i < input.size(); ++i) {
    out[i] = function == "log"   ? log_of(in[i])
             : function == "exp" ? static_cast<T>(exp_of(static_cast<double>(in[i])))
                                 : static_cast<T>(tanh_of(static_cast<double>(in[i])));
  }
  return output;
}

py::array elementary(const std::string& function, const py::array& array) {
  if (function != "log" && function != "exp" && function != "tanh") {
    throw std::invalid_argument("function: expected log, exp or tanh, got " + function);
  }
  if (array.ndim() != 1) throw std::invalid_argument("array: expected 1 dim");
  if (py::isinstance<py::array_t<float>>(array)) return evaluate<float>(function, array);
  if (py::isinstance<py::array_t<double>>(array)) return evaluate<double>(function, array);
  throw std::invalid_argument("array: expected float32 or float64");
}

}  // namespace

ANDMASK_BINDINGS(m) { m.def("elementary", &elementary, py::arg("function"), py::arg("array")); }

}  // namespace andmask
