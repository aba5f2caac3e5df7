#include <algorithm>
#include <vector>

#include "launch.h"
#include "outer/tile.h"
#include "types.h"

namespace andmask {
namespace {

// The number of blocks to aim at: twice the multiprocessors of a large device. It is the same for
// all devices, so that the order in which parts are added, and the bits of the result, are the same
// too.
constexpr int64_t kBlocks = 264;
// The least rows of a part: a smaller one is not worth its scratch.
constexpr int64_t kRowsOfPart = 64;

bool all_same(const double* values, int64_t count) {
  return std::all_of(values, values + count, [&](double value) { return value == values[0]; });
}

// Describes an operand, and chooses how threads read it. `size`: elements of a pack.
OuterOperand operand(const RowSource& source, const int64_t* positions, int64_t size) {
  OuterOperand operand{};
  operand.source = source;
  operand.columns = source.channels * source.taps();
  operand.group_stride = source.channels * source.channel_stride;
  bool packs = source.taps() == 1 && source.channel_stride == 1 && operand.columns % size == 0 &&
               operand.group_stride % size == 0 && source.example_stride % size == 0 &&
               aligned_for(source.data, size, item_size(source.dtype));
  for (int axis = 0; axis < kWindowAxes; ++axis) {
    const WindowAxis& window = source.axes[axis];
    const int64_t farthest =
        (positions[axis] - 1) * window.step - window.padding + (window.taps - 1) * window.dilation;
    operand.checked[axis] = window.padding > 0 || farthest >= window.size;
    packs = packs && !operand.checked[axis] && (positions[axis] == 1 || window.stride % size == 0);
  }
  const WindowAxis& last = source.axes[kWindowAxes - 1];
  operand.reading = packs ? OuterReading::packs
                    : source.channel_stride != 1 && last.stride * last.step < source.channel_stride
                        ? OuterReading::rows
                        : OuterReading::columns;
  return operand;
}

struct Request {
  const OuterTask& task;
  const int64_t* order;       // in device memory, like the next three
  const int64_t* offsets;     // null: environments of `size` examples
  const double* weights;      // of environments; null: `weight`
  const double* row_weights;  // of examples
  int64_t size, count;        // of environments
  double weight;
  bool sums, votes;
};

template <typename Multiplier, bool extras>
void launch_tiles(const Stream& stream, const Request& request) {
  using F = accumulate_t<typename Multiplier::Element>;
  const OuterTask& task = request.task;
  OuterArguments args{};
  for (int axis = 0; axis < kWindowAxes; ++axis) {
    // Without rows nothing is read, but positions must be countable.
    args.positions[axis] = std::max<int64_t>(1, task.activations.axes[axis].positions);
  }
  constexpr int64_t pack = OuterFetch<Multiplier>::kPack;
  args.outputs = operand(task.grad_outputs, args.positions, pack);
  args.activations = operand(task.activations, args.positions, pack);
  args.example_rows = task.activations.rows();
  args.stage = OuterCursor::at(args.positions, Multiplier::kStage);
  args.order = request.order;
  args.environments = {request.offsets, task.offsets[0], task.offsets[task.environments],
                       request.size, request.count};
  args.weights = request.weights;
  args.weight = request.weight;
  args.row_weights = request.row_weights;
  args.count = task.count;
  args.moments = task.moments;
  if (!request.votes) args.moments.votes = nullptr;
  args.layout = task.layout;
  args.groups = task.groups;
  args.row_tiles = (args.outputs.columns + kOuterTile - 1) / kOuterTile;
  args.column_tiles = (args.activations.columns + kOuterTile - 1) / kOuterTile;
  args.splits = 1;
  if (!extras) {
    const int64_t rows = (args.environments.end - args.environments.first) * args.example_rows;
    const int64_t tiles = args.blocks();
    args.splits = std::max<int64_t>(
        1, std::min({kBlocks / tiles, args.environments.count, rows / kRowsOfPart}));
  }
  if (args.splits > 1) {
    const int64_t elements = args.splits * args.elements();
    if (request.sums) args.part_sums = stream.scratch<F>(elements);
    if (args.moments.votes) args.part_votes = stream.scratch<int32_t>(elements);
  }
  launch(stream, args.blocks(), OuterBody<Multiplier, extras>{args});
  if (args.splits > 1) {
    launch(stream, blocks_for(stream, args.elements(), OuterJoinBody<F>::kThreads),
           OuterJoinBody<F>{args});
  }
}

template <typename T>
void run_sums(const Stream& stream, const Request& request) {
  if constexpr (sizeof(T) == 2) {
    if (!request.row_weights) return launch_tiles<HalfMultiplier<T>, false>(stream, request);
  }
  launch_tiles<SimpleMultiplier<T>, false>(stream, request);
}

// With one row for each environment, the sums are one product of all rows, which may be split
// anywhere, and the votes are a product of signs. The order of the environments does not matter,
// except that each must meet its own weight.
template <typename T>
void run_single_rows(const Stream& stream, Request request) {
  const OuterTask& task = request.task;
  request.order = nullptr;
  if (task.weights && !all_same(task.weights, task.environments)) {
    std::vector<double> weights(task.environments);
    for (int64_t e = 0; e < task.environments; ++e) {
      weights[task.order ? task.order[e] : e] = task.weights[e];
    }
    request.row_weights = upload(stream, weights.data(), task.environments);
  }
  request.size = kRowsOfPart;
  request.count = (task.environments + kRowsOfPart - 1) / kRowsOfPart;
  request.sums = true;
  request.votes = false;
  run_sums<T>(stream, request);
  if (!task.moments.votes) return;
  request.row_weights = nullptr;
  request.sums = false;
  request.votes = true;
  launch_tiles<SignMultiplier<T>, false>(stream, request);
}

template <typename T>
void run_environments(const Stream& stream, Request request) {
  const OuterTask& task = request.task;
  if (task.order) request.order = upload(stream, task.order, task.offsets[task.environments]);
  request.count = task.environments;
  request.size = task.offsets[1] - task.offsets[0];
  for (int64_t e = 1; e < task.environments; ++e) {
    if (task.offsets[e + 1] - task.offsets[e] == request.size) continue;
    request.offsets = upload(stream, task.offsets, task.environments + 1);
    break;
  }
  if (task.weights && !all_same(task.weights, task.environments)) {
    request.weights = upload(stream, task.weights, task.environments);
  }
  request.sums = request.votes = true;
  if (task.moments.squares || task.moments.logs || task.moments.voters) {
    launch_tiles<SimpleMultiplier<T>, true>(stream, request);
  } else {
    run_sums<T>(stream, request);
  }
}

}  // namespace

void run(const Stream& stream, const OuterTask& task) {
  Request request{task, nullptr, nullptr, nullptr, nullptr, 0, 0, 1, false, false};
  if (task.weights && all_same(task.weights, task.environments)) request.weight = task.weights[0];
  const bool single =
      has_single_rows(task) && !task.moments.squares && !task.moments.logs && !task.moments.voters;
  with_type(task.activations.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (single) {
      run_single_rows<T>(stream, request);
    } else {
      run_environments<T>(stream, request);
    }
  });
}

}  // namespace andmask
