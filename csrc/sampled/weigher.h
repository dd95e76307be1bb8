// What weighs windows that were picked, exactly.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "sampled/prospects.h"
#include "sampled/scan.h"
#include "sampled/windows.h"

namespace pyels {

// Of one thread.
class Weigher {
 public:
  Weigher(const Problem& a, const RegionWindows& region, const QueryLayout& layout)
      : scan_(scan_in_use()), zero_(layout.zero), pair_{a.channels, 0, 0, layout.row, layout.channel, 0, 0} {
    if (a.pixels_uint8)
      bytes_.emplace(a, a.pixels_uint8, region.inside());
    else
      floats_.emplace(a, a.pixels_float, region.inside());
    centre.resize(static_cast<std::size_t>(a.channels));
  }

  std::vector<double> centre;  // (C), of the window that was weighed last

  // Of the window at a place = row * W + column of an image.
  double log_weight(const Pixel& q, std::int64_t image, std::int64_t place) {
    const float squared = bytes_ ? distance(*bytes_, scan_.distance_uint8, q, image, place)
                                 : distance(*floats_, scan_.distance_float, q, image, place);
    return -q.scale * static_cast<double>(squared);
  }

  // Asks for the memory of one that will be weighed soon.
  void prefetch(std::int64_t image, std::int64_t place) const {
    bytes_ ? bytes_->windows.prefetch(image, place) : floats_->windows.prefetch(image, place);
  }

 private:
  template <class T>
  struct Of {
    const Windows<T> windows;
    std::vector<T> buffer;

    Of(const Problem& a, const T* pixels, bool wrap)
        : windows(a, pixels, wrap), buffer(static_cast<std::size_t>(windows.room())) {}
  };

  template <class T, class Distance>
  float distance(Of<T>& of, Distance between, const Pixel& q, std::int64_t image, std::int64_t place) {
    const auto window = of.windows.at(image, place, of.buffer.data());
    pair_.rows = window.rows, pair_.columns = window.columns;
    pair_.row = window.row, pair_.channel = window.channel;
    for (std::size_t c = 0; c < centre.size(); ++c)
      centre[c] =
          static_cast<double>(window.first[static_cast<std::int64_t>(c) * window.channel + window.centre]) - zero_;
    return between(pair_, q.x, window.first);
  }

  const Scan& scan_;
  const double zero_;
  std::optional<Of<std::uint8_t>> bytes_;  // or
  std::optional<Of<float>> floats_;
  WindowPair pair_;
};

}  // namespace pyels
