// Cuts the columns of a weight gradient into tiles, and its rows into blocks that are packed
// together.
//
// Windows are not unfolded. A block holds each pixel that its windows see once, with the zeros of
// the padding, in panels of up to 64 channels. The distance of the columns of one tap from the
// window's first pixel is then the same for all windows.
#pragma once

#include <cstdint>
#include <vector>

#include "tiles.h"

namespace andmask {

// A group of channels that are packed together.
struct OuterPanel {
  int64_t channel;
  int64_t channels;
  int64_t pitch;  // elements from one pixel to the next
  int64_t round;  // channels are filled up with zeros to a multiple of this
};

// A tile of vectors of columns of one panel.
struct ColumnTile {
  int64_t panel;
  OuterTileKind kind;
  int64_t lane;                      // lane by lane: the first channel in the panel; else 0
  int64_t shifts[kOuterMaxVectors];  // of each vector into the panel
  // [vectors][kOuterLanes] into a row of the moments; -1: unused.
  std::vector<int64_t> lane_offsets;
};

class OuterGeometry {
 public:
  // With `lanewise`, channels are groups of one channel each.
  OuterGeometry(const OuterTask& task, const OuterTileShape* shapes, bool lanewise);

  const std::vector<OuterPanel>& panels() const { return panels_; }
  const std::vector<ColumnTile>& tiles() const { return tiles_; }

  // A band is the positions of an example that are packed together. band(axis) is their number
  // along an axis, and box(axis) the number of pixels that they see.
  int64_t band(int axis) const { return band_[axis]; }
  int64_t bands() const { return bands_; }
  int64_t box(int axis) const { return box_[axis]; }
  int64_t box_pixels() const { return box_[0] * box_[1] * box_[2]; }
  int64_t block_pixels() const { return block_pixels_; }
  int64_t panel_size() const { return panel_size_; }  // elements, with slack

 private:
  void add_tiles(const OuterTask& task, const OuterTileShape* shapes, bool lanewise);

  std::vector<OuterPanel> panels_;
  std::vector<ColumnTile> tiles_;
  int64_t band_[kWindowAxes];
  int64_t box_[kWindowAxes];
  int64_t bands_ = 1;
  int64_t block_pixels_ = 0;
  int64_t panel_size_ = 0;
};

// Walks over the rows of consecutive environments, block by block. The tables of a block serve all
// panels and outputs.
class OuterBlocks {
 public:
  OuterBlocks(const OuterTask& task, const OuterGeometry& geometry, int64_t begin, int64_t end);

  // Moves to the next block of environments [begin, end); false at the end.
  bool next();

  int64_t rows() const { return static_cast<int64_t>(row_pixels_.size()); }
  const std::vector<int32_t>& row_pixels() const { return row_pixels_; }
  const std::vector<int64_t>& output_offsets() const { return output_offsets_; }
  const std::vector<int64_t>& pixel_offsets() const { return pixel_offsets_; }  // in the source
  const std::vector<int32_t>& pixels() const { return pixels_; }                // in the panel
  bool padded() const { return padded_; }  // pixels of the block are zeros
  int64_t block_pixels() const { return block_pixels_; }
  // Rows of each environment in the block, from environment first() on.
  const std::vector<int32_t>& environment_rows() const { return environment_rows_; }
  int64_t first() const { return first_; }
  bool resumes() const { return resumes_; }
  bool suspends() const { return suspends_; }

 private:
  // The entries of a band in the tables, relative to its first pixel and its example.
  struct Band {
    int64_t index = -1;
    std::vector<int32_t> row_pixels, pixels;
    std::vector<int64_t> output_offsets, pixel_offsets;
    bool padded = false;
  };

  Band tabulate(int64_t band) const;
  void add_band(int64_t example, int64_t band);

  const OuterTask& task_;
  const OuterGeometry& geometry_;
  int64_t environment_, end_;
  int64_t index_;  // in `order`
  int64_t band_ = 0;
  std::vector<Band> bands_;  // the tables of recent bands
  std::vector<int32_t> row_pixels_, pixels_, environment_rows_;
  std::vector<int64_t> output_offsets_, pixel_offsets_;
  int64_t block_pixels_ = 0;
  int64_t first_ = 0;
  bool padded_ = false;
  bool resumes_ = false;
  bool suspends_ = false;
};

}  // namespace andmask
