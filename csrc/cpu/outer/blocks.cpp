#include "blocks.h"

#include <algorithm>

namespace andmask {
namespace {

// The number of elements of a panel: half of a small second-level cache.
constexpr int64_t kPanelSize = int64_t{1} << 17;
constexpr int64_t kKeptBands = 64;
constexpr int64_t kPanelChannels = kOuterLanePitch;

int64_t window_size(const WindowAxis& axis, int64_t positions) {
  return (positions - 1) * axis.step + (axis.taps - 1) * axis.dilation + 1;
}

}  // namespace

OuterGeometry::OuterGeometry(const OuterTask& task, const OuterTileShape* shapes, bool lanewise) {
  const RowSource& source = task.activations;
  // The outermost axis along which a block does not hold all positions is cut into bands.
  int64_t room = kOuterDepth;
  for (int axis = kWindowAxes - 1; axis >= 0; --axis) {
    const int64_t positions = source.axes[axis].positions;
    band_[axis] = std::max<int64_t>(1, std::min(positions, room));
    room = band_[axis] < positions ? 1 : room / band_[axis];
    bands_ *= (positions + band_[axis] - 1) / band_[axis];
    box_[axis] = window_size(source.axes[axis], band_[axis]);
  }
  const bool lean = box_pixels() * kPanelChannels > kPanelSize;
  const int64_t channels = lean ? kOuterLanes : kPanelChannels;
  // With few channels the taps along the last axis are neighbours, and share vectors.
  const bool merged =
      !lanewise && source.channels < kOuterLanes && source.axes[kWindowAxes - 1].dilation == 1;
  for (int64_t channel = 0; channel < source.channels; channel += channels) {
    const int64_t size = std::min(channels, source.channels - channel);
    const int64_t round = merged ? 1 : kOuterLanes;
    panels_.push_back({channel, size, (size + round - 1) / round * round, round});
    add_tiles(task, shapes, lanewise);
  }
  const int64_t pitch = panels_.empty() ? 1 : panels_[0].pitch;
  block_pixels_ = std::max(box_pixels(), kPanelSize / pitch);
  panel_size_ = block_pixels_ * pitch + 4 * kOuterLanes;
}

// Adds the tiles of the last panel.
void OuterGeometry::add_tiles(const OuterTask& task, const OuterTileShape* shapes, bool lanewise) {
  const WindowAxis* const axes = task.activations.axes;
  const OuterPanel& columns = panels_.back();
  struct ColumnVector {
    int64_t shift;
    int64_t lane;
    int64_t lane_offsets[kOuterLanes];
  };
  std::vector<ColumnVector> vectors;
  const bool merged = columns.round == 1;
  const int64_t inner_taps = merged ? 1 : axes[2].taps;
  const int64_t run = merged ? axes[2].taps * columns.channels : columns.channels;
  for (int64_t i = 0; i < axes[0].taps * axes[1].taps * inner_taps; ++i) {
    const int64_t tap[] = {i / inner_taps / axes[1].taps, i / inner_taps % axes[1].taps,
                           i % inner_taps};
    int64_t pixel = 0;
    int64_t offset = 0;
    for (int axis = 0; axis < kWindowAxes; ++axis) {
      pixel = pixel * box_[axis] + tap[axis] * axes[axis].dilation;
      offset += tap[axis] * task.layout.tap_strides[axis];
    }
    for (int64_t begin = 0; begin < run; begin += kOuterLanes) {
      ColumnVector vector{pixel * columns.pitch + begin, begin, {}};
      for (int64_t lane = 0; lane < kOuterLanes; ++lane) {
        const int64_t column = begin + lane;
        const int64_t channel = columns.channel + column % columns.channels;
        vector.lane_offsets[lane] =
            column >= run ? -1
                          : offset + channel * task.layout.channel_stride +
                                column / columns.channels * task.layout.tap_strides[2];
      }
      vectors.push_back(vector);
    }
  }
  if (lanewise) {  // the taps of the same channels make a tile
    std::stable_sort(vectors.begin(), vectors.end(), [](const auto& first, const auto& second) {
      return first.lane < second.lane;
    });
  }
  const auto size = [&](OuterTileKind kind) {
    return static_cast<size_t>(shapes[static_cast<int>(kind)].vectors);
  };
  for (size_t begin = 0, end; begin < vectors.size(); begin = end) {
    OuterTileKind kind = OuterTileKind::wide;
    if (lanewise) {
      kind = OuterTileKind::lanes;
    } else if (vectors.size() - begin <= size(OuterTileKind::narrow)) {
      kind = OuterTileKind::narrow;
    }
    end = std::min(vectors.size(), begin + size(kind));
    if (lanewise) {
      while (vectors[end - 1].lane != vectors[begin].lane) --end;
    }
    const int64_t lane = lanewise ? vectors[begin].lane : 0;
    ColumnTile tile{static_cast<int64_t>(panels_.size()) - 1, kind, lane, {}, {}};
    for (size_t i = 0; i < size(kind); ++i) {
      const ColumnVector& vector = vectors[begin + i < end ? begin + i : begin];
      tile.shifts[i] = vector.shift;
      for (int64_t offset : vector.lane_offsets) {
        tile.lane_offsets.push_back(begin + i < end ? offset : -1);
      }
    }
    tiles_.push_back(std::move(tile));
  }
}

OuterBlocks::OuterBlocks(const OuterTask& task, const OuterGeometry& geometry, int64_t begin,
                         int64_t end)
    : task_(task),
      geometry_(geometry),
      environment_(begin),
      end_(end),
      index_(task.offsets[begin]),
      bands_(std::max<int64_t>(1, std::min(geometry.bands(), kKeptBands))) {}

bool OuterBlocks::next() {
  row_pixels_.clear();
  pixels_.clear();
  environment_rows_.clear();
  output_offsets_.clear();
  pixel_offsets_.clear();
  block_pixels_ = 0;
  padded_ = false;
  if (environment_ == end_) return false;
  first_ = environment_;
  resumes_ = suspends_;
  suspends_ = false;
  const int64_t band_rows = geometry_.band(0) * geometry_.band(1) * geometry_.band(2);
  for (; environment_ < end_; ++environment_) {
    const int64_t before = rows();
    // An environment that fits into one block is not split.
    const int64_t size = (task_.offsets[environment_ + 1] - index_) * task_.activations.rows();
    if (before > 0 && size <= kOuterDepth && before + size > kOuterDepth) return true;
    for (; index_ < task_.offsets[environment_ + 1]; ++index_, band_ = 0) {
      for (; band_ < geometry_.bands(); ++band_) {
        const bool full = rows() + band_rows > kOuterDepth ||
                          block_pixels_ + geometry_.box_pixels() > geometry_.block_pixels();
        if (full && rows() > 0) {
          // An environment that has not begun yet goes to the next block.
          suspends_ = rows() > before || (resumes_ && environment_ == first_);
          if (suspends_) environment_rows_.push_back(static_cast<int32_t>(rows() - before));
          return true;
        }
        add_band(task_.order ? task_.order[index_] : index_, band_);
      }
    }
    environment_rows_.push_back(static_cast<int32_t>(rows() - before));
  }
  return true;
}

OuterBlocks::Band OuterBlocks::tabulate(int64_t band) const {
  Band table;
  table.index = band;
  const WindowAxis* const axes = task_.activations.axes;
  const WindowAxis* const out = task_.grad_outputs.axes;
  int64_t begin[kWindowAxes], size[kWindowAxes];  // positions
  int64_t low[kWindowAxes], high[kWindowAxes];    // places of the box that are not padding
  int64_t place[kWindowAxes];                     // of the input, where the box begins
  for (int axis = kWindowAxes - 1; axis >= 0; --axis) {
    const int64_t bands = (axes[axis].positions + geometry_.band(axis) - 1) / geometry_.band(axis);
    begin[axis] = band % bands * geometry_.band(axis);
    size[axis] = std::min(geometry_.band(axis), axes[axis].positions - begin[axis]);
    band /= bands;
    place[axis] = begin[axis] * axes[axis].step - axes[axis].padding;
    const int64_t places = window_size(axes[axis], size[axis]);
    low[axis] = std::min(places, std::max<int64_t>(0, -place[axis]));
    high[axis] = std::max(low[axis], std::min(places, axes[axis].size - place[axis]));
    table.padded |= low[axis] > 0 || high[axis] < geometry_.box(axis);
  }
  const auto pixel = [&](int64_t i, int64_t j, int64_t k) {
    return static_cast<int32_t>((i * geometry_.box(1) + j) * geometry_.box(2) + k);
  };
  for (int64_t i = low[0]; i < high[0]; ++i) {
    for (int64_t j = low[1]; j < high[1]; ++j) {
      const int64_t line = (place[0] + i) * axes[0].stride + (place[1] + j) * axes[1].stride +
                           place[2] * axes[2].stride;
      for (int64_t k = low[2]; k < high[2]; ++k) {
        table.pixels.push_back(pixel(i, j, k));
        table.pixel_offsets.push_back(line + k * axes[2].stride);
      }
    }
  }
  for (int64_t i = 0; i < size[0]; ++i) {
    for (int64_t j = 0; j < size[1]; ++j) {
      const int64_t line = (begin[0] + i) * out[0].stride + (begin[1] + j) * out[1].stride +
                           begin[2] * out[2].stride;
      for (int64_t k = 0; k < size[2]; ++k) {
        table.row_pixels.push_back(pixel(i * axes[0].step, j * axes[1].step, k * axes[2].step));
        table.output_offsets.push_back(line + k * out[2].stride);
      }
    }
  }
  return table;
}

void OuterBlocks::add_band(int64_t example, int64_t index) {
  Band& band = bands_[index % static_cast<int64_t>(bands_.size())];
  if (band.index != index) band = tabulate(index);
  const auto add = [](const auto& from, auto by, auto& to) {
    const size_t size = to.size();
    to.resize(size + from.size());
    for (size_t i = 0; i < from.size(); ++i) to[size + i] = from[i] + by;
  };
  const auto pixel = static_cast<int32_t>(block_pixels_);
  add(band.row_pixels, pixel, row_pixels_);
  add(band.pixels, pixel, pixels_);
  add(band.output_offsets, example * task_.grad_outputs.example_stride, output_offsets_);
  add(band.pixel_offsets, example * task_.activations.example_stride, pixel_offsets_);
  padded_ |= band.padded;
  block_pixels_ += geometry_.box_pixels();
}

}  // namespace andmask
