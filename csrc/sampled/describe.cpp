// What an index says of its windows (struct Lists).
#include <algorithm>
#include <cmath>

#include "sampled/engine.h"
#include "sampled/windows.h"
#include "threads.h"

namespace pyels {
namespace {

template <class T>
void describe(const Problem& a, const T* pixels, int threads, const Lists& lists) {
  const Windows<T> windows(a, pixels);
  const std::int64_t k = a.patch_size, dims = a.channels * k * k, n = lists.directions_count;
  const float scale = a.pixels_uint8 ? 1 / 127.5f : 1.0f, shift = a.pixels_uint8 ? 1.0f : 0.0f;
  // (dims, directions): the sums over dims run side by side.
  std::vector<float> turned(static_cast<std::size_t>(dims * n));
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = 0; j < dims; ++j) turned[j * n + i] = lists.directions[i * dims + j];

  in_threads(threads, lists.count, a.interrupted, [&](auto take) {
    std::vector<T> buffer(static_cast<std::size_t>(windows.room()));
    std::vector<float> z(static_cast<std::size_t>(n));
    std::vector<double> sum(static_cast<std::size_t>(n));
    take([&](std::int64_t l, auto stop) {
      const std::int64_t begin = lists.begin[l], end = lists.end[l];
      std::fill(sum.begin(), sum.end(), 0.0);
      double lengths = 0;
      for (std::int64_t i = begin; i < end; ++i) {
        if (stop()) return;
        const auto window = windows.at(lists.image[i], lists.place[i], buffer.data());
        std::fill(z.begin(), z.end(), 0.0f);
        float length = 0;
        for (std::int64_t j = 0; j < dims; ++j) {
          const std::int64_t at = j / (k * k) * window.channel + j / k % k * window.row + j % k;
          const auto pixel = static_cast<float>(window.first[at]);
          const float value = pixel * scale - shift - lists.origin[j];
          length += value * value;
          for (std::int64_t d = 0; d < n; ++d) z[d] += value * turned[j * n + d];
        }
        float described = 0, inside = 0;
        std::int8_t* to = lists.code + i / list_block * list_block * n + i % list_block * 2;
        for (std::int64_t d = 0; d < n; ++d) {
          sum[d] += static_cast<double>(z[d]);
          const float coordinate = std::clamp(std::nearbyint(z[d] / lists.step[d]), -127.0f, 127.0f);
          to[d / 2 * list_block * 2 + d % 2] = static_cast<std::int8_t>(coordinate);
          described += coordinate * lists.step[d] * coordinate * lists.step[d];
          inside += z[d] * z[d];
        }
        lists.norm[i] = described, lists.rest[i] = std::max(0.0f, length - inside);
        lengths += static_cast<double>(length);
      }
      const auto members = static_cast<double>(std::max<std::int64_t>(1, end - begin));
      double apart = 0;  // of the mean from the origin
      for (std::int64_t d = 0; d < n; ++d) {
        lists.mean[l * n + d] = static_cast<float>(sum[d] / members);
        apart += std::pow(sum[d] / members, 2);
      }
      lists.spread[l] = static_cast<float>(std::max(0.0, lengths / members - apart));
    });
  });
}

}  // namespace

void describe_lists(const Problem& a, const CpuOptions& options, const Lists& lists) {
  if (a.pixels_uint8)
    describe(a, a.pixels_uint8, options.threads, lists);
  else
    describe(a, a.pixels_float, options.threads, lists);
}

}  // namespace pyels
