#include "masked_mean.h"

#include <stdlib.h>

#include "../../math/agreement.h"
#include "load.h"
#include "vote_bins.h"

namespace andmask {
namespace {

// The number of rows that are read side by side. A core reads memory at its full rate only while
// its prefetchers run, and they need few streams of many pages each. So the loop takes few rows,
// over long blocks whose sums stay in L2. Prefetch instructions bridge the time in which the
// prefetchers find a new stream: the processor itself does not look far enough ahead.
constexpr int kRows = kSumRows;
constexpr int64_t kBlock = 16384;
constexpr int64_t kAheadBytes = 8192;  // of all these rows; 4 KB and 16 KB are slower
constexpr int64_t kLineBytes = 64;
// The block for at most kRows rows: each is one stream whatever the block, and a small one stays in
// L1. It also fits on the stack of any thread.
constexpr int64_t kSmallBlock = 512;
// Columns of the innermost loops: whole vectors of every type.
constexpr int64_t kChunk = 32;

// The grouping by kRows and kGroup is part of the result.
constexpr int64_t kGroup = kSumGroup;
static_assert(kGroup % kRows == 0 && kGroup <= INT8_MAX, "the votes of a group are int8");

// The scratch of one block, carved out of one piece of memory, [width] each.
template <typename T>
struct Block {
  double* total_sums;     // of all groups, where there are several
  accumulate_t<T>* sums;  // of one group
  int32_t* total_votes;
  int8_t* votes;

  static constexpr int64_t kBytesPerColumn =
      sizeof(double) + sizeof(accumulate_t<T>) + sizeof(int32_t) + sizeof(int8_t);

