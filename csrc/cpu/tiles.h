// Rows of activations as 32-bit words, row by row or in tiles where one load holds the same word of
// several rows: [word][lanes]. Shared by the sparse products and their gradients.
#pragma once

#include <cstring>

#include "cpu/compressed_linear.h"

namespace bigops {

// Rows [M][words], one after the other.
class RowWords {
 public:
  // fill(i, to) writes row i, all of it.
  template <class F>
  RowWords(int64_t m, int64_t words, bool worth_threads, const F& fill)
      : buffer_(m * words * 4), stride_(words * 4) {
    for_tasks(m, worth_threads, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) fill(i, buffer_.at(i * stride_));
    });
  }
  const char* row(int64_t i) const { return buffer_.at(i * stride_); }
  int64_t stride() const { return stride_; }  // bytes

 private:
  Buffer buffer_;
  int64_t stride_;
};

// The same in tiles of up to `vectors` vectors of rows; missing rows read as zero.
class TileWords {
 public:
  // `used` words of a row are filled, the rest up to `words` is zero.
  template <class F>
  TileWords(const CompressedKernels& kernels, int64_t m, int64_t used, int64_t words, int vectors,
            bool worth_threads, const F& fill)
      : width_(kernels.width),
        m_(m),
        words_(words),
        tile_rows_(int64_t(kernels.width) * vectors),
        buffer_(round_up(m, kernels.width) * words * 4) {
    const int64_t w = width_;
    for_tasks((m + w - 1) / w, worth_threads, [&](int64_t begin, int64_t end) {
      const int64_t row_words = round_up(used, w);
      char* rows = scratch(w * row_words * 4);
      for (int64_t group = begin; group < end; ++group) {
        for (int64_t j = 0; j < w; ++j) {
          char* to = rows + j * row_words * 4;
          if (group * w + j < m)
            fill(group * w + j, to);
          else
            std::memset(to, 0, static_cast<size_t>(used * 4));
        }
        const int64_t t = group / vectors, lane = group % vectors * w;
        char* to = buffer_.at(first_row(t) * words_ * 4);
        kernels.transpose({rows, row_words, w, used, to + lane * 4, lanes(t)});
        if (lane == 0)
          std::memset(to + used * lanes(t) * 4, 0,
                      static_cast<size_t>((words - used) * lanes(t) * 4));
      }
    });
  }

  int64_t count() const { return (m_ + tile_rows_ - 1) / tile_rows_; }
  int64_t first_row(int64_t tile) const { return tile * tile_rows_; }
  int64_t row_count(int64_t tile) const {
    const int64_t left = m_ - first_row(tile);
    return left < tile_rows_ ? left : tile_rows_;
  }
  int vectors(int64_t tile) const {
    return static_cast<int>((row_count(tile) + width_ - 1) / width_);
  }
  int64_t lanes(int64_t tile) const { return int64_t(vectors(tile)) * width_; }
  // Word `word` of all rows of a tile.
  const char* at(int64_t tile, int64_t word) const {
    return buffer_.at((first_row(tile) * words_ + word * lanes(tile)) * 4);
  }

 private:
  int64_t width_, m_, words_, tile_rows_;
  Buffer buffer_;
};

}  // namespace bigops
