#include "worker.h"

#include <algorithm>
#include <cstring>
#include <vector>

namespace andmask {
namespace {

constexpr int64_t kMostEnvironments = 127;  // int8 can hold their votes

// True if a sum of products of such operands may round to zero, overflow or be NaN.
bool is_delicate(const MagnitudeRange& first, const MagnitudeRange& second, int64_t rows) {
  const auto exponent = [](uint64_t bits) { return static_cast<int64_t>(bits >> 23); };
  constexpr int64_t kBias = 127;
  int64_t carry = 0;  // 2^carry rows or more
  while ((int64_t{1} << carry) < rows) ++carry;
  const int64_t largest =
      exponent(first.largest) - kBias + 1 + exponent(second.largest) - kBias + 1 + carry;
  // All products are multiples of the product of the operands' last bits. If that is at least the
  // smallest subnormal, 2^-149, the sums are multiples of it too, and none can round to zero.
  const auto last_bit = [&](const MagnitudeRange& range) {
    return std::max<int64_t>(1, exponent(range.smallest_less_one + 1)) - kBias - 23;
  };
  return largest >= kBias || exponent(first.largest) == 255 || exponent(second.largest) == 255 ||
         last_bit(first) + last_bit(second) < -149;
}

// True if this thread flushes subnormals to zero.
bool flushes_subnormals() {
  volatile float least_normal = 1.17549435e-38f;
  return least_normal * .5f == 0;
}

class Worker {
 public:
  Worker(const OuterPlan& plan, OuterScratch& scratch, int64_t part)
      : plan_(plan),
        task_(plan.task),
        groups_(plan.groups(part)),
        columns_(plan.columns(part)),
        outputs_(plan.rows(part)),
        size_(groups_.size() * columns_.size() * outputs_.size() * plan.tile_elements()),
        flushes_(flushes_subnormals()),
        sticky_(groups_.size() * plan.geometry.panels().size(), 0) {
    const int64_t wide = plan.wide();
    const int64_t panel = plan.geometry.panel_size() * wide;
    planes_size_ =
        (plan.lanewise ? kOuterDepth * kOuterLanePitch : plan.shape.rows * kOuterPitch) * wide;
    const int64_t planes = outputs_.size() * planes_size_;
    constexpr int64_t kArrays = 8;
    scratch.reserve(panel + planes + size_ / plan.tile_elements() * plan.tile_bytes() +
                    kArrays * OuterScratch::rounded(1));
    panel_ = scratch.take<char>(panel);
    planes_ = scratch.take<char>(planes);
    partial_ = scratch.take<char>(size_ * wide);
    moments_.sum = scratch.take<char>(size_ * wide);
    if (!plan.general || task_.moments.votes) {
      moments_.votes = scratch.take<char>(size_ * plan.vote_bytes());
      moments_.vote_bytes = static_cast<int>(plan.vote_bytes());
    }
    if (task_.moments.squares) moments_.squares = scratch.take<char>(size_ * wide);
    if (task_.moments.logs) moments_.logs = scratch.take<char>(size_ * wide);
    if (task_.moments.voters) moments_.voters = scratch.take<char>(size_ * plan.vote_bytes());
  }

  void run() {
    if (plan_.general) {
      if (task_.count > 0) exchange<true>();
      add_environments(0, task_.environments);
      exchange<false>();
      return;
    }
    for (int64_t begin = 0; begin < task_.environments; begin += kMostEnvironments) {
      std::memset(moments_.sum, 0, size_ * plan_.wide());
      std::memset(moments_.votes, 0, size_);
      add_environments(begin, std::min(begin + kMostEnvironments, task_.environments));
      flush(task_.count + begin == 0);
    }
  }

 private:
  void add_environments(int64_t begin, int64_t end) {
    OuterBlocks blocks(task_, plan_.geometry, begin, end);
    while (blocks.next()) {
      for (int64_t group = groups_.begin; group < groups_.end; ++group) add_block(blocks, group);
    }
  }

