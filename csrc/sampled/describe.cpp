// What an index says of its windows (struct Lists).
#include <algorithm>
#include <cmath>

#include "sampled/engine.h"
#include "sampled/scan.h"
#include "sampled/windows.h"
#include "threads.h"

namespace pyels {
namespace {

template <class T>
void describe(const Problem& a, const T* pixels, int threads, const Lists& lists) {
  const Windows<T> windows(a, pixels);
  const Scan& scan = scan_in_use();
  const std::int64_t k = a.patch_size, dims = a.channels * k * k, n = lists.directions_count;
  const std::int64_t pixels_each = a.height * a.width;
  const float scale = a.pixels_uint8 ? 1 / 127.5f : 1.0f, shift = a.pixels_uint8 ? 1.0f : 0.0f;
  // (dims, directions): the sums over dims run side by side.
  std::vector<float> turned(static_cast<std::size_t>(dims * n));
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = 0; j < dims; ++j) turned[j * n + i] = lists.directions[i * dims + j];

  in_threads(threads, lists.count, a.interrupted, [&](auto take) {
    std::vector<T> buffer(static_cast<std::size_t>(windows.room()));
    std::vector<float> x(static_cast<std::size_t>(dims)), z(static_cast<std::size_t>(n));
    std::vector<double> sum(static_cast<std::size_t>(n));
    take([&](std::int64_t l, auto stop) {
      const std::int64_t begin = lists.begin[l], end = lists.end[l];
      std::fill(sum.begin(), sum.end(), 0.0);
      double lengths = 0;
      for (std::int64_t i = begin; i < end; ++i) {
        if (stop()) return;
        const auto window = windows.at(lists.window[i] / pixels_each, lists.window[i] % pixels_each, buffer.data());
        float length = 0;
        std::int64_t j = 0;
        for (std::int64_t c = 0; c < a.channels; ++c)
          for (std::int64_t row = 0; row < k; ++row)
            for (std::int64_t column = 0; column < k; ++column, ++j) {
              const auto pixel = static_cast<float>(window.first[c * window.channel + row * window.row + column]);
              x[j] = pixel * scale - shift - lists.origin[j];
              length += x[j] * x[j];
            }
        scan.project(x.data(), dims, turned.data(), n, z.data());
        for (std::int64_t d = 0; d < n; ++d) sum[d] += static_cast<double>(z[d]);
        lengths += static_cast<double>(length);
        const std::int64_t block = i / list_block * list_block;
        std::int8_t* lead = lists.lead + block * leading + i % list_block * 2;
        std::uint8_t* tail = lists.tail + block * (n - leading) / 4 + i % list_block;
        for (std::int64_t d = 0; d < leading; ++d)
          lead[d / 2 * list_block * 2 + d % 2] =
              static_cast<std::int8_t>(std::clamp(std::nearbyint(z[d] / lists.step[d]), -127.0f, 127.0f));
        for (std::int64_t d = leading; d < n; d += 4) {
          unsigned byte = 0;
          for (int j = 0; j < 4; ++j)
            byte |= static_cast<unsigned>(std::clamp(z[d + j] / lists.step[d + j] + 2, 0.0f, 3.0f)) << 2 * j;
          tail[(d - leading) / 4 * list_block] = static_cast<std::uint8_t>(byte);
        }
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
