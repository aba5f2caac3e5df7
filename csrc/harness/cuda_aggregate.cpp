// The CUDA kernel bodies of aggregate on numpy arrays, thread by thread.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/kernels/columns.h"
#include "../cuda/kernels/ranked.h"
#include "../tasks/aggregate.h"
#include "bindings.h"
#include "host_stream.h"

namespace py = pybind11;

namespace andmask {
namespace {

// grads: [environments, columns], rows contiguous. `out` and `wide` (which may be `out`) are
// written.
void aggregate_stacked(const py::array& grads, const std::string& rule,
                       const std::vector<double>& arguments, bool rescale,
                       const std::optional<py::array>& noise, py::array wide, py::array out,
                       int64_t multiprocessors) {
  if (grads.ndim() != 2) throw std::invalid_argument("grads: expected 2 dims");
  const HostStream stream(multiprocessors);
  const AggregateTask task{.grads = grads.data(),
                           .environments = grads.shape(0),
                           .stride = grads.strides(0) / grads.itemsize(),
                           .columns = grads.shape(1),
                           .dtype = parse_dtype(grads),
                           .moment_rule = find_rule(rule, MomentRules()),
                           .column_rule = find_rule(rule, ColumnRules()),
                           .arguments = arguments.data(),
                           .rescale = rescale,
                           .noise = noise ? noise->data() : nullptr,
                           .wide = wide.mutable_data(),
                           .out = out.mutable_data()};
  if (task.moment_rule < 0 && task.column_rule < 0) {
    throw std::invalid_argument("rule: there is no " + rule);
  }
  run(stream, task);
}

// Runs a body on columns behind `skipped` others, which are not there.
template <typename Body>
void run_behind(int64_t skipped, int64_t columns, int64_t columns_per_block, const Body& body) {
  const int64_t first = skipped / columns_per_block;
  const int64_t blocks = (skipped + columns + columns_per_block - 1) / columns_per_block;
  for (int64_t block = first; block < blocks; ++block) {
    for (int thread = 0; thread < Body::kThreads; ++thread)
      body(ThreadIndex{block, blocks, thread});
  }
}

// Runs a rule of each kind of body on float32 gradients in columns behind `skipped` others, a
// multiple of the columns of a block.
void aggregate_behind(const py::array_t<float>& grads, const std::string& rule, int64_t skipped,
                      py::array_t<float> out) {
  const int64_t environments = grads.shape(0);
  const int64_t columns = grads.shape(1);
  const ColumnGrads task{grads.data() - skipped, environments,
                         grads.strides(0) / static_cast<int64_t>(sizeof(float)), skipped + columns,
                         false};
  float* const to = out.mutable_data() - skipped;
  const auto run = [&](int64_t columns_per_block, const auto& body) {
    run_behind(skipped, columns, columns_per_block, body);
  };
  if (rule == "mean") {
    using Body = MomentRuleBody<float, 0>;
    const double none[kMostArguments] = {};
    run(Body::kThreads * Body::kWidth,
        Body{task, RuleCall({none, environments}, 0, 0), to, nullptr});
  } else if (rule == "sign_dropout") {
    using Body = TermRuleBody<float, SignDropout>;
    run(Body::kThreads * Body::kWidth,
        Body{task, SignDropout(nullptr, environments), grads.data() - skipped, to, nullptr});
  } else if (environments <= kSorted) {
    using Body = SortBody<float, kSorted>;
    const Median median(nullptr, environments);
    Body body{task, {}, static_cast<float>(median.total()), to};
    for (int64_t rank = 0; rank < environments; ++rank) {
      body.weights[rank] = static_cast<float>(median.weight(rank));
    }
    run(Body::kThreads, body);
  } else {
    using Body = SelectBody<float>;
    const Median median(nullptr, environments);
    run(Body::kThreads, Body{task, {median.first, median.last, {}, median.total()}, to});
  }
}

}  // namespace

ANDMASK_BINDINGS(m) {
  m.def("cuda_aggregate", &aggregate_stacked, py::arg("grads"), py::arg("rule"),
        py::arg("arguments"), py::arg("rescale"), py::arg("noise"), py::arg("wide"), py::arg("out"),
        py::arg("multiprocessors") = 2);
  m.def("cuda_aggregate_behind", &aggregate_behind, py::arg("grads"), py::arg("rule"),
        py::arg("skipped"), py::arg("out").noconvert());
}

}  // namespace andmask
