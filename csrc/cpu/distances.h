// The distances of all pairs (p, p + d) of one displacement d, and the sums over windows that give them: what the kernels
// of both passes share. Included by each unit that is compiled for one instruction set.
#pragma once

#include "cpu/maps.h"
#include "cpu/vec.h"

namespace pyels::PYELS_ISA_NAME {
namespace {

// Window sizes that the compiler does not know.
constexpr int any_size = 0;   // k >= the band
constexpr int weighted = -1;  // any k, the places of a window by their weights

inline std::int32_t wrapped(std::int32_t i, std::int64_t n) {
  while (i < 0) i += static_cast<std::int32_t>(n);
  while (i >= n) i -= static_cast<std::int32_t>(n);
  return i;
}

// One row of a map: where its pixels lie, channel 0. Null outside a clipped window.
struct MapRow {
  const float *x, *phi;
};

// The row whose first place is (query, column.query) against (source, column.source).
inline MapRow map_row(const MapTask& t, std::int32_t query, std::int32_t source, const Axis& column) {
  if (t.wraps)
    query = wrapped(query, t.height), source = wrapped(source, t.height);
  else if (query < 0 || source < 0 || query >= t.height || source >= t.height)
    return {nullptr, nullptr};
  return {t.x + query * t.x_width + t.x_margin + column.query,
          t.panel + (source * t.panel_width + t.panel_margin + column.source) * kLanes};
}

// What D is made with, apart from a task that what is stored might change, for all that compilers know.
struct Level {
  float alpha, noise;
  std::int64_t channels, x_image, panel_image;  // values of a channel

