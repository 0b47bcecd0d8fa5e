// Rows of activations as 32-bit words, row by row or in tiles where one load holds the same word of
// several rows: [word][lanes]. Shared by the sparse products and their gradients.
#pragma once

#include <cstring>

#include "cpu/compressed_linear.h"

namespace bigops {

// fill(first, rows, to, stride) of the classes below, from f(i, to) that writes one row.
template <class F>
auto each_row(const F& f) {
  return [f](int64_t first, int64_t rows, char* to, int64_t stride) {
    for (int64_t i = 0; i < rows; ++i) f(first + i, to + i * stride);
  };
}

// Rows [M][words], one after the other.
class RowWords {
 public:
  // fill(first, rows, to, stride in bytes) writes rows of x, all of them.
  template <class F>
  RowWords(int64_t m, int64_t words, bool worth_threads, const F& fill)
      : buffer_(m * words * 4), stride_(words * 4) {
    for_tasks(m, worth_threads, [&](int64_t begin, int64_t end) {
      fill(begin, end - begin, buffer_.at(begin * stride_), stride_);
    });
  }
  const char* row(int64_t i) const { return buffer_.at(i * stride_); }
  int64_t stride() const { return stride_; }  // bytes

 private:
  Buffer buffer_;
  int64_t stride_;
};

// Rows in tiles of up to `vectors` vectors of rows, [word][lanes]; missing rows read as zero.
// `used` words of a row are filled, the rest up to `words` is zero.
class Tiles {
 public:
  Tiles(const CompressedKernels& kernels, int64_t m, int64_t used, int64_t words, int vectors)
      : kernels_(&kernels),
        width_(kernels.width),
        m_(m),
        used_(used),
        words_(words),
        vectors_(vectors),
        row_words_(round_up(used, width_)) {}

  int64_t count() const { return (m_ + tile_rows() - 1) / tile_rows(); }
  int64_t first_row(int64_t tile) const { return tile * tile_rows(); }
  int64_t row_count(int64_t tile) const {
    const int64_t left = m_ - first_row(tile);
    return left < tile_rows() ? left : tile_rows();
  }
  int vectors(int64_t tile) const {
    return static_cast<int>((row_count(tile) + width_ - 1) / width_);
  }
  int64_t lanes(int64_t tile) const { return int64_t(vectors(tile)) * width_; }
  int64_t groups() const { return (m_ + width_ - 1) / width_; }     // vectors of rows, of all tiles
  int64_t row_bytes() const { return width_ * row_words_ * 4; }     // memory of `fill_group`
  int64_t tile_bytes() const { return tile_rows() * words_ * 4; }   // of a whole one
  int64_t bytes() const { return groups() * width_ * words_ * 4; }  // of all

  // Fills the lanes of a group in its tile, which lies at `to`; fill as for RowWords.
  template <class F>
  void fill_group(int64_t group, char* rows, char* to, const F& fill) const {
    const int64_t first = group * width_, stride = row_words_ * 4;
    const int64_t here = m_ - first < width_ ? m_ - first : width_;
    fill(first, here, rows, stride);
    std::memset(rows + here * stride, 0, static_cast<size_t>((width_ - here) * stride));
    const int64_t all = lanes(group / vectors_), lane = group % vectors_ * width_;
    kernels_->transpose({rows, row_words_, width_, used_, to + lane * 4, all});
    if (lane == 0)
      std::memset(to + used_ * all * 4, 0, static_cast<size_t>((words_ - used_) * all * 4));
  }

  // All groups of one tile.
  template <class F>
  void fill_tile(int64_t tile, char* rows, char* to, const F& fill) const {
    for (int64_t i = 0; i < vectors(tile); ++i) fill_group(tile * vectors_ + i, rows, to, fill);
  }

 protected:
  int64_t tile_rows() const { return width_ * vectors_; }

  const CompressedKernels* kernels_;
  int64_t width_, m_, used_, words_, vectors_, row_words_;
};

// All tiles in memory of their own.
class TileWords : public Tiles {
 public:
  template <class F>
  TileWords(const Tiles& tiles, bool worth_threads, const F& fill)
      : Tiles(tiles), buffer_(tiles.bytes()) {
    for_tasks(groups(), worth_threads, [&](int64_t begin, int64_t end) {
      char* rows = scratch(row_bytes());
      for (int64_t group = begin; group < end; ++group)
        fill_group(group, rows, buffer_.at(first_row(group / vectors_) * words_ * 4), fill);
    });
  }

  // Word `word` of all rows of a tile.
  const char* at(int64_t tile, int64_t word) const {
    return buffer_.at((first_row(tile) * words_ + word * lanes(tile)) * 4);
  }

 private:
  Buffer buffer_;
};

}  // namespace bigops
