// Rules on ranked values: columns are sorted by networks of comparators over rows.
//
// Up to kRun rows are sorted in registers. More are sorted in runs, in a tile of a few columns that
// is then merged in L1.
#pragma once

#include <stdlib.h>

#include "../../math/sorting.h"
#include "columns.h"
#include "load.h"

namespace andmask {
namespace {

// Runs of rows are sorted in registers. Rows that a run lacks are filled with the largest number,
// which sorts last and has no weight.
constexpr int64_t kUnit = 4;
// Columns that are sorted together: of a single run, and of a tile, which is merged in L1.
constexpr int64_t kChunk = 128;
constexpr int64_t kTile = 32;
// Tiles that are filled together take this much memory, so that a row is read in long pieces.
constexpr int64_t kTilesBytes = 128 * 1024;
constexpr int64_t kMostTiles = 16;

// The rows of one run, widened. If the gradients cannot be read in place, they are copied.
template <typename F>
struct Run {
  static constexpr int64_t kCopied = 256 / sizeof(F);  // columns
  const F* rows[kRun];
  alignas(64) F missing[kChunk];
  alignas(64) F copy[kRun * kCopied] = {};

  Run() {
    for (int64_t i = 0; i < kChunk; ++i) missing[i] = largest(F());
  }

  // Loads at most kCopied columns, or kChunk if they are read in place.
  template <bool in_place, typename T>
  void load(const T* grads, int64_t count, int64_t stride, int64_t columns) {
    for (int64_t row = 0; row < kRun; ++row) {
      if (row >= count) {
        rows[row] = missing;
      } else if constexpr (in_place) {
        rows[row] = grads + row * stride;
      } else {
        F* const to = copy + row * kCopied;
        if constexpr (sizeof(T) == sizeof(F)) {
          for (int64_t column = 0; column < columns; ++column)
            to[column] = grads[row * stride + column];
        } else {
          widen_columns(grads + row * stride, columns, to);
        }
        rows[row] = to;
      }
    }
  }
};

// values = the weighted sum of sorted rows / total. A weight of 0 does not hide infinities: they
// become NaN.
template <int count, typename F>
void weigh_run(const F* const* rows, int64_t columns, const double* weights, double total,
               double* __restrict values) {
  const F* row[count];
  F weight[count];
  for (int i = 0; i < count; ++i) {
    row[i] = rows[i];
    weight[i] = static_cast<F>(weights[i]);
  }
  const F divisor = static_cast<F>(total);
#pragma GCC ivdep
  for (int64_t column = 0; column < columns; ++column) {
    F value[count];
#pragma GCC unroll 32
    for (int i = 0; i < count; ++i) value[i] = row[i][column];
    SortingNetwork<count>::sort(value);
    F sum = 0;
#pragma GCC unroll 32
    for (int i = 0; i < count; ++i) sum += weight[i] * value[i];
    values[column] = static_cast<double>(sum / divisor);
  }
}

template <typename F>
void weigh_run(int64_t count, const F* const* rows, int64_t columns, const double* weights,
               double total, double* values) {
  static_assert(kRun == 32 && kUnit == 4);
  switch ((count + kUnit - 1) / kUnit) {
    case 1: return weigh_run<4>(rows, columns, weights, total, values);
    case 2: return weigh_run<8>(rows, columns, weights, total, values);
    case 3: return weigh_run<12>(rows, columns, weights, total, values);
    case 4: return weigh_run<16>(rows, columns, weights, total, values);
    case 5: return weigh_run<20>(rows, columns, weights, total, values);
    case 6: return weigh_run<24>(rows, columns, weights, total, values);
    case 7: return weigh_run<28>(rows, columns, weights, total, values);
    default: return weigh_run<32>(rows, columns, weights, total, values);
  }
}

template <typename T>
void store(const double* __restrict values, int64_t columns, T* __restrict out) {
  for (int64_t column = 0; column < columns; ++column) {
    out[column] = Rounder<T>::from(values[column]);
  }
}

template <typename T>
void rank_one_run(const ColumnTask& task, int64_t begin, int64_t end) {
  using F = accumulate_t<T>;
  constexpr bool in_place = sizeof(T) == sizeof(F);
  constexpr int64_t chunk = in_place ? kChunk : Run<F>::kCopied;
  Run<F> run;
  alignas(64) double values[chunk];
  for (int64_t first = begin; first < end; first += chunk) {
    const int64_t columns = end - first < chunk ? end - first : chunk;
    run.template load<in_place>(static_cast<const T*>(task.grads) + first, task.environments,
                                task.stride, columns);
    weigh_run(task.environments, run.rows, columns, task.weights, task.total, values);
    store(values, columns, static_cast<T*>(task.out) + first);
  }
}

// Sorts one tile of a run. `poison` stays 0, or becomes NaN if any value is not finite.
template <typename F>
void sort_run(const F* const* rows, F* __restrict tile, F* __restrict poison) {
  constexpr int count = kRun;
  const F* row[count];
  for (int i = 0; i < count; ++i) row[i] = rows[i];
#pragma GCC ivdep
  for (int64_t lane = 0; lane < kTile; ++lane) {
    F value[count];
    F zero = 0;
#pragma GCC unroll 32
    for (int i = 0; i < count; ++i) {
      value[i] = row[i][lane];
      zero += value[i] * F(0);
    }
    SortingNetwork<count>::sort(value);
#pragma GCC unroll 32
    for (int i = 0; i < count; ++i) tile[i * kTile + lane] = value[i];
    poison[lane] += zero;
  }
}

// Adding 0 keeps compilers from branches that store only changed values. It costs nothing beside
// the stores.
template <typename F>
ANDMASK_INLINE void exchange_rows(F* __restrict low, F* __restrict high) {
  for (int64_t lane = 0; lane < kTile; ++lane) {
    F smaller = low[lane];
    F larger = high[lane];
    exchange(smaller, larger);
    low[lane] = smaller + F(0);
    high[lane] = larger + F(0);
  }
}

template <typename F>
void merge_runs(const ColumnTask& task, F* tile) {
  if (task.comparators) {
    for (int64_t index = 0; index < task.comparator_count; ++index) {
      const Comparator comparator = task.comparators[index];
      exchange_rows(tile + comparator.low * kTile, tile + comparator.high * kTile);
    }
  } else {
    for_comparators(task.environments, kRun, [tile](int64_t low, int64_t high) {
      exchange_rows(tile + low * kTile, tile + high * kTile);
    });
  }
}

// Sums four rows at a time in the type of the gradients, and these sums in float64.
template <typename F>
void weigh_tile(const ColumnTask& task, const F* __restrict tile, const F* __restrict poison,
                double* __restrict values) {
  alignas(64) double sums[kTile];
  for (int64_t lane = 0; lane < kTile; ++lane) sums[lane] = static_cast<double>(poison[lane]);
  for (int64_t row = 0; row < task.environments; row += kUnit) {
    F weight[kUnit];
    for (int64_t i = 0; i < kUnit; ++i) weight[i] = static_cast<F>(task.weights[row + i]);
    if (weight[0] == 0 && weight[1] == 0 && weight[2] == 0 && weight[3] == 0) continue;
    const F* const unit = tile + row * kTile;
    for (int64_t lane = 0; lane < kTile; ++lane) {
      const F sum = (weight[0] * unit[lane] + weight[1] * unit[kTile + lane]) +
                    (weight[2] * unit[2 * kTile + lane] + weight[3] * unit[3 * kTile + lane]);
      sums[lane] += static_cast<double>(sum);
    }
  }
  for (int64_t lane = 0; lane < kTile; ++lane) values[lane] = sums[lane] / task.total;
}

template <typename T>
bool rank_many_runs(const ColumnTask& task, int64_t begin, int64_t end) {
  using F = accumulate_t<T>;
  constexpr bool narrow = sizeof(T) != sizeof(F);
  const int64_t tile_size = (task.environments + kRun - 1) / kRun * kRun * kTile;
  int64_t tiles = kTilesBytes / (tile_size * static_cast<int64_t>(sizeof(F)));
  tiles = tiles < 1 ? 1 : tiles > kMostTiles ? kMostTiles : tiles;
  F* const scratch = static_cast<F*>(aligned_alloc(64, sizeof(F) * tiles * tile_size));
  if (!scratch) return false;
  alignas(64) F poison[kMostTiles * kTile];
  alignas(64) double values[kTile];
  Run<F> run;
  for (int64_t first = begin; first < end; first += tiles * kTile) {
    const int64_t columns = end - first < tiles * kTile ? end - first : tiles * kTile;
    for (int64_t lane = 0; lane < tiles * kTile; ++lane) poison[lane] = 0;
    for (int64_t row = 0; row < task.environments; row += kRun) {
      const int64_t count = task.environments - row < kRun ? task.environments - row : kRun;
      const T* const grads = static_cast<const T*>(task.grads) + row * task.stride + first;
      F* tile = scratch + row * kTile;
      for (int64_t column = 0; column < columns; column += kTile, tile += tile_size) {
        if (columns - column < kTile) {
          run.template load<false>(grads + column, count, task.stride, columns - column);
        } else {
          run.template load<!narrow>(grads + column, count, task.stride, kTile);
        }
        sort_run(run.rows, tile, poison + column);
      }
    }
    F* tile = scratch;
    for (int64_t column = 0; column < columns; column += kTile, tile += tile_size) {
      const int64_t rest = columns - column;
      merge_runs(task, tile);
      weigh_tile(task, tile, poison + column, values);
      store(values, rest < kTile ? rest : kTile, static_cast<T*>(task.out) + first + column);
    }
  }
  free(scratch);
  return true;
}

}  // namespace
}  // namespace andmask
