// Kernel body of accumulate_, for a table of tensors. Environments are added one after the other,
// as on the CPU, so that moments have the same bits.
#pragma once

#include "../../math/rules.h"
#include "../../tasks/moments.h"
#include "kernel_table.h"

namespace andmask {

struct AccumulateItem {
  const void* grads;
  int64_t stride;
  MomentArrays moments;
  int64_t size;
  bool packed;
};

// The moments of `width` coordinates, and the environments that join them.
template <typename F, int width>
struct MomentsOf {
  F sum[width] = {};
  F squares[width] = {};
  F logs[width] = {};
  int32_t votes[width] = {};
  int32_t voters[width] = {};

  template <typename At>
  ANDMASK_METHOD void read(const At& at, const MomentArrays& moments) {
    const auto copy = [&](const void* from, F* to) {
      if (!from) return;
      const Pack<F, width> pack = at.template get<F>(static_cast<const F*>(from));
#pragma unroll
      for (int i = 0; i < width; ++i) to[i] = pack[i];
    };
    copy(moments.sum, sum);
    copy(moments.squares, squares);
    copy(moments.logs, logs);
    if (moments.votes) get_votes<width>(at, moments.votes, moments.vote_bytes, votes);
    if (moments.voters) get_votes<width>(at, moments.voters, moments.vote_bytes, voters);
  }

  template <typename At>
  ANDMASK_METHOD void write(const At& at, const MomentArrays& moments) const {
    const auto copy = [&](const F* from, void* to) {
      if (!to) return;
      Pack<F, width> pack;
#pragma unroll
      for (int i = 0; i < width; ++i) pack[i] = from[i];
      at.put(static_cast<F*>(to), pack);
    };
    copy(sum, moments.sum);
    copy(squares, moments.squares);
    copy(logs, moments.logs);
    if (moments.votes) put_votes<width>(at, votes, moments.vote_bytes, moments.votes);
    if (moments.voters) put_votes<width>(at, voters, moments.vote_bytes, moments.voters);
  }

  // Adds one environment after `count` others.
  template <typename T>
  ANDMASK_METHOD void add(const Pack<T, width>& grads, const MomentArrays& moments, int64_t count,
                          F weight) {
    F wide[width];
#pragma unroll
    for (int i = 0; i < width; ++i) {
      wide[i] = widen(grads[i]);
      const int32_t vote = static_cast<int32_t>(sign(wide[i]));  // before the weight
      votes[i] += vote;
      voters[i] += vote * vote;
    }
    if (weight != 1) {
#pragma unroll
      for (int i = 0; i < width; ++i) wide[i] *= weight;
    }
    if (moments.squares && count > 0) {  // the squares of one environment are 0
      const F before = static_cast<F>(count);
      const F share = static_cast<F>(static_cast<double>(count) / static_cast<double>(count + 1));
#pragma unroll
      for (int i = 0; i < width; ++i) {
        squares[i] = add_square(squares[i], sum[i], before, share, wide[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < width; ++i) sum[i] = count == 0 ? wide[i] : sum[i] + wide[i];
    if (moments.logs) {
#pragma unroll
      for (int i = 0; i < width; ++i) {
        const F log = log_magnitude(wide[i]);
        logs[i] = count == 0 ? log : logs[i] + log;
      }
    }
  }
};

template <typename T>
struct AccumulateBody {
  static constexpr int kThreads = kTableThreads;
  using F = accumulate_t<T>;
  static constexpr int kWidth = kPackSize<T>;
  static constexpr int kMinBlocks = kWidth == 4 ? 3 : 2;
  // Environments whose gradients are in flight at once. With more there is room for fewer threads.
  static constexpr int kInFlight = kWidth > 4 ? 3 : 4;

  KernelTable<AccumulateItem> table;
  int64_t rows;           // environments, the same for all tensors
  int64_t count;          // before
  double weight;          // of every environment if `weights` is null
  const double* weights;  // [rows]

  template <typename At>
  ANDMASK_METHOD void add(const AccumulateItem& item, const At& at) const {
    const T* const grads = static_cast<const T*>(item.grads);
    Pack<T, kWidth> packs[kInFlight];
    const auto get = [&](int64_t row) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (row + i < rows) packs[i] = at.template get<T>(grads + (row + i) * item.stride);
      }
    };
    // Gradients are loaded before the moments, whose votes a thread has to wait for.
    get(0);
    MomentsOf<F, kWidth> moments;
    if (count > 0) moments.read(at, item.moments);
#pragma unroll 1
    for (int64_t row = 0; row < rows; row += kInFlight) {
      if (row > 0) get(row);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        if (row + i < rows) {
          const double row_weight = weights ? weights[row + i] : weight;
          moments.add(packs[i], item.moments, count + row + i, static_cast<F>(row_weight));
        }
      }
    }
    moments.write(at, item.moments);
  }

  ANDMASK_METHOD void operator()(const ThreadIndex& index) const {
    const int64_t chunk = table.first_chunk[0] + index.block;
    const int64_t entry = table.item_of(chunk);
    const AccumulateItem& item = table.items[entry];
    for_tiles<kWidth>(
        item, chunk - table.first_chunk[entry], index.thread,
        [&](const Tile<kWidth>& tile) { tile.at([&](const auto& at) { add(item, at); }); });
  }
};

}  // namespace andmask
