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
  const RegionWindows of_region(a, lists.region);
  const Windows<T> windows(a, pixels, of_region.inside());
  const Scan& scan = scan_in_use();
  const std::int64_t rows = of_region.rows(), columns = of_region.columns(), dims = a.channels * rows * columns;
  const std::int64_t n = lists.directions_count, overhangs = of_region.overhangs(), pixels_each = a.height * a.width;
  const float scale = a.pixels_uint8 ? 1 / 127.5f : 1.0f, shift = a.pixels_uint8 ? 1.0f : 0.0f;
  // (dims, directions): the sums over dims run side by side.
  std::vector<float> turned(static_cast<std::size_t>(dims * n));
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = 0; j < dims; ++j) turned[j * n + i] = lists.directions[i * dims + j];
  std::vector<std::int64_t> seen;  // (rows, columns) of a window
  for (std::int64_t row = 0; row < rows; ++row)
    for (std::int64_t column = 0; column < columns; ++column) seen.push_back(of_region.seen(row, column) - 1);

  in_threads(threads, lists.count, a.interrupted, [&](auto take) {
    std::vector<T> buffer(static_cast<std::size_t>(windows.room()));
    std::vector<float> x(static_cast<std::size_t>(dims)), z(static_cast<std::size_t>(n));
    std::vector<float> length(static_cast<std::size_t>(overhangs));
    std::vector<double> sum(static_cast<std::size_t>(n)), lengths(static_cast<std::size_t>(overhangs));
    take([&](std::int64_t l, auto stop) {
      const std::int64_t begin = lists.begin[l], end = lists.end[l];
      std::fill(sum.begin(), sum.end(), 0.0), std::fill(lengths.begin(), lengths.end(), 0.0);
      for (std::int64_t i = begin; i < end; ++i) {
        if (stop()) return;
        const auto window = windows.at(lists.window[i] / pixels_each, lists.window[i] % pixels_each, buffer.data());
        std::fill(length.begin(), length.end(), 0.0f);  // squared, of what is seen for this overhang and no larger one
        std::int64_t j = 0;
        for (std::int64_t c = 0; c < a.channels; ++c)
          for (std::int64_t row = 0, place = 0; row < rows; ++row)
            for (std::int64_t column = 0; column < columns; ++column, ++place, ++j) {
              const auto pixel = static_cast<float>(window.first[c * window.channel + row * window.row + column]);
              x[j] = pixel * scale - shift - lists.origin[j];
              length[seen[place]] += x[j] * x[j];
            }
        scan.project(x.data(), dims, turned.data(), n, z.data());
        for (std::int64_t d = 0; d < n; ++d) sum[d] += static_cast<double>(z[d]);
        double longer = 0;
        for (std::int64_t o = overhangs; o-- > 0;) lengths[o] += longer += static_cast<double>(length[o]);
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
      for (std::int64_t d = 0; d < n; ++d) lists.mean[l * n + d] = static_cast<float>(sum[d] / members);
      for (std::int64_t o = 0; o < overhangs; ++o) {
        double apart = 0;  // of the mean from the origin
        for (std::int64_t d = 0; d < lists.usable[o]; ++d) apart += std::pow(sum[d] / members, 2);
        lists.spread[o * lists.count + l] = static_cast<float>(std::max(0.0, lengths[o] / members - apart));
      }
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
