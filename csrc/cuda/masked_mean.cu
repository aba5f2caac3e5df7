#include "kernels/masked_mean.h"

#include "kernels/density.h"
#include "launch.h"
#include "types.h"

namespace andmask {
namespace {

// True if columns can be moved 16 bytes at a time, because the packs of every row are aligned.
template <typename T>
bool in_packs(const MaskedMeanTask& task) {
  constexpr int64_t size = kPackSize<T>;
  return task.columns >= size && task.stride % size == 0 &&
         aligned_for(task.grads, size, sizeof(T)) &&
         aligned_for(task.out, size, kVectorBytes / size);
}

template <typename T, int width>
void reduce(const Stream& stream, const MaskedMeanTask& task, double** kept, int64_t* blocks) {
  using Whole = MaskedMeanBody<T, width>;
  using Groups = GroupSumsBody<T, width>;
  const int64_t items = pack_items(task.columns, width);
  const int64_t groups = sum_groups(task.environments);
  const bool split = groups > 1 && items < stream.multiprocessors * Whole::kThreads;
  *blocks = blocks_for(stream, split ? task.columns : items, Whole::kThreads);
  if (kept) *kept = stream.scratch<double>(*blocks);
  double* const parts = kept ? *kept : nullptr;
  if (!split) return launch(stream, *blocks, Whole{task, parts});
  auto* const sums = stream.scratch<accumulate_t<T>>(groups * task.columns);
  auto* const votes = stream.scratch<int8_t>(groups * task.columns);
  const int64_t per_group = blocks_for(stream, items, Groups::kThreads);
  launch(stream, groups * per_group, Groups{task, per_group, sums, votes});
  launch(stream, *blocks, JoinGroupsBody<T>{task, sums, votes, parts});
}

template <typename T>
void scale(const Stream& stream, const void* wide, const double* factor, void* out,
           int64_t columns) {
  constexpr int size = kPackSize<T>;
  const bool packed =
      aligned_for(wide, size, sizeof(accumulate_t<T>)) && aligned_for(out, size, sizeof(T));
  const int64_t blocks = blocks_for(stream, packed ? pack_items(columns, size) : columns, 256);
  if (packed) {
    launch(stream, blocks, ScaleBody<T, size>{wide, factor, out, columns});
  } else {
    launch(stream, blocks, ScaleBody<T, 1>{wide, factor, out, columns});
  }
}

}  // namespace

void run(const Stream& stream, const MaskedMeanTask& task) {
  with_type(task.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    double* kept = nullptr;
    int64_t blocks = 0;
    double** const wanted = task.scaled ? &kept : nullptr;
    if (in_packs<T>(task)) {
      reduce<T, kPackSize<T>>(stream, task, wanted, &blocks);
    } else {
      reduce<T, 1>(stream, task, wanted, &blocks);
    }
    if (!task.scaled) return;
    double* const factor = stream.scratch<double>(1);
    launch(stream, 1, DensityBody{kept, blocks, static_cast<double>(task.columns), factor});
    if (task.output == Output::mask) {
      scale<accumulate_t<T>>(stream, task.out, factor, task.scaled, task.columns);
    } else {
      scale<T>(stream, task.out, factor, task.scaled, task.columns);
    }
  });
}

}  // namespace andmask
