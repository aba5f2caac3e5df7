// All ops for one device: a class with the members of `Cpu` (csrc/cpu/device.h), for which every
// task (csrc/tasks) has a `run`.
#pragma once

#include <torch/csrc/stable/library.h>

#include "aggregate.h"
#include "masked_mean.h"
#include "moments.h"
#include "outer.h"
#include "steps.h"
#include "vote_histogram.h"

namespace andmask {

template <typename Device, typename Library>
void implement(Library& m) {
  m.impl("masked_mean", TORCH_BOX(&masked_mean<Device>));
  m.impl("agreement_mask", TORCH_BOX(&agreement_mask<Device>));
  m.impl("_aggregate", TORCH_BOX(&aggregate<Device>));
  m.impl("_accumulate_", TORCH_BOX(&accumulate<Device>));
  m.impl("_accumulate_outer_", TORCH_BOX(&accumulate_outer<Device>));
  m.impl("_accumulate_convolution_", TORCH_BOX(&accumulate_convolution<Device>));
  m.impl("vote_histogram", TORCH_BOX(&vote_histogram<Device>));
  m.impl("_vote_histograms", TORCH_BOX(&vote_histograms<Device>));
  m.impl("_resolve", TORCH_BOX(&resolve<Device>));
  m.impl("_resolve_", TORCH_BOX(&resolve_in_place<Device>));
  m.impl("_vote_thresholds", TORCH_BOX(&vote_thresholds<Device>));
  m.impl("_squared_norm", TORCH_BOX(&squared_norm<Device>));
  m.impl("_sgd_step_", TORCH_BOX(&sgd_step<Device>));
  m.impl("_adam_step_", TORCH_BOX(&adam_step<Device>));
  m.impl("_temporal_adam_step_", TORCH_BOX(&temporal_adam_step<Device>));
}

}  // namespace andmask