  ANDMASK_INLINE Block carve(void* memory, int64_t width) {
    Block block;
    block.total_sums = static_cast<double*>(memory);
    block.sums = reinterpret_cast<accumulate_t<T>*>(block.total_sums + width);
    block.total_votes = reinterpret_cast<int32_t*>(block.sums + width);
    block.votes = reinterpret_cast<int8_t*>(block.total_votes + width);
    return block;
  }
};

template <typename T>
constexpr bool kIsHalf = false;
template <>
constexpr bool kIsHalf<Half> = true;

// Adds rows to at most kChunk columns. With `first`, their sums and votes start from zero.
template <int rows, bool first, typename T>
ANDMASK_INLINE void add_columns(const T* __restrict grads, int64_t stride, int64_t columns,
                                accumulate_t<T>* __restrict sums, int8_t* __restrict votes) {
  [[maybe_unused]] float wide[rows][kChunk];
  if constexpr (kIsHalf<T>) {
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) widen_columns(grads + row * stride, columns, wide[row]);
  }
  using Vote = decltype(sign(T()));
  Vote chunk_votes[kChunk];  // narrowed in a loop of their own: else both loops get narrow vectors
  for (int64_t column = 0; column < columns; ++column) {
    accumulate_t<T> sum = 0;
    Vote vote = 0;
#pragma GCC unroll 4
    for (int row = 0; row < rows; ++row) {
      const T grad = grads[row * stride + column];
      if constexpr (kIsHalf<T>) {
        sum += wide[row][column];
      } else {
        sum += widen(grad);
      }
      vote = static_cast<Vote>(vote + sign(grad));
    }
    sums[column] = first ? sum : sums[column] + sum;
    chunk_votes[column] = vote;
  }
  for (int64_t column = 0; column < columns; ++column) {
    votes[column] = static_cast<int8_t>((first ? 0 : votes[column]) + chunk_votes[column]);
  }
}

// `next` is where the next call will read. A prefetch outside of the gradients does no harm, but a
// pointer there would be undefined, so that addresses are computed as integers.
template <int rows, bool first, typename T>
void add_rows(const T* grads, const T* next, int64_t stride, int64_t columns,
              accumulate_t<T>* __restrict sums, int8_t* __restrict votes) {
  constexpr int64_t kLine = kLineBytes / sizeof(T);
  constexpr int64_t kAhead = kAheadBytes / rows / sizeof(T);
  int64_t column = 0;
  for (; column + kChunk <= columns; column += kChunk) {
    const int64_t ahead = column + kAhead;
    const auto soon = ahead < columns
                          ? reinterpret_cast<uintptr_t>(grads) + sizeof(T) * ahead
                          : reinterpret_cast<uintptr_t>(next) + sizeof(T) * (ahead - columns);
#pragma GCC unroll 8
    for (int64_t line = 0; line < kChunk; line += kLine) {
#pragma GCC unroll 4
      for (int row = 0; row < rows; ++row) {
        __builtin_prefetch(reinterpret_cast<const void*>(soon + sizeof(T) * (row * stride + line)));
      }
    }
    add_columns<rows, first>(grads + column, stride, kChunk, sums + column, votes + column);
  }
  add_columns<rows, first>(grads + column, stride, columns - column, sums + column, votes + column);
}

template <bool first, typename T>
void add_rows(int64_t rows, const T* grads, const T* next, int64_t stride, int64_t columns,
              accumulate_t<T>* sums, int8_t* votes) {
  switch (rows) {
    case 1: return add_rows<1, first>(grads, next, stride, columns, sums, votes);
    case 2: return add_rows<2, first>(grads, next, stride, columns, sums, votes);
    case 3: return add_rows<3, first>(grads, next, stride, columns, sums, votes);
    default: return add_rows<kRows, first>(grads, next, stride, columns, sums, votes);
  }
}

template <typename T>
void add_group(const T* grads, const T* next, int64_t rows, int64_t stride, int64_t columns,
               Block<T>& block) {
  for (int64_t row = 0; row < rows; row += kRows) {
    const int64_t rest = rows - row;
    const T* const here = grads + row * stride;
    const T* const then = rest > kRows ? here + kRows * stride : next;
    if (row == 0) {
      add_rows<true>(rest, here, then, stride, columns, block.sums, block.votes);
    } else {
      add_rows<false>(rest, here, then, stride, columns, block.sums, block.votes);
    }
  }
}

template <typename T>
void add_to_totals(Block<T>& block, int64_t columns, bool first) {
  if (first) {
    for (int64_t column = 0; column < columns; ++column) {
      block.total_sums[column] = static_cast<double>(block.sums[column]);
      block.total_votes[column] = block.votes[column];
    }
  } else {
    for (int64_t column = 0; column < columns; ++column) {
      block.total_sums[column] += static_cast<double>(block.sums[column]);
      block.total_votes[column] += block.votes[column];
    }
  }
}

template <typename Sum, typename Votes, typename Out>
int64_t write(const Sum* __restrict sums, const Votes* __restrict votes, int64_t columns,
              int64_t environments, int32_t threshold, Out* __restrict out) {
  const double count = static_cast<double>(environments);
  const double inverse = 1.0 / count;
  int32_t kept = 0;  // of one block
  for (int64_t column = 0; column < columns; ++column) {
    const bool keep = agrees(votes[column], threshold);
    kept += keep;
    out[column] = masked_mean_of<Out>(static_cast<double>(sums[column]), count, inverse, keep);
  }
  return kept;
}

template <typename Votes, typename Out>
int64_t write_mask(const Votes* __restrict votes, int64_t columns, int32_t threshold,
                   Out* __restrict out) {
  int32_t kept = 0;
  for (int64_t column = 0; column < columns; ++column) {
    const bool keep = agrees(votes[column], threshold);
    kept += keep;
    out[column] = keep ? Out(1) : Out(0);
  }
  return kept;
}

template <typename T, typename Sum, typename Votes>
int64_t write(const MaskedMeanTask& task, const Sum* sums, const Votes* votes, int64_t first,
              int64_t columns) {
  using Wide = accumulate_t<T>;
  switch (task.output) {
    case Output::masked_mean:
      return write(sums, votes, columns, task.environments, task.threshold,
                   static_cast<T*>(task.out) + first);
    case Output::masked_mean_wide:
      return write(sums, votes, columns, task.environments, task.threshold,
                   static_cast<Wide*>(task.out) + first);
    case Output::mask:
      return write_mask(votes, columns, task.threshold, static_cast<Wide*>(task.out) + first);
    case Output::bins:
      add_to_bins(sums, votes, columns, task.environments, task.bin_lanes,
                  static_cast<VoteBin*>(task.out));
      break;
  }
  return 0;
}

template <typename T>
int64_t reduce(const MaskedMeanTask& task, int64_t begin, int64_t end) {
  const int64_t environments = task.environments;
  alignas(64) unsigned char small[kSmallBlock * Block<T>::kBytesPerColumn];
  void* large = nullptr;
  if (environments > kRows && end - begin > kSmallBlock) {
    large = aligned_alloc(64, kBlock * Block<T>::kBytesPerColumn);  // if it fails: slower
  }
  const int64_t width = large ? kBlock : kSmallBlock;
  Block<T> block = Block<T>::carve(large ? large : small, width);
  int64_t kept = 0;
  for (int64_t first = begin; first < end; first += width) {
    const int64_t columns = end - first < width ? end - first : width;
    const T* const top = static_cast<const T*>(task.grads) + first;
    for (int64_t row = 0; row < environments; row += kGroup) {
      const bool last = environments - row <= kGroup;
      const T* const grads = top + row * task.stride;
      const T* const next = last ? top + columns : grads + kGroup * task.stride;
      add_group(grads, next, last ? environments - row : kGroup, task.stride, columns, block);
      if (environments > kGroup) add_to_totals(block, columns, row == 0);
    }
    kept += environments > kGroup
                ? write<T>(task, block.total_sums, block.total_votes, first, columns)
                : write<T>(task, block.sums, block.votes, first, columns);
  }
  free(large);
  return kept;
}

template <typename T>
void scale(const void* wide, double factor, void* out, int64_t begin, int64_t end) {
  const auto* from = static_cast<const accumulate_t<T>*>(wide);
  auto* to = static_cast<T*>(out);
  for (int64_t column = begin; column < end; ++column) {
    to[column] = Rounder<T>::from(static_cast<double>(from[column]) * factor);
  }
}

}  // namespace

namespace ANDMASK_ISA {
extern const MaskedMeanKernels masked_mean_kernels = {
    {reduce<Half>, reduce<BFloat16>, reduce<float>, reduce<double>},
    {scale<Half>, scale<BFloat16>, scale<float>, scale<double>},
};
}  // namespace ANDMASK_ISA

}  // namespace andmask
