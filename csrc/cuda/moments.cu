#include "kernels/moments.h"

#include <algorithm>

#include "fill_tables.h"
#include "types.h"

namespace andmask {
namespace {

// A single weight is an argument of the kernel.
struct Weights {
  double all = 1;
  const double* each = nullptr;
};

Weights device_weights(const Stream& stream, const double* weights, int64_t rows) {
  if (!weights) return {};
  if (std::all_of(weights, weights + rows, [&](double weight) { return weight == weights[0]; })) {
    return {weights[0], nullptr};
  }
  return {1, upload(stream, weights, rows)};
}

}  // namespace

void run(const Stream& stream, const std::vector<AccumulateTask>& tasks) {
  if (tasks.empty()) return;
  const AccumulateTask& first = tasks[0];
  const Weights weights = device_weights(stream, first.weights, first.rows);
  for (int kind = 0; kind < kDtypes; ++kind) {
    with_type(static_cast<Dtype>(kind), [&](auto type) {
      using T = typename decltype(type)::type;
      constexpr int width = AccumulateBody<T>::kWidth;
      std::vector<AccumulateItem> items;
      for (const AccumulateTask& task : tasks) {
        if (static_cast<int>(task.dtype) != kind || task.columns == 0) continue;
        const bool packed = packs(task.grads, width, sizeof(T)) &&
                            (task.rows == 1 || task.stride % width == 0) &&
                            packs(task.moments, width, sizeof(accumulate_t<T>));
        items.push_back({task.grads, task.stride, task.moments, task.columns, packed});
      }
      for_tables(items, [&](const KernelTable<AccumulateItem>& table) {
        launch(stream, table.chunks(),
               AccumulateBody<T>{table, first.rows, first.count, weights.all, weights.each});
      });
    });
  }
}

}  // namespace andmask
