// The kernel body of _accumulate_outer_. A block adds up a tile of W_e, environment after
// environment. For an element it makes n multiply-adds and, at the end of its environment, one
// addition to the sum and about four operations for the vote. No W_e leaves the registers. A matrix
// product per environment would cost 8 bytes of traffic through scratch instead of these five
// operations.
#pragma once

#include "../kernels/moments.h"
#include "multipliers.h"

namespace andmask {

// A thread's elements of one operand that are in flight to a stage.
template <typename Multiplier>
struct OuterFetch {
  using T = typename Multiplier::Element;
  static constexpr int kGroup = Multiplier::kGroup;
  using Share = OuterShare<Multiplier::kThreads, Multiplier::kStage, kGroup>;
  static constexpr int kColumns = Share::kColumns;
  static constexpr int kPack = kPackSize<T> < kColumns ? kPackSize<T> : kColumns;

  // Elements stay in the words in which they were loaded: taking words apart would wait for them.
  static constexpr int kPacks = kColumns / kPack;
  static constexpr int kWords = kPack * static_cast<int>(sizeof(T)) / 4;
  static_assert(kWords > 0);

  OuterCursor cursor;  // the first row of the next fetch
  Pack<uint32_t, kWords> words[kGroup][kPacks];
  accumulate_t<T> factor;

  ANDMASK_METHOD void start(const OuterArguments& args, const OuterOperand& operand, int64_t row,
                            int thread) {
    cursor = OuterCursor::at(args.positions, row + Share(operand.reading, thread).stack * kGroup);
  }

  // Fetches rows [row, row + kStage) of columns [first, first + kOuterTile), with zeros beyond
  // `end` and beyond the operand. Rows of one example may be scaled.
  ANDMASK_METHOD void fetch(const OuterArguments& args, const OuterOperand& operand,
                            const OuterTable& table, const T* source, int64_t first, int64_t row,
                            int64_t end, const double* row_weights, int thread) {
    const Share share(operand.reading, thread);
    OuterCursor at = cursor;
    cursor.advance(args.positions, args.stage);
    factor = 1;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
#pragma unroll
      for (int j = 0; j < kPacks; ++j) words[i][j] = {};
      if (row + share.stack * kGroup + i >= end) continue;
      const int64_t example = args.order ? args.order[at.index] : at.index;
      if (row_weights) factor = static_cast<accumulate_t<T>>(row_weights[example]);
      const OuterRow<T> line(operand, source, example, at);
#pragma unroll
      for (int j = 0; j < kPacks; ++j) {
        if (operand.reading == OuterReading::packs) {
          const int column = share.pack(j, kPack);
          if (first + column >= operand.columns) continue;
          const T* const from = line.data + table.offsets[column];
          words[i][j] = load<kWords>(reinterpret_cast<const uint32_t*>(from));
        } else {
          Pack<T, kPack> pack{};
#pragma unroll
          for (int k = 0; k < kPack; ++k) {
            const int column = share.column(j * kPack + k);
            if (first + column < operand.columns && line.holds(operand, table, column)) {
              pack[k] = line.data[table.offsets[column]];
            }
          }
          memcpy(&words[i][j], &pack, sizeof pack);
        }
      }
      at.advance(args.positions);
    }
  }

  ANDMASK_METHOD void put(typename Multiplier::Stage& stage, const OuterOperand& operand,
                          int number, int thread) const {
    const Share share(operand.reading, thread);
    using Value = typename Multiplier::Value;
#pragma unroll
    for (int j = 0; j < kPacks; ++j) {
      T values[kGroup][kPack];
#pragma unroll
      for (int i = 0; i < kGroup; ++i) memcpy(values[i], &words[i][j], sizeof values[i]);
      if (operand.reading == OuterReading::packs) {
        Multiplier::template put<kPack>(stage, number, share.stack, share.pack(j, kPack), values,
                                        static_cast<Value>(factor));
      } else {
#pragma unroll
        for (int k = 0; k < kPack; ++k) {
          T column[kGroup][1];
#pragma unroll
          for (int i = 0; i < kGroup; ++i) column[i][0] = values[i][k];
          Multiplier::template put<1>(stage, number, share.stack, share.column(j * kPack + k),
                                      column, static_cast<Value>(factor));
        }
      }
    }
  }
};

// `extras`: squares or logs are wanted too. Then all moments are updated in memory at the end of
// every environment, as in _accumulate_, which is slower.
template <typename Multiplier_, bool extras>
struct OuterBody {
  using Multiplier = Multiplier_;
  using T = typename Multiplier::Element;
  using F = accumulate_t<T>;
  using Value = typename Multiplier::Value;
  static constexpr int kThreads = Multiplier::kThreads;
  static constexpr int kValues = Multiplier::kValues;
  static constexpr int kStage = Multiplier::kStage;
  static constexpr bool kSigns = Multiplier::kSigns;
  static constexpr bool kKeeps = !extras && !kSigns;  // sums and votes in registers

