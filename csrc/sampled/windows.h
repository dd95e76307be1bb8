// The windows of a bank's images, as they lie in memory, and those of a region's pixels beside them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pyels.h"
#include "sources.h"

namespace pyels {

// The windows of a region's pixels (struct Lists): k x k inside, where they may wrap around, and clipped at a side.
class RegionWindows {
 public:
  RegionWindows(const Problem& a, std::int64_t region)
      : down_(region / 3),
        across_(region % 3),
        height_(a.height),
        width_(a.width),
        k_(a.patch_size),
        r_(k_ / 2),
        wraps_(a.sources == Sources::circular) {}

  bool inside() const { return down_ == 0 && across_ == 0; }
  std::int64_t rows() const { return down_ ? 2 * r_ : k_; }
  std::int64_t columns() const { return across_ ? 2 * r_ : k_; }
  std::int64_t overhangs() const { return inside() ? 1 : r_; }

  // Of a pixel of the region: by how many rows or columns its window overhangs the side; 1 inside.
  std::int64_t overhang(std::int64_t row, std::int64_t column) const {
    return down_ ? beyond(down_, row, height_) : across_ ? beyond(across_, column, width_) : 1;
  }
  // What is not seen at the low end of a window that overhangs the high side.
  std::int64_t skipped_rows(std::int64_t overhang) const { return down_ == 2 ? overhang - 1 : 0; }
  std::int64_t skipped_columns(std::int64_t overhang) const { return across_ == 2 ? overhang - 1 : 0; }
  // For how many of the overhangs the place of a window is on the image: for the lowest ones.
  std::int64_t seen(std::int64_t row, std::int64_t column) const {
    if (inside()) return 1;
    const std::int64_t side = down_ ? down_ : across_, line = down_ ? row : column;
    return std::min(r_, side == 1 ? 2 * r_ - line : line + 1);
  }
  // The place of the window that is compared with a pixel's: a listed one's, as far over the side as the pixel's own.
  std::int64_t beside(std::int64_t listed, std::int64_t row, std::int64_t column) const {
    return down_ ? row * width_ + listed % width_ : across_ ? listed / width_ * width_ + column : listed;
  }

  // The place of a window that is moved as one pixel of the region is to another, by rows and columns; -1: there is none.
  std::int64_t moved(std::int64_t place, std::int64_t rows, std::int64_t columns) const {
    const std::int64_t row = along(place / width_ + rows, down_, height_);
    const std::int64_t column = along(place % width_ + columns, across_, width_);
    return row < 0 || column < 0 ? -1 : row * width_ + column;
  }

 private:
  std::int64_t along(std::int64_t to, std::int64_t side, std::int64_t length) const {
    if (wraps_) return (to + length) % length;
    return side || (to >= r_ && to < length - r_) ? to : -1;  // over a side, as far as the pixel
  }
  std::int64_t beyond(std::int64_t side, std::int64_t place, std::int64_t length) const {
    return side == 1 ? r_ - place : place + r_ + 1 - length;
  }

  std::int64_t down_, across_;  // which spans of rows and columns
  std::int64_t height_, width_, k_, r_;
  bool wraps_;
};

template <class T>
class Windows {
 public:
  // A window's first pixel, the distances in memory of its rows and channels, its size, and where its centre is.
  struct View {
    const T* first;
    std::int64_t row, channel, rows, columns, centre;
  };

  // They wrap around the image, else they are clipped.
  Windows(const Problem& a, const T* pixels, bool wrap)
      : pixels_(pixels),
        end_(pixels + a.images * a.channels * a.height * a.width),
        channels_(a.channels),
        height_(a.height),
        width_(a.width),
        k_(a.patch_size),
        wrap_(wrap) {}

  // The window around `place` = row * W + column of an image. Each row can be read in steps of 16 pixels; where that
  // would be beyond the bank, or the window reaches beyond the image and wraps around, it is a copy in `buffer`.
  View at(std::int64_t image, std::int64_t place, T* buffer) const {
    const std::int64_t plane = height_ * width_, r = k_ / 2, centre_row = place / width_,
                       centre_column = place % width_;
    std::int64_t row = centre_row - r, column = centre_column - r, rows = k_, columns = k_;
    if (!wrap_) {
      rows = std::min(height_, row + k_), columns = std::min(width_, column + k_);
      row = std::max<std::int64_t>(0, row), column = std::max<std::int64_t>(0, column);
      rows -= row, columns -= column;
    }
    const T* from = pixels_ + image * channels_ * plane;
    const bool inside = row >= 0 && column >= 0 && row + rows <= height_ && column + columns <= width_;
    const std::int64_t read = (channels_ - 1) * plane + (rows - 1) * width_ + (columns + 15) / 16 * 16;
    View view{from + row * width_ + column, width_, plane, rows, columns, 0};
    if (!inside || end_ - from < row * width_ + column + read) {
      copy(from, row, column, rows, columns, buffer);
      view.first = buffer, view.row = columns, view.channel = rows * columns;
    }
    view.centre = (centre_row - row) * view.row + centre_column - column;
    return view;
  }

  // Size of the buffer.
  std::int64_t room() const { return channels_ * k_ * k_ + 16; }

  // Asks for the memory of a window that will be looked at soon.
  void prefetch(std::int64_t image, std::int64_t place) const {
    const std::int64_t plane = height_ * width_;
    const T* from = pixels_ + image * channels_ * plane;
    const std::int64_t first = std::max<std::int64_t>(0, place - k_ / 2 * (width_ + 1));
    const std::int64_t last = std::min<std::int64_t>(plane - 1, place + k_ / 2 * (width_ + 1));
    for (std::int64_t c = 0; c < channels_; ++c, from += plane)
      for (const T* at = from + first; at <= from + last; at += 64 / sizeof(T)) __builtin_prefetch(at);
  }

 private:
  // Copies the window whose first pixel is (row, column) to (C, rows, columns).
  void copy(const T* image, std::int64_t row, std::int64_t column, std::int64_t rows, std::int64_t columns,
            T* to) const {
    for (std::int64_t c = 0; c < channels_; ++c, image += height_ * width_)
      for (std::int64_t i = 0; i < rows; ++i) {
        const T* from = image + (row + i + height_) % height_ * width_;
        for (std::int64_t j = 0; j < columns; ++j) *to++ = from[(column + j + width_) % width_];
      }
  }

  const T *pixels_, *end_;
  std::int64_t channels_, height_, width_, k_;
  bool wrap_;
};

}  // namespace pyels
