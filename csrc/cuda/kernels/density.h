// The factor of `rescale` and other sums, without asking the host.
#pragma once

#include "../../math/agreement.h"
#include "thread.h"

namespace andmask {

// A thread's share of the sums that blocks have stored, in a fixed order.
ANDMASK_INLINE double sum_of_parts(const double* parts, int64_t count, int thread, int threads) {
  double sum = 0;
  for (int64_t i = thread; i < count; i += threads) sum += parts[i];
  return sum;
}

// Adds up the parts of all tensors, in one block.
struct TotalBody {
  static constexpr int kThreads = 256;
  using Total = double;

  const double* parts;
  int64_t count;
  double* out;

  ANDMASK_METHOD double operator()(const ThreadIndex& index) const {
    return sum_of_parts(parts, count, index.thread, kThreads);
  }

  ANDMASK_METHOD void finish(int64_t, double total) const { *out = total; }
};

// Computes the factor of one tensor, in one block.
struct DensityBody {
  static constexpr int kThreads = 256;
  using Total = double;

  const double* parts;
  int64_t count;
  double columns;
  double* factor;

  ANDMASK_METHOD double operator()(const ThreadIndex& index) const {
    return sum_of_parts(parts, count, index.thread, kThreads);
  }

  ANDMASK_METHOD void finish(int64_t, double total) const {
    *factor = inverse_density(total, columns);
  }
};

}  // namespace andmask