  struct Shared {
    typename Multiplier::Stage stages[2];
    OuterTable tables[2];
  };

  struct State {
    typename Multiplier::State tile;
    OuterFetch<Multiplier> fetches[2];
    F sums[kKeeps ? kValues : 1];
    int32_t votes[kKeeps ? kValues : 1];
  };

  OuterArguments args;

  // The part of W that a block adds up.
  struct Tile {
    int64_t split, group, output, column;  // the first of each

    ANDMASK_METHOD Tile(const OuterArguments& args, int64_t block) {
      column = block % args.column_tiles * kOuterTile;
      block /= args.column_tiles;
      output = block % args.row_tiles * kOuterTile;
      block /= args.row_tiles;
      group = block % args.groups;
      split = block / args.groups;
    }
  };

  template <typename Threads>
  ANDMASK_METHOD void operator()(Threads& threads, Shared& shared, const ThreadIndex& index) const {
    const Tile tile(args, index.block);
    const int64_t count = args.environments.count;
    int64_t environment = count * tile.split / args.splits;
    const int64_t last = count * (tile.split + 1) / args.splits;
    int64_t row = args.environments.begin(environment) * args.example_rows;
    const int64_t end = args.environments.begin(last) * args.example_rows;
    threads.each([&](int thread, State& state) {
      for (int i = thread; i < 2 * kOuterTile; i += kThreads) {
        const int number = i / kOuterTile;
        shared.tables[number].fill(operand(number), first(tile, number), i % kOuterTile);
      }
#pragma unroll
      for (int number = 0; number < 2; ++number) {
        state.fetches[number].start(args, operand(number), row, thread);
      }
#pragma unroll
      for (int i = 0; i < kValues; ++i) state.tile.values[i] = 0;
      if constexpr (kKeeps) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
          state.sums[i] = 0;
          state.votes[i] = 0;
        }
      }
    });
    threads.barrier();
    fetch(threads, shared, tile, row, end);
    put(threads, shared.stages[0]);
    threads.barrier();
    // Ends all environments that end at this row, also those without rows.
    const auto end_environments = [&](int64_t at) {
      while (environment < last &&
             args.environments.begin(environment + 1) * args.example_rows == at) {
        end_environment(threads, shared, tile, environment);
        ++environment;
      }
    };
    end_environments(row);
