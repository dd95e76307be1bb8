// The windows of a bank's images, as they lie in memory.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pyels.h"

namespace pyels {

template <class T>
class Windows {
 public:
  // A window's first pixel, and the distances in memory of its rows and channels.
  struct View {
    const T* first;
    std::int64_t row, channel;
  };

  Windows(const Problem& a, const T* pixels)
      : pixels_(pixels),
        end_(pixels + a.images * a.channels * a.height * a.width),
        channels_(a.channels),
        height_(a.height),
        width_(a.width),
        k_(a.patch_size) {}

  // The k x k window around `place` = row * W + column of an image. Each row can be read in steps of 16 pixels; where
  // that would be beyond the bank, or the window reaches beyond the image and wraps around, it is a copy in `buffer`.
  View at(std::int64_t image, std::int64_t place, T* buffer) const {
    const std::int64_t row = place / width_ - k_ / 2, column = place % width_ - k_ / 2, plane = height_ * width_;
    const T* from = pixels_ + image * channels_ * plane;
    const bool inside = row >= 0 && column >= 0 && row + k_ <= height_ && column + k_ <= width_;
    const std::int64_t read = (channels_ - 1) * plane + (k_ - 1) * width_ + (k_ + 15) / 16 * 16;
    if (inside && end_ - from >= row * width_ + column + read) return {from + row * width_ + column, width_, plane};
    copy(from, row, column, buffer);
    return {buffer, k_, k_ * k_};
  }

  // Size of the buffer.
  std::int64_t room() const { return channels_ * k_ * k_ + 16; }

  // Copies a window of `image`, whose first pixel is (row, column), to (C, k, k).
  void copy(const T* image, std::int64_t row, std::int64_t column, T* to) const {
    for (std::int64_t c = 0; c < channels_; ++c, image += height_ * width_)
      for (std::int64_t i = 0; i < k_; ++i) {
        const T* from = image + (row + i + height_) % height_ * width_;
        for (std::int64_t j = 0; j < k_; ++j) *to++ = from[(column + j + width_) % width_];
      }
  }

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
  const T *pixels_, *end_;
  std::int64_t channels_, height_, width_, k_;
};

}  // namespace pyels
