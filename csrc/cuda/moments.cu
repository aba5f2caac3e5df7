#include "kernels/moments.h"

#include <algorithm>

#include "launchers.h"
#include "lists.h"
#include "types.h"

namespace andmask {
namespace {

// Weights that are all the same travel with the kernel.
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

void launch_accumulate(const Stream& stream, const AccumulateList& list) {
  if (list.tasks.empty()) return;
  const AccumulateTask& first = list.tasks[0];  // rows, weights and count are those of all
  const Weights weights = device_weights(stream, first.weights, first.rows);
  for (int kind = 0; kind < kDtypes; ++kind) {
    with_type(static_cast<Dtype>(kind), [&](auto type) {
      using T = typename decltype(type)::type;
      constexpr int width = AccumulateBody<T>::kWidth;
      std::vector<AccumulateItem> items;
      for (size_t i = 0; i < list.tasks.size(); ++i) {
        const AccumulateTask& task = list.tasks[i];
        if (static_cast<int>(list.dtypes[i]) != kind || list.sizes[i] == 0) continue;
        const bool packed = packs(task.grads, width, sizeof(T)) &&
                            (task.rows == 1 || task.stride % width == 0) &&
                            packs(task.moments, width, sizeof(accumulate_t<T>));
        items.push_back({task.grads, task.stride, task.moments, list.sizes[i], packed});
      }
      for_lists(items, [&](const List<AccumulateItem>& some) {
        launch(stream, some.chunks(),
               AccumulateBody<T>{some, first.rows, first.count, weights.all, weights.each});
      });
    });
  }
}

}  // namespace andmask