#pragma unroll 1
    for (int stage = 0; row < end; stage ^= 1) {
      const int64_t next = row + kStage;
      if (next < end) fetch(threads, shared, tile, next, end);
      const int rows = static_cast<int>(next < end ? kStage : end - row);
      int done = 0;
#pragma unroll 1
      while (done < rows) {
        const int64_t bound = args.environments.begin(environment + 1) * args.example_rows - row;
        const int until = static_cast<int>(bound < rows ? bound : rows);
        Multiplier::multiply(threads, shared.stages[stage], done, until);
        done = until;
        end_environments(row + done);
      }
      if (next < end) put(threads, shared.stages[stage ^ 1]);
      threads.barrier();
      row = next;
    }
    write(threads, shared, tile);
  }

 private:
  ANDMASK_METHOD const OuterOperand& operand(int number) const {
    return number == 0 ? args.outputs : args.activations;
  }
  ANDMASK_METHOD static int64_t first(const Tile& tile, int number) {
    return number == 0 ? tile.output : tile.column;
  }

  template <typename Threads>
  ANDMASK_METHOD void fetch(Threads& threads, const Shared& shared, const Tile& tile, int64_t row,
                            int64_t end) const {
    threads.each([&](int thread, State& state) {
#pragma unroll
      for (int number = 0; number < 2; ++number) {
        const OuterOperand& from = operand(number);
        state.fetches[number].fetch(
            args, from, shared.tables[number],
            static_cast<const T*>(from.source.data) + tile.group * from.group_stride,
            first(tile, number), row, end, number == 0 ? args.row_weights : nullptr, thread);
      }
    });
  }

  template <typename Threads>
  ANDMASK_METHOD void put(Threads& threads, typename Multiplier::Stage& stage) const {
    threads.each([&](int thread, State& state) {
#pragma unroll
      for (int number = 0; number < 2; ++number) {
        state.fetches[number].put(stage, operand(number), number, thread);
      }
    });
  }

  // Calls f(i, output, column) for the elements of a thread that lie within the matrix.
  template <typename F_>
  ANDMASK_METHOD void for_elements(const Tile& tile, int thread, const F_& f) const {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const int64_t output = tile.output + Multiplier::row(thread, i);
      const int64_t column = tile.column + Multiplier::column(thread, i);
      if (output < args.outputs.columns && column < args.activations.columns) f(i, output, column);
    }
  }

  ANDMASK_METHOD int64_t address(const Tile& tile, int64_t output, int64_t column) const {
    return (tile.group * args.outputs.columns + output) * args.layout.output_stride +
           OuterColumn(args.activations.source, column).offset(args.layout);
  }

  // Adds one element of W_e to all moments, in memory.
  ANDMASK_METHOD void add_moments(const Tile& tile, int thread, int i, F value, int64_t before,
                                  F weight) const {
    const int64_t output = tile.output + Multiplier::row(thread, i);
    const int64_t column = tile.column + Multiplier::column(thread, i);
    if (output >= args.outputs.columns || column >= args.activations.columns) return;
    const PackedElements<1> at{address(tile, output, column)};
    MomentsOf<F, 1> moments;
    if (before > 0) moments.read(at, args.moments);
    moments.add(Pack<F, 1>{{value}}, args.moments, before, weight);
    moments.write(at, args.moments);
  }

  template <typename Threads>
  ANDMASK_METHOD void end_environment(Threads& threads, const Shared&, const Tile& tile,
                                      int64_t environment) const {
    if constexpr (kSigns) return;
    threads.each([&](int thread, State& state) {
      const F weight = static_cast<F>(args.weights ? args.weights[environment] : args.weight);
      if constexpr (extras) {
        // Values move up to the places that the loop reads, because registers cannot be indexed.
        constexpr int kStep = sizeof(F) == sizeof(double) ? 1 : 4;
#pragma unroll 1
        for (int begin = 0; begin < kValues; begin += kStep) {
#pragma unroll
          for (int i = 0; i < kStep; ++i) {
            add_moments(tile, thread, begin + i, state.tile.values[i], args.count + environment,
                        weight);
          }
#pragma unroll
          for (int i = 0; i < kValues; ++i) {
            state.tile.values[i] = i + kStep < kValues ? state.tile.values[i + kStep] : 0;
          }
        }
      } else if constexpr (kKeeps) {
#pragma unroll
        for (int i = 0; i < kValues; ++i) {
          const F value = state.tile.values[i];
          state.votes[i] += static_cast<int32_t>(sign(value));  // before the weight
          state.sums[i] += value * weight;
          state.tile.values[i] = 0;
        }
      }
    });
  }

  template <typename Threads>
  ANDMASK_METHOD void write(Threads& threads, const Shared&, const Tile& tile) const {
    if constexpr (extras) return;
    threads.each([&](int thread, State& state) {
      const bool split = args.splits > 1;
      for_elements(tile, thread, [&](int i, int64_t output, int64_t column) {
        const int64_t part =
            tile.split * args.elements() +
            (tile.group * args.outputs.columns + output) * args.activations.columns + column;
        const int64_t at = split ? part : address(tile, output, column);
        const bool fresh = split || args.count == 0;
        if constexpr (kKeeps) {
          F* const sums = static_cast<F*>(split ? args.part_sums : args.moments.sum);
          sums[at] = fresh ? state.sums[i] : sums[at] + state.sums[i];
        }
        int32_t votes = 0;
        if constexpr (kSigns) {
          votes = state.tile.values[i];
        } else {
          votes = state.votes[i];
        }
        if (split) {
          if (args.part_votes) args.part_votes[at] = votes;
        } else if (args.moments.votes) {
          add_votes(args.moments, at, args.count == 0, votes);
        }
      });
    });
  }

 public:
  ANDMASK_METHOD static void add_votes(const MomentArrays& moments, int64_t at, bool fresh,
                                       int32_t votes) {
    const PackedElements<1> element{at};
    int32_t total = 0;
    if (!fresh) get_votes<1>(element, moments.votes, moments.vote_bytes, &total);
    total += votes;
    put_votes<1>(element, &total, moments.vote_bytes, moments.votes);
  }
};

// Adds the sums and votes of the splits, in their order.
template <typename F>
struct OuterJoinBody {
  static constexpr int kThreads = 256;

  OuterArguments args;

  ANDMASK_METHOD void operator()(const ThreadIndex& index) const {
    const int64_t elements = args.elements();
    for (int64_t i = index.in_grid(kThreads); i < elements; i += index.blocks * kThreads) {
      const int64_t column = i % args.activations.columns;
      const int64_t output = i / args.activations.columns;  // of all groups
      const int64_t at = output * args.layout.output_stride +
                         OuterColumn(args.activations.source, column).offset(args.layout);
      if (args.part_sums) {
        const F* const parts = static_cast<const F*>(args.part_sums);
        F sum = parts[i];
        for (int64_t split = 1; split < args.splits; ++split) sum += parts[split * elements + i];
        F* const sums = static_cast<F*>(args.moments.sum);
        sums[at] = args.count == 0 ? sum : sums[at] + sum;
      }
      if (args.part_votes) {
        int32_t votes = 0;
        for (int64_t split = 0; split < args.splits; ++split) {
          votes += args.part_votes[split * elements + i];
        }
        OuterBody<SimpleMultiplier<F>, false>::add_votes(args.moments, at, args.count == 0, votes);
      }
    }
  }
};

}  // namespace andmask
