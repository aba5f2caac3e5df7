#include "tiles.h"

#include <algorithm>
#include <vector>

#include "worker.h"

namespace andmask {
namespace {

// A matrix of fewer tiles than this is too small to occupy the threads. They share environments
// instead.
constexpr int64_t kFewTiles = 8;

// The number of ranges of environments that are added up separately. It depends on the sizes only,
// not on the number of threads, because sums of sums round differently.
int64_t environment_parts(const OuterPlan& plan) {
  const int64_t tiles = plan.tiles();
  if (plan.general || tiles >= kFewTiles) return 1;
  const int64_t wanted = std::min(2 * kFewTiles / tiles, plan.work() / OuterPlan::kGrain);
  return std::max<int64_t>(1, std::min(wanted, plan.task.environments));
}

// Calls f(output, offset in `layout`, offset in `packed`) for every element of the moments.
template <typename F>
void for_elements(const OuterTask& task, const OuterLayout& packed, const F& f) {
  const WindowAxis* const axes = task.activations.axes;
  const auto offset = [](const OuterLayout& layout, int64_t output, int64_t channel, int64_t i,
                         int64_t j, int64_t k) {
    return output * layout.output_stride + channel * layout.channel_stride +
           i * layout.tap_strides[0] + j * layout.tap_strides[1] + k * layout.tap_strides[2];
  };
  for (int64_t output = 0; output < task.groups * task.grad_outputs.channels; ++output) {
    for (int64_t channel = 0; channel < task.activations.channels; ++channel) {
      for (int64_t i = 0; i < axes[0].taps; ++i) {
        for (int64_t j = 0; j < axes[1].taps; ++j) {
          for (int64_t k = 0; k < axes[2].taps; ++k) {
            f(offset(task.layout, output, channel, i, j, k),
              offset(packed, output, channel, i, j, k));
          }
        }
      }
    }
  }
}

template <typename T, typename From>
void add_part(const OuterTask& task, const OuterLayout& packed, const std::vector<From>& part,
              bool first, void* moment) {
  if (!moment) return;
  auto* const array = static_cast<T*>(moment);
  for_elements(task, packed, [&](int64_t to, int64_t from) {
    array[to] = static_cast<T>((first ? T(0) : array[to]) + static_cast<T>(part[from]));
  });
}

void add_votes(const OuterTask& task, const OuterLayout& packed, const std::vector<int32_t>& part,
               bool first) {
  switch (task.moments.vote_bytes) {
    case 1: return add_part<int8_t>(task, packed, part, first, task.moments.votes);
    case 2: return add_part<int16_t>(task, packed, part, first, task.moments.votes);
    default: return add_part<int32_t>(task, packed, part, first, task.moments.votes);
  }
}

// Adds every part to moments of its own, and then those in their order.
template <typename F>
void accumulate_in_parts(const OuterTask& task, Isa isa, int64_t parts,
                         const ParallelFor& parallel_for) {
  const WindowAxis* const axes = task.activations.axes;
  OuterLayout packed{task.activations.channels * task.activations.taps(),
                     task.activations.taps(),
                     {axes[1].taps * axes[2].taps, axes[2].taps, 1}};
  const int64_t size = task.groups * task.grad_outputs.channels * packed.output_stride;
  std::vector<std::vector<F>> sums(parts, std::vector<F>(size));
  std::vector<std::vector<int32_t>> votes(parts, std::vector<int32_t>(size));
  parallel_for(parts, [&](int64_t part) {
    const int64_t begin = task.environments * part / parts;
    OuterTask share = task;
    share.environments = task.environments * (part + 1) / parts - begin;
    share.offsets += begin;
    if (share.weights) share.weights += begin;
    share.count = 0;
    share.layout = packed;
    share.moments = {sums[part].data(), task.moments.votes ? votes[part].data() : nullptr,
                     sizeof(int32_t), nullptr, nullptr};
    const OuterPlan plan(share, isa, 1);
    for (int64_t i = 0; i < plan.parts(); ++i) run_outer_part(plan, i);
  });
  for (int64_t part = 0; part < parts; ++part) {
    const bool first = task.count == 0 && part == 0;
    add_part<F>(task, packed, sums[part], first, task.moments.sum);
    add_votes(task, packed, votes[part], first);
  }
}

}  // namespace

void accumulate_outer_tiles(const OuterTask& task, Isa isa, int64_t threads,
                            const ParallelFor& parallel_for) {
  if (task.grad_outputs.channels == 0 || task.activations.channels == 0) return;
  const OuterPlan plan(task, isa, threads);
  const int64_t parts = environment_parts(plan);
  if (parts > 1) {
    return task.activations.dtype == Dtype::float64
               ? accumulate_in_parts<double>(task, isa, parts, parallel_for)
               : accumulate_in_parts<float>(task, isa, parts, parallel_for);
  }
  parallel_for(plan.parts(), [&](int64_t part) { run_outer_part(plan, part); });
}

}  // namespace andmask