  void add_block(const OuterBlocks& blocks, int64_t group) {
    MagnitudeRange output_range;
    if (!plan_.lanewise) pack_outputs(blocks, group, &output_range);
    OuterTile tile{};
    tile.rows = blocks.environment_rows().data();
    tile.environments = static_cast<int64_t>(blocks.environment_rows().size());
    tile.resumes = blocks.resumes();
    tile.suspends = blocks.suspends();
    tile.weights = task_.weights ? task_.weights + blocks.first() : nullptr;
    const auto accumulate = plan_.kernels.accumulate[static_cast<int>(plan_.width)];
    const int64_t wide = plan_.wide();
    int64_t index = (group - groups_.begin) * columns_.size() * outputs_.size();
    int64_t packed = -1;
    for (int64_t column = columns_.begin; column < columns_.end; ++column) {
      const ColumnTile& shape = plan_.geometry.tiles()[column];
      if (shape.panel != packed) {
        packed = shape.panel;
        MagnitudeRange range;
        pack_panel(blocks, group, plan_.geometry.panels()[packed], &range);
        if (plan_.lanewise) {
          output_range = {};
          pack_lanes(blocks, plan_.geometry.panels()[packed], &output_range);
        }
        char& sticky = sticky_[(group - groups_.begin) * plan_.geometry.panels().size() + packed];
        const bool delicate =
            flushes_ || is_delicate(range, output_range, plan_.longest) || (tile.resumes && sticky);
        sticky = delicate;
        tile.careful = delicate || task_.weights;
        tile.row_offsets = row_offsets_.data();
      }
      for (int64_t v = 0; v < vectors(shape); ++v) {
        tile.columns[v] = panel_ + shape.shifts[v] * wide;
      }
      for (int64_t output = 0; output < outputs_.size(); ++output, ++index) {
        const int64_t first = index * plan_.tile_elements();
        tile.outputs = planes_ + output * planes_size_ + shape.lane * wide;
        tile.partial = partial_ + first * wide;
        if (plan_.general) {
          add_to_all_moments(tile, blocks.first(), first, shape);
        } else {
          tile.sum = static_cast<char*>(moments_.sum) + first * wide;
          tile.votes = static_cast<int8_t*>(moments_.votes) + first;
          accumulate(tile, shape.kind);
        }
      }
    }
  }

  // Adds environment by environment, with the kernel that adds stored gradients.
  void add_to_all_moments(const OuterTile& whole, int64_t environment, int64_t first,
                          const ColumnTile& shape) {
    const Dtype dtype = plan_.width == Width::float64 ? Dtype::float64 : Dtype::float32;
    const auto accumulate = plan_.moment_kernels.accumulate[static_cast<int>(dtype)];
    const int64_t size = plan_.shape.rows * vectors(shape) * kOuterLanes;
    const int64_t output_step = plan_.wide() * (plan_.lanewise ? kOuterLanePitch : 1);
    MomentArrays moments = moments_;
    advance(moments, first);
    OuterTile single = whole;
    single.environments = 1;
    single.suspends = true;
    for (int64_t i = 0; i < whole.environments; ++i, ++environment) {
      single.resumes = i == 0 && whole.resumes;
      single.rows = whole.rows + i;
      plan_.kernels.accumulate[static_cast<int>(plan_.width)](single, shape.kind);
      single.row_offsets += *single.rows;
      single.outputs = static_cast<const char*>(single.outputs) + *single.rows * output_step;
      if (whole.suspends && i + 1 == whole.environments) return;
      const AccumulateTask task{.grads = whole.partial,
                                .weights = whole.weights ? whole.weights + i : nullptr,
                                .count = task_.count + environment,
                                .moments = moments};
      accumulate(task, 0, size);
    }
  }

  int64_t vectors(const ColumnTile& tile) const {
    return plan_.shapes[static_cast<int>(tile.kind)].vectors;
  }

