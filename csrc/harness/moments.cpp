// Kernels of moments and of optimizer steps on numpy arrays, for tests.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/kernels/moments.h"
#include "../cpu/kernels/steps.h"
#include "bindings.h"

namespace py = pybind11;

namespace andmask {
namespace {

using Array = std::optional<py::array>;

void* pointer(const Array& array) {
  return array ? const_cast<py::array&>(*array).mutable_data() : nullptr;
}

MomentArrays arrays(const py::array& sum, const Array& votes, const Array& squares,
                    const Array& logs, const Array& voters) {
  return {pointer(sum),     pointer(votes), votes ? static_cast<int>(votes->itemsize()) : 0,
          pointer(squares), pointer(logs),  pointer(voters)};
}

// Calls f(begin, end) for [0, splits[0]), [splits[0], splits[1]), ... as threads do.
template <typename F>
void in_parts(const std::vector<int64_t>& splits, int64_t columns, const F& f) {
  int64_t begin = 0;
  for (int64_t end : splits) {
    f(begin, end);
    begin = end;
  }
  f(begin, columns);
}

// Adds the rows of `grads` to the moments, in place.
void accumulate(const std::string& isa, const py::array& grads, int64_t count, const py::array& sum,
                const Array& votes, const Array& squares, const Array& logs,
                const std::vector<double>& weights, const std::vector<int64_t>& splits,
                const Array& voters) {
  if (grads.ndim() != 2) throw std::invalid_argument("grads: expected 2 dims");
  const AccumulateTask task{.grads = grads.data(),
                            .rows = grads.shape(0),
                            .stride = grads.strides(0) / grads.itemsize(),
                            .weights = weights.empty() ? nullptr : weights.data(),
                            .count = count,
                            .moments = arrays(sum, votes, squares, logs, voters)};
  const auto kernel =
      moment_kernels(parse_isa(isa)).accumulate[static_cast<int>(parse_dtype(grads))];
  in_parts(splits, grads.shape(1), [&](int64_t begin, int64_t end) { kernel(task, begin, end); });
}

// Returns the update in the wide type, and the sum of the rule's factors.
py::tuple resolve(const std::string& isa, const std::string& rule,
                  const std::vector<double>& arguments, int64_t count, const py::array& sum,
                  const Array& votes, const Array& squares, const Array& logs, double scale,
                  std::optional<double> grad_scale, const std::vector<int64_t>& splits,
                  const Array& voters) {
  const Dtype dtype = parse_dtype(sum);
  const VoteTest test = parse_test(rule, arguments);
  const auto thresholds = vote_thresholds(test, count);
  const Update task{.moments = arrays(sum, votes, squares, logs, voters),
                    .sum_dtype = dtype,
                    .arguments = arguments.data(),
                    .count = count,
                    .test = test,
                    .thresholds = thresholds->table().data(),
                    .grad_scale = grad_scale ? &*grad_scale : nullptr};
  const int width = static_cast<int>(dtype == Dtype::float64 ? Width::float64 : Width::float32);
  const int index = moment_rule(rule);
  const MomentKernels& kernels = moment_kernels(parse_isa(isa));
  const int64_t columns = sum.shape(0);
  py::array update = dtype == Dtype::float64 ? py::array(py::array_t<double>(columns))
                                             : py::array(py::array_t<float>(columns));
  double total = 0;
  in_parts(splits, columns, [&](int64_t begin, int64_t end) {
    total += kernels.total_factor[width][index](task, begin, end);
    for (int64_t block = begin; block < end; block += kUpdateBlock) {
      const int64_t stop = std::min(block + kUpdateBlock, end);
      char* const out = static_cast<char*>(update.mutable_data()) + block * update.itemsize();
      kernels.resolve[width][index](task, scale, block, stop, out);
    }
  });
  return py::make_tuple(update, total);
}

// Calls kernel(update of the block, begin, end), block by block.
template <typename F>
void in_blocks(const py::array& update, const F& kernel) {
  const int64_t columns = update.shape(0);
  for (int64_t begin = 0; begin < columns; begin += kUpdateBlock) {
    const int64_t end = std::min(begin + kUpdateBlock, columns);
    kernel(static_cast<const char*>(update.data()) + begin * update.itemsize(), begin, end);
  }
}

double squared_norm(const std::string& isa, const py::array& update) {
  const bool wide = parse_dtype(update) == Dtype::float64;
  const auto kernel = moment_kernels(parse_isa(isa)).squared_norm[wide];
  double total = 0;
  in_blocks(update, [&](const void* block, int64_t begin, int64_t end) {
    total += kernel(block, end - begin);
  });
  return total;
}

void store(const std::string& isa, const py::array& update, py::array out) {
  const auto kernel = step_kernels(parse_isa(isa)).store[static_cast<int>(parse_dtype(out))];
  in_blocks(update, [&](const void* block, int64_t begin, int64_t end) {
    kernel(block, out.mutable_data(), begin, end);
  });
}

void sgd(const std::string& isa, py::array param, const Array& momentum_buffer,
         const py::array& update, double lr, double momentum, double dampening, double weight_decay,
         bool decoupled_weight_decay, bool nesterov, bool maximize, bool first) {
  const SgdTask task{.param = param.mutable_data(),
                     .momentum_buffer = pointer(momentum_buffer),
                     .lr = lr,
                     .momentum = momentum,
                     .dampening = dampening,
                     .weight_decay = weight_decay,
                     .decoupled_weight_decay = decoupled_weight_decay,
                     .nesterov = nesterov,
                     .maximize = maximize,
                     .first = first};
  const auto kernel = step_kernels(parse_isa(isa)).sgd[static_cast<int>(parse_dtype(param))];
  in_blocks(update, [&](const void* block, int64_t begin, int64_t end) {
    kernel(task, block, begin, end);
  });
}

// With `sign_avg`: the temporal AND-mask.
void adam(const std::string& isa, py::array param, const Array& exp_avg, const Array& exp_avg_sq,
          const Array& max_exp_avg_sq, const Array& sign_avg, const py::array& update,
          const std::vector<double>& corrections, double lr, const std::vector<double>& betas,
          double eps, double weight_decay, bool decoupled_weight_decay, bool maximize, double tau) {
  const AdamTask task{.param = param.mutable_data(),
                      .exp_avg = pointer(exp_avg),
                      .exp_avg_sq = pointer(exp_avg_sq),
                      .max_exp_avg_sq = pointer(max_exp_avg_sq),
                      .correction1 = corrections.at(0),
                      .correction2 = corrections.at(1),
                      .lr = lr,
                      .beta1 = betas.at(0),
                      .beta2 = betas.at(1),
                      .eps = eps,
                      .weight_decay = weight_decay,
                      .decoupled_weight_decay = decoupled_weight_decay,
                      .maximize = maximize};
  const int dtype = static_cast<int>(parse_dtype(param));
  const StepKernels& kernels = step_kernels(parse_isa(isa));
  in_blocks(update, [&](const void* block, int64_t begin, int64_t end) {
    if (sign_avg) {
      const TemporalAdamTask temporal{task, pointer(sign_avg), betas.at(2), corrections.at(2), tau};
      kernels.temporal_adam[dtype](temporal, block, begin, end);
    } else {
      kernels.adam[dtype](task, block, begin, end);
    }
  });
}

}  // namespace

ANDMASK_BINDINGS(m) {
  const std::vector<int64_t> whole;
  m.def("accumulate", &accumulate, py::arg("isa"), py::arg("grads"), py::arg("count"),
        py::arg("sum"), py::arg("votes") = py::none(), py::arg("squares") = py::none(),
        py::arg("logs") = py::none(), py::arg("weights") = std::vector<double>(),
        py::arg("splits") = whole, py::arg("voters") = py::none());
  m.def("resolve", &resolve, py::arg("isa"), py::arg("rule"), py::arg("arguments"),
        py::arg("count"), py::arg("sum"), py::arg("votes") = py::none(),
        py::arg("squares") = py::none(), py::arg("logs") = py::none(), py::arg("scale") = 1.0,
        py::arg("grad_scale") = py::none(), py::arg("splits") = whole,
        py::arg("voters") = py::none());
  m.def("squared_norm", &squared_norm);
  m.def("store", &store);
  m.def("sgd", &sgd, py::arg("isa"), py::arg("param"), py::arg("momentum_buffer"),
        py::arg("update"), py::arg("lr"), py::arg("momentum") = 0.0, py::arg("dampening") = 0.0,
        py::arg("weight_decay") = 0.0, py::arg("decoupled_weight_decay") = false,
        py::arg("nesterov") = false, py::arg("maximize") = false, py::arg("first") = false);
  m.def("adam", &adam, py::arg("isa"), py::arg("param"), py::arg("exp_avg"), py::arg("exp_avg_sq"),
        py::arg("max_exp_avg_sq"), py::arg("sign_avg"), py::arg("update"), py::arg("corrections"),
        py::arg("lr"), py::arg("betas"), py::arg("eps") = 1e-8, py::arg("weight_decay") = 0.0,
        py::arg("decoupled_weight_decay") = false, py::arg("maximize") = false,
        py::arg("tau") = 0.0);
}

}  // namespace andmask