  explicit Level(const MapTask& t)
      : alpha(static_cast<float>(t.alpha)),
        noise(t.noise),
        channels(t.channels),
        x_image(t.height * t.x_width),
        panel_image(t.height * t.panel_width * kLanes) {}
};

// D at place j of a row. C = 0: any number of channels. less: by the noise.
template <int C, bool precise = false, bool less = false>
PYELS_INLINE Vec squares(const MapTask& t, const Level& level, const MapRow& row, std::int64_t j) {
  const std::int64_t channels = C ? C : level.channels;
  const float *x = row.x + j, *phi = row.phi + j * kLanes, *precision = precise ? t.precision + (x - t.x) : nullptr;
  Vec sum{};
  if (less) sum -= level.noise;
  for (std::int64_t c = 0; c < channels; ++c) {
    const Vec difference = *x - level.alpha * load(phi);
    const Vec other = precise ? *precision * difference : difference;
    sum = c || less ? sum + other * difference : other * difference;
    x += level.x_image, phi += level.panel_image;
    if (precise) precision += level.x_image;
  }
  keep_apart(sum);
  return sum;
}

// Sums of k consecutive terms for a band of windows, the first at term 0 and each a term further on: from term k - 1,
// which they share, down to where each begins, and from term k up to where it ends; with weights `taps` one after the
// other. put(u, sum) takes that of window u; the order in which its terms are added depends on u alone.
template <int K, int band, class Term, class Put>
PYELS_INLINE void sum_windows(int k, const float* taps, Term term, Put put) {
  if constexpr (K == weighted) {
    Vec sums[band] = {};
    for (int i = 0; i < k; ++i)
#pragma GCC unroll 8
      for (int u = 0; u < band; ++u) sums[u] += taps[i] * term(i + u);
#pragma GCC unroll 8
    for (int u = 0; u < band; ++u) put(u, sums[u]);
  } else {
    if constexpr (K > 0) k = K;
    Vec down[band], sum = term(k - 1);
#pragma GCC unroll 16
    for (int i = k - 2; i >= band; --i) sum += term(i);
#pragma GCC unroll 8
    for (int u = band - 1; u >= 0; --u) {
      if (u < k - 1) sum += term(u);
      down[u] = sum;
    }
    put(0, down[0]);
    Vec up{};
#pragma GCC unroll 8
    for (int u = 1; u < band; ++u) {
      up = u > 1 ? up + term(k + u - 1) : term(k);
      put(u, down[u] + up);
    }
  }
}

// Window sums of D along a row, one for each output of `column`. aligned: see for_each_run.
template <int K, int band, int C, bool aligned>
void sums_along_row(const MapTask& t, const MapRow& row, const Axis& column, float* line, float* out) {
  const std::int32_t r = t.k_columns / 2, places = column.outputs + 2 * r;
  const Level level(t);
  // Windows of a size and channels that the compiler knows have too few values for MapTask::noise.
  constexpr bool less = K == any_size || (K > 0 && C == 0);
  static_assert(less || K == weighted || K * K * C < few_values);
#pragma GCC unroll 4
  for (std::int32_t j = 0; j < places; ++j) store(line + j * kLanes, squares<C, K == weighted, less>(t, level, row, j));
  for (std::int32_t j = 0, count; j < column.outputs; j += count) {
    const std::int32_t p = t.wraps ? wrapped(column.query + r + j, t.width) : column.query + r + j;
    const std::int32_t before = aligned ? p % band : 0;
    count = aligned ? least(band - before, static_cast<std::int32_t>(t.width) - p) : band;
    const float* terms = line + (j - before) * kLanes;
    float* sums = out + (j - before) * kLanes;
    sum_windows<K, band>(
        t.k_columns, t.column_taps, [&](int i) __attribute__((always_inline)) { return load(terms + i * kLanes); },
        [&](int u, Vec sum) __attribute__((always_inline)) {
          if (!aligned || (u >= before && u < before + count)) store(sums + u * kLanes, sum);
        });
  }
}

// Sums over k rows of `outputs` sums along rows, for a band of windows one row below the other.
template <int K, int band>
void sums_over_rows(const float* const* rows, int k, const float* taps, std::int32_t outputs, float* out,
                    std::int64_t row_size) {
  for (std::int64_t j = 0; j < outputs * kLanes; j += kLanes)
    sum_windows<K, band>(
        k, taps, [&](int i) __attribute__((always_inline)) { return load(rows[i] + j); },
        [&](int u, Vec sum) __attribute__((always_inline)) { store(out + u * row_size + j, sum); });
}

// The window of one output in the map: first place and extent.
struct MapWindow {
  std::int32_t query_row, source_row, rows;
  Axis column;
  std::int32_t columns;
};

// Its squared distances in double: the same terms, one after the other.
inline DoubleVec exact_distance(const MapTask& t, const MapWindow& window) {
  const double noise = static_cast<double>(t.noise) / static_cast<double>(t.channels);
  DoubleVec sum{};
  for (std::int64_t c = 0; c < t.channels; ++c)
    for (std::int32_t i = 0; i < window.rows; ++i) {
      const MapRow row = map_row(t, window.query_row + i, window.source_row + i, window.column);
      if (!row.x) continue;
      const float* x = row.x + c * t.height * t.x_width;
      const float* phi = row.phi + c * t.height * t.panel_width * kLanes;
      for (std::int32_t j = 0; j < window.columns; ++j) {
        const DoubleVec difference = static_cast<double>(x[j]) - t.alpha * widen(load(phi + j * kLanes));
        if (t.precision) {
          const double taps = t.whole_image ? 1.0 : t.exact_row_taps[i] * t.exact_column_taps[j];
          sum = sum + (taps * t.precision[x - t.x + j]) * (difference * difference);
        } else {
          sum = sum + (difference * difference - noise);
        }
      }
    }
  return sum;
}

// ---- Squares -----------------------------------------------------------------------------------------------------

// Consecutive outputs of a row, whose pixels p lie side by side.
struct Run {
  std::int64_t p;            // of the first output
  const float* distances;    // (outputs)[L]
  const float* centres;      // (outputs)[L] of channel 0 of what answers
  std::int32_t at;           // number of its source pixel
  MapWindow window;          // its window
  const float* const* rows;  // (window.rows) sums along the rows of the windows
  std::int64_t first;        // place of the first output in these
};

// Output i of a run by itself.
inline MapWindow window_of(const Run& run, std::int32_t i) {
  MapWindow window = run.window;
  window.column.query += i, window.column.source += i;
  return window;
}

// Where distances are too large for float32: either way, as they are less by what noise makes (MapTask::noise).
PYELS_INLINE IntVec beyond(Vec distance, float limit) { return (distance > limit) | (distance < -limit); }

// The same of whatever may matter at `count` pixels: that lies between offset and offset + skip, over the scale.
inline bool any_beyond(const MapTask& t, const float* offset, std::int64_t count) {
  const float lowest = -static_cast<float>(t.scale) * t.wide_above, highest = -lowest - t.skip;
  int beyond = 0;  // which compilers make a vector of, and not of a bool
  for (std::int64_t j = 0; j < count; ++j) beyond |= !(offset[j] <= highest);
  if (t.noise > 0.0f)  // else no distance is below 0
    for (std::int64_t j = 0; j < count; ++j) beyond |= offset[j] < lowest;
  return beyond;
}

// Its distances with sums over rows in double.
PYELS_INLINE DoubleVec wide_distance(const MapTask& t, const Run& run, std::int64_t i) {
  DoubleVec distances{};
  for (std::int32_t row = 0; row < run.window.rows; ++row) {
    const DoubleVec sum = widen(load(run.rows[row] + (run.first + i) * kLanes));
    distances = distances + (t.precision ? t.exact_row_taps[row] * sum : sum);
  }
  return distances;
}

// weigh(run, outputs) for all outputs of a displacement, row by row. aligned: equal windows have equal distances, bit
// for bit, since bands start at fixed places of the query: for ties.
template <int K, int band_rows, int band_columns, int C, bool aligned, class Weigh>
PYELS_INLINE void for_each_run(const MapTask& t, const Axis& row, const Axis& column, Weigh weigh) {
  const int k = K > 0 ? K : t.k_rows;
  const std::int32_t r_rows = t.k_rows / 2, r_columns = t.k_columns / 2, map_rows = row.outputs + k - 1;
  const std::int64_t row_size = kernel_row(t.width) * kLanes;
  float* distances = t.scratch;  // of a band
  float* zeros = distances + kernel_band * row_size;
  float* sums = zeros + row_size;  // of the last rows of the map; where it wraps around, of all its rows once
  const std::int32_t kept = t.wraps && map_rows > t.height ? static_cast<std::int32_t>(t.height) : k + kernel_band - 1;
  float* line = sums + kept * row_size + kernel_band * kLanes;
  // Where the sums of a row are. Bands may start before the first and end behind the last: any row will do there.
  const float** row_at = t.map_rows + kernel_band;
  for (std::int32_t u = 1; u < band_rows; ++u) row_at[-u] = row_at[map_rows + u - 1] = zeros;
  std::int32_t summed = 0;  // rows of the map
  for (std::int32_t i = 0, count; i < row.outputs; i += count) {
    const std::int32_t p_row = t.wraps ? wrapped(row.query + r_rows + i, t.height) : row.query + r_rows + i;
    const std::int32_t before = aligned ? p_row % band_rows : 0;
    count = least(least(band_rows - before, row.outputs - i), static_cast<std::int32_t>(t.height) - p_row);
    for (; summed < i + count + k - 1; ++summed) {
      float* own = sums + summed % kept * row_size;
      const MapRow next = map_row(t, row.query + summed, row.source + summed, column);
      const bool again = t.wraps && summed >= t.height;
      if (next.x && !again) sums_along_row<K, band_columns, C, aligned>(t, next, column, line, own);
      row_at[summed] = next.x ? own : zeros;
    }
    sums_over_rows<K, band_rows>(row_at + i - before, k, t.row_taps, column.outputs, distances, row_size);

    for (std::int32_t u = before; u < before + count; ++u) {
      const std::int32_t top = i - before + u;  // first row of the window
      const std::int32_t q_row = row.source + r_rows + top, q = column.source + r_columns;
      for (std::int32_t j = 0, n; j < column.outputs; j += n) {
        const std::int32_t p = t.wraps ? wrapped(column.query + r_columns + j, t.width) : column.query + r_columns + j;
        n = least(column.outputs - j, static_cast<std::int32_t>(t.width) - p);
        const Run run{(p_row - before + u) * t.width + p,
                      distances + u * row_size + j * kLanes,
                      t.answers + (q_row * t.panel_width + t.panel_margin + q + j) * kLanes,
                      t.at + q_row * static_cast<std::int32_t>(t.width) + q + j,
                      {row.query + top, row.source + top, k, {n, column.query + j, column.source + j}, t.k_columns},
                      row_at + top,
                      j};
        weigh(run, n);
      }
    }
  }
}

// ---- Whole images ------------------------------------------------------------------------------------------------

// Row sums first, and their sum in double: the rounding error grows with W, not with H * W.
template <bool precise>
DoubleVec image_distance(const MapTask& t, const Axis& row, const Axis& column) {
  DoubleVec total{};
  const Level level(t);
  for (std::int32_t i = 0; i < row.outputs; ++i) {
    const MapRow at = map_row(t, row.query + i, row.source + i, column);
    Vec sum{};
    for (std::int32_t j = 0; j < column.outputs; ++j) sum += squares<0, precise>(t, level, at, j);
    total = total + widen(sum);
  }
  return total;
}

// ---- What fits a task --------------------------------------------------------------------------------------------

template <class Task>
using Displacement = void (*)(const Task&, const Axis&, const Axis&);

// Body::squares<K, rows of a band, columns of a band, C> with the number of channels known to the compiler where it is a
// common one, and the window size. Windows that are not square reach beyond the image along one axis.
template <class Body, int K>
Displacement<typename Body::Task> with_channels(std::int64_t channels) {
  constexpr int band = K == any_size || K > kernel_band ? kernel_band : K;
  return channels == 1   ? Body::template squares<K, band, band, 1>
         : channels == 3 ? Body::template squares<K, band, band, 3>
                         : Body::template squares<K, band, band, 0>;
}

template <class Body>
Displacement<typename Body::Task> with_any_size(const MapTask& t, std::int64_t channels) {
  constexpr int band = kernel_band;
  const bool low = t.k_rows < band, narrow = t.k_columns < band;
  return low && narrow ? Body::template squares<any_size, 1, 1, 0>
         : low         ? Body::template squares<any_size, 1, band, 0>
         : narrow      ? Body::template squares<any_size, band, 1, 0>
                       : with_channels<Body, any_size>(channels);
}

template <class Body>
Displacement<typename Body::Task> fitting(const MapTask& t) {
  if (t.precision) return Body::template squares<weighted, 4, 4, 0>;
  const std::int64_t channels = t.channels == t.answer_channels ? t.channels : 0;
  switch (t.k_rows == t.k_columns ? t.k_rows : 0) {
    case 3: return with_channels<Body, 3>(channels);
    case 5: return with_channels<Body, 5>(channels);
    case 7: return with_channels<Body, 7>(channels);
    case 9: return with_channels<Body, 9>(channels);
    case 11: return with_channels<Body, 11>(channels);
    case 13: return with_channels<Body, 13>(channels);
    case 15: return with_channels<Body, 15>(channels);
    case 17: return with_channels<Body, 17>(channels);
    default: return with_any_size<Body>(t, channels);
  }
}

template <class Task>
void for_each_displacement(const Task& t, Displacement<Task> one) {
  for (std::int32_t i = 0; i < t.n_rows; ++i)
    for (std::int32_t j = 0; j < t.n_columns; ++j) one(t, t.rows[i], t.columns[j]);
}

}  // namespace
}  // namespace pyels::PYELS_ISA_NAME
