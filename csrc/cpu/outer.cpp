// Moments of weight gradients W_e = sum of d_r a_r^T over the rows of environment e: the choice of
// an algorithm.
#include <algorithm>

#include "device.h"
#include "outer/sign_outer.h"
#include "outer/tiles.h"
#include "units.h"

namespace andmask {
namespace {

// Times in units of torch.mm(grad_outputs.t(), activations), of 1024 inputs and outputs, one thread
// of an EPYC (Zen 5), x86-64-v4:
//
//   rows in all                              32    128    512
//   signs, 1 row per environment           1.12   0.75   0.63
//   tiles, 1 row per environment           2.20   2.12   1.98
//   tiles, 2                               1.71   1.14   1.17
//   tiles, 4                               1.52   0.91   0.83
//   tiles, 16                              1.46   0.81   0.62
//
// So signs are used wherever they can be. torch.mm, one environment after the other, costs 1 for
// the products alone, and much more for small environments.
auto choose_path(const OuterTask& task) {
  const bool signs = has_single_rows(task) && !task.moments.squares && !task.moments.logs;
  return signs ? accumulate_sign_outer : accumulate_outer_tiles;
}

}  // namespace

void run(const Cpu&, const OuterTask& task) {
  const int64_t rows = task.offsets[task.environments] * task.activations.rows();
  const int64_t elements = task.groups * task.grad_outputs.channels * task.activations.channels *
                           task.activations.taps();
  const int64_t threads = std::clamp<int64_t>(elements * std::max<int64_t>(1, rows / 4) / kGrain, 1,
                                              torch::stable::get_num_threads());
  const auto parallel_for = [](int64_t count, const std::function<void(int64_t)>& body) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  };
  choose_path(task)(task, active_isa(), threads, parallel_for);
}

}  // namespace andmask