  void advance(MomentArrays& moments, int64_t elements) const {
    const auto move = [&](void*& array, int64_t bytes) {
      if (array) array = static_cast<char*>(array) + elements * bytes;
    };
    move(moments.sum, plan_.wide());
    move(moments.votes, moments.vote_bytes);
    move(moments.squares, plan_.wide());
    move(moments.logs, plan_.wide());
    move(moments.voters, moments.vote_bytes);
  }

  // Calls pack(task, first) for runs of positions that are packed in the same way.
  template <typename Pack>
  static void for_runs(OuterPack task, const Pack& pack) {
    const int64_t* const offsets = task.source_offsets;
    const int64_t positions = task.positions;
    int64_t breaks = 0;
    for (int64_t i = 1; i < positions; ++i) breaks += offsets[i] != offsets[i - 1] + 1;
    constexpr int64_t kShort = 4;  // shorter runs are not worth a call
    if (task.channel_stride == 1 || (breaks + 1) * kShort > positions) {
      pack(task, 0);
      return;
    }
    task.unit_positions = true;
    for (int64_t begin = 0, end; begin < positions; begin = end) {
      end = begin + 1;
      while (end < positions && offsets[end] == offsets[end - 1] + 1) ++end;
      task.source_offsets = offsets + begin;
      task.positions = end - begin;
      pack(task, begin);
    }
  }

  void pack_outputs(const OuterBlocks& blocks, int64_t group, MagnitudeRange* range) {
    const RowSource& source = task_.grad_outputs;
    const int64_t first = outputs_.begin * plan_.shape.rows;
    const OuterPack all{static_cast<const char*>(source.data) + (group * source.channels + first) *
                                                                    source.channel_stride *
                                                                    item_size(source.dtype),
                        blocks.output_offsets().data(),
                        blocks.rows(),
                        std::min(outputs_.end * plan_.shape.rows, source.channels) - first,
                        source.channel_stride,
                        false,
                        nullptr};
    const auto pack = plan_.kernels.pack_outputs[static_cast<int>(source.dtype)];
    for_runs(all, [&](OuterPack run, int64_t begin) {
      run.target = planes_ + begin * plan_.wide();
      pack(run, range);
    });
  }

  // Packs outputs of groups of one channel like the channels that they are multiplied with.
  void pack_lanes(const OuterBlocks& blocks, const OuterPanel& panel, MagnitudeRange* range) {
    const RowSource& source = task_.grad_outputs;
    targets_.resize(blocks.rows());
    for (size_t i = 0; i < targets_.size(); ++i) {
      targets_[i] = static_cast<int32_t>(i * kOuterLanePitch);
    }
    const auto pack = plan_.kernels.pack_columns[static_cast<int>(source.dtype)];
    for (int64_t output = outputs_.begin; output < outputs_.end; ++output) {
      const int64_t first = panel.channel * source.channels + output;
      const OuterPack all{static_cast<const char*>(source.data) +
                              first * source.channel_stride * item_size(source.dtype),
                          blocks.output_offsets().data(),
                          blocks.rows(),
                          panel.channels,
                          source.channels * source.channel_stride,
                          false,
                          planes_ + (output - outputs_.begin) * planes_size_};
      for_runs(all, [&](const OuterPack& run, int64_t begin) {
        pack(run, targets_.data() + begin, panel.round, range);
      });
    }
  }

  void pack_panel(const OuterBlocks& blocks, int64_t group, const OuterPanel& panel,
                  MagnitudeRange* range) {
    const RowSource& source = task_.activations;
    if (blocks.padded()) {
      std::memset(panel_, 0, blocks.block_pixels() * panel.pitch * plan_.wide());
    }
    targets_.resize(blocks.pixels().size());
    const auto pitch = static_cast<int32_t>(panel.pitch);
    for (size_t i = 0; i < targets_.size(); ++i) targets_[i] = blocks.pixels()[i] * pitch;
    row_offsets_.resize(blocks.row_pixels().size());
    for (size_t i = 0; i < row_offsets_.size(); ++i)
      row_offsets_[i] = blocks.row_pixels()[i] * pitch;
    const OuterPack all{
        static_cast<const char*>(source.data) + (group * source.channels + panel.channel) *
                                                    source.channel_stride * item_size(source.dtype),
        blocks.pixel_offsets().data(),
        static_cast<int64_t>(targets_.size()),
        panel.channels,
        source.channel_stride,
        false,
        panel_};
    const auto pack = plan_.kernels.pack_columns[static_cast<int>(source.dtype)];
    for_runs(all, [&](const OuterPack& run, int64_t begin) {
      pack(run, targets_.data() + begin, panel.round, range);
    });
  }

