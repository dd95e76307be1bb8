// Pixels side by side see nearly the same: what is heavy for one is likely so, moved along, for those around it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <utility>
#include <vector>

#include "sampled/estimate.h"
#include "sampled/prospects.h"
#include "sampled/windows.h"

namespace pyels {

// Pixels that are no further away, along both axes, tell each other which windows are heavy.
constexpr std::int64_t around = 2;

// The heaviest windows of some pixels, by where these are.
class HeavyBeside {
 public:
  HeavyBeside(const Problem& a, const RegionWindows& region, std::span<const Pixel> pixels,
              std::vector<Heaviest> heaviest)
      : height_(a.height),
        width_(a.width),
        region_(region),
        first_query_(pixels.front().b),
        heaviest_(std::move(heaviest)) {
    number_.assign(static_cast<std::size_t>((pixels.back().b - first_query_ + 1) * height_ * width_), -1);
    for (std::size_t i = 0; i < pixels.size(); ++i)
      number_[at(pixels[i].b, pixels[i].place)] = static_cast<std::int32_t>(i);
  }

  // Those of the pixels around one, moved along, in ascending order.
  std::vector<std::int64_t> around_pixel(const Pixel& q) const {
    const std::int64_t size = height_ * width_;
    std::vector<std::int64_t> sources;
    for (std::int64_t row = std::max<std::int64_t>(0, q.place.row - around);
         row <= std::min(height_ - 1, q.place.row + around); ++row)
      for (std::int64_t column = std::max<std::int64_t>(0, q.place.column - around);
           column <= std::min(width_ - 1, q.place.column + around); ++column) {
        const std::int64_t rows = q.place.row - row, columns = q.place.column - column;
        const std::int32_t other = number_[at(q.b, {row, column})];
        if (other < 0 || (rows == 0 && columns == 0)) continue;
        for (const Heavy& one : heaviest_[static_cast<std::size_t>(other)]) {
          if (one.source < 0) break;
          const std::int64_t place = region_.moved(one.source % size, rows, columns);
          if (place >= 0) sources.push_back(one.source / size * size + place);
        }
      }
    std::sort(sources.begin(), sources.end());
    sources.erase(std::unique(sources.begin(), sources.end()), sources.end());
    return sources;
  }

 private:
  std::size_t at(std::int64_t b, const Place& place) const {
    return static_cast<std::size_t>(((b - first_query_) * height_ + place.row) * width_ + place.column);
  }

  const std::int64_t height_, width_;
  const RegionWindows& region_;
  const std::int64_t first_query_;
  const std::vector<Heaviest> heaviest_;
  std::vector<std::int32_t> number_;  // (queries, H, W), of the pixel among those there are, or -1
};

}  // namespace pyels
