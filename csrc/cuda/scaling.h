// The second pass of `rescale`.
#pragma once

#include "kernels/masked_mean.h"
#include "launch.h"

namespace andmask {

// out = wide * factor. `wide` may be `out`.
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

}  // namespace andmask