  // Calls use(tile, index of the tile in the scratch, number of rows, moments at its first row).
  template <typename Use>
  void for_tiles(const Use& use) {
    int64_t index = 0;
    for (int64_t group = groups_.begin; group < groups_.end; ++group) {
      for (int64_t column = columns_.begin; column < columns_.end; ++column) {
        for (int64_t output = outputs_.begin; output < outputs_.end; ++output, ++index) {
          const int64_t channels = task_.grad_outputs.channels;
          const int64_t row = output * plan_.shape.rows;
          MomentArrays moments = task_.moments;
          advance(moments, (group * channels + row) * task_.layout.output_stride);
          use(plan_.geometry.tiles()[column], index, std::min(plan_.shape.rows, channels - row),
              moments);
        }
      }
    }
  }

  void flush(bool first) {
    for_tiles([&](const ColumnTile& tile, int64_t index, int64_t rows, MomentArrays moments) {
      const int64_t begin = index * plan_.tile_elements();
      const OuterFlush flush{static_cast<char*>(moments_.sum) + begin * plan_.wide(),
                             static_cast<int8_t*>(moments_.votes) + begin,
                             rows,
                             task_.layout.output_stride,
                             tile.lane_offsets.data(),
                             first,
                             moments};
      plan_.kernels.flush[static_cast<int>(plan_.width)](flush, tile.kind);
    });
  }

  // Copies the moments to the scratch or back.
  template <bool kLoad>
  void exchange() {
    for_tiles([&](const ColumnTile& tile, int64_t index, int64_t rows, MomentArrays moments) {
      MomentArrays scratch = moments_;
      advance(scratch, index * plan_.tile_elements());
      const auto exchange_array = [&](void* stored, void* held, int64_t bytes) {
        if (!stored) return;
        const int64_t columns = vectors(tile) * kOuterLanes;
        for (int64_t row = 0; row < rows; ++row) {
          for (int64_t column = 0; column < columns; ++column) {
            if (tile.lane_offsets[column] < 0) continue;
            char* const moment =
                static_cast<char*>(stored) +
                (row * task_.layout.output_stride + tile.lane_offsets[column]) * bytes;
            char* const copy = static_cast<char*>(held) + (row * columns + column) * bytes;
            std::memcpy(kLoad ? copy : moment, kLoad ? moment : copy, bytes);
          }
        }
      };
      exchange_array(moments.sum, scratch.sum, plan_.wide());
      exchange_array(moments.votes, scratch.votes, moments.vote_bytes);
      exchange_array(moments.squares, scratch.squares, plan_.wide());
      exchange_array(moments.logs, scratch.logs, plan_.wide());
      exchange_array(moments.voters, scratch.voters, moments.vote_bytes);
    });
  }

  const OuterPlan& plan_;
  const OuterTask& task_;
  OuterRange groups_;
  OuterRange columns_;
  OuterRange outputs_;
  int64_t size_;         // elements of all tiles
  int64_t planes_size_;  // bytes of packed grad_outputs for a row of tiles
  bool flushes_;
  std::vector<char> sticky_;  // [groups, panels]: the suspended environment is delicate
  std::vector<int32_t> targets_, row_offsets_;
  char* panel_;
  char* planes_;
  char* partial_;
  MomentArrays moments_{};  // of the tiles
};

}  // namespace

void run_outer_part(const OuterPlan& plan, int64_t part) {
  thread_local OuterScratch scratch;
  Worker(plan, scratch, part).run();
}

}  // namespace andmask
