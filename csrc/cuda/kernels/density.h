// The factor of `rescale`, without asking the host.
#pragma once

#include "../../math/agreement.h"
#include "thread.h"

namespace andmask {

// The sums that blocks left, added by one block in a fixed order.
struct DensityBody {
  static constexpr int kThreads = 256;
  using Total = double;

  const double* parts;
  int64_t count;
  double columns;
  double* factor;

  ANDMASK_METHOD double operator()(const Place& place) const {
    double sum = 0;
    for (int64_t i = place.thread; i < count; i += kThreads) sum += parts[i];
    return sum;
  }

  ANDMASK_METHOD void finish(int64_t, double total) const {
    *factor = inverse_density(total, columns);
  }
};

}  // namespace andmask
