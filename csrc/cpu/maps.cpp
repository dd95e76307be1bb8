// Displacement maps: the distances of all pairs (p, p + d) at once.
//
// For a fixed displacement d, the squared distance of the windows around p and q = p + d is a k x k box sum of the map
//
//     D(z) = sum_c (x_c(z) - alpha * phi_c(z + d))^2
//
// so a pair costs a few operations whatever k is. Every term is non-negative and sums only ever add, so the distance
// keeps full float32 relative accuracy.
//
// Layout: L bank images side by side in the lanes of a vector; x is broadcast. A displacement is worked off in bands of
// a few rows: map and sums along the row, sums over k rows, weights. What passes between these steps stays in the
// nearest caches. Precision: float32. Where its error in the log-weight could show (a large distance), sums over rows
// are in double, and far beyond that the one distance is evaluated again in double if its weight stands out. The caller
// moves the state into double before rounding of long sums could show.
//
// Weights are summed relative to `reference`, which follows the running maximum lazily: it is raised only when a
// log-weight exceeds it by more than `headroom`, so sums stay below 2^headroom * terms, far from overflow.
#include "cpu/maps.h"

#include "cpu/vec.h"
#include "float_sums.h"

namespace pyels::PYELS_ISA_NAME {
namespace {

constexpr int kChunk = 4;  // vectors weighed together, so that their latencies overlap

// ---- Distances ---------------------------------------------------------------------------------------------------

std::int32_t wrapped(std::int32_t i, std::int64_t n) {
  while (i < 0) i += static_cast<std::int32_t>(n);
  while (i >= n) i -= static_cast<std::int32_t>(n);
  return i;
}

// One row of a map: where its pixels lie, channel 0. Null outside a clipped window.
struct MapRow {
  const float *x, *phi;
};

// The row whose first place is (query, column.query) against (source, column.source).
MapRow map_row(const KernelTask& t, std::int32_t query, std::int32_t source, const Axis& column) {
  if (t.wraps)
    query = wrapped(query, t.height), source = wrapped(source, t.height);
  else if (query < 0 || source < 0 || query >= t.height || source >= t.height)
    return {nullptr, nullptr};
  return {t.x + query * t.x_width + t.x_margin + column.query,
          t.panel + (source * t.panel_width + t.panel_margin + column.source) * kLanes};
}

// D at place j of a row. C = 0: any number of channels.
template <int C>
PYELS_INLINE Vec squares(const KernelTask& t, const MapRow& row, std::int64_t j) {
  const float alpha = static_cast<float>(t.alpha);
  const std::int64_t channels = C ? C : t.channels;
  const float *x = row.x + j, *phi = row.phi + j * kLanes;
  Vec sum{};
  for (std::int64_t c = 0; c < channels; ++c) {
    const Vec difference = *x - alpha * load(phi);
    sum = c ? sum + difference * difference : difference * difference;
    x += t.height * t.x_width, phi += t.height * t.panel_width * kLanes;
  }
  keep_apart(sum);
  return sum;
}

// Sums of k consecutive terms for a band of windows, the first at term 0 and each a term further on: from term k - 1,
// which they share, down to where each begins, and from term k up to where it ends. put(u, sum) takes that of window u;
// the order in which its terms are added depends on u alone. K = 0: any k >= band.
template <int K, int band, class Term, class Put>
PYELS_INLINE void sum_windows(int k, Term term, Put put) {
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

// Window sums of D along a row, one for each output of `column`.
template <int K, int band, int C, bool full>
void sums_along_row(const KernelTask& t, const MapRow& row, const Axis& column, float* line, float* out) {
  const std::int32_t r = t.k_columns / 2, places = column.outputs + 2 * r;
#pragma GCC unroll 4
  for (std::int32_t j = 0; j < places; ++j) store(line + j * kLanes, squares<C>(t, row, j));
  for (std::int32_t j = 0, count; j < column.outputs; j += count) {
    const std::int32_t p = t.wraps ? wrapped(column.query + r + j, t.width) : column.query + r + j;
    const std::int32_t before = full ? p % band : 0;  // see square_windows
    count = full ? least(band - before, static_cast<std::int32_t>(t.width) - p) : band;
    const float* terms = line + (j - before) * kLanes;
    float* sums = out + (j - before) * kLanes;
    sum_windows<K, band>(
        t.k_columns, [&](int i) __attribute__((always_inline)) { return load(terms + i * kLanes); },
        [&](int u, Vec sum) __attribute__((always_inline)) {
          if (!full || (u >= before && u < before + count)) store(sums + u * kLanes, sum);
        });
  }
}

// Sums over k rows of `outputs` sums along rows, for a band of windows one row below the other.
template <int K, int band>
void sums_over_rows(const float* const* rows, int k, std::int32_t outputs, float* out, std::int64_t row_size) {
  for (std::int64_t j = 0; j < outputs * kLanes; j += kLanes)
    sum_windows<K, band>(
        k, [&](int i) __attribute__((always_inline)) { return load(rows[i] + j); },
        [&](int u, Vec sum) __attribute__((always_inline)) { store(out + u * row_size + j, sum); });
}

// The window of one output in the map: first place and extent.
struct MapWindow {
  std::int32_t query_row, source_row, rows;
  Axis column;
  std::int32_t columns;
};

// Its squared distances in double: the same terms, one after the other.
DoubleVec exact_distance(const KernelTask& t, const MapWindow& window) {
  DoubleVec sum{};
  for (std::int64_t c = 0; c < t.channels; ++c)
    for (std::int32_t i = 0; i < window.rows; ++i) {
      const MapRow row = map_row(t, window.query_row + i, window.source_row + i, window.column);
      if (!row.x) continue;
      const float* x = row.x + c * t.height * t.x_width;
      const float* phi = row.phi + c * t.height * t.panel_width * kLanes;
      for (std::int32_t j = 0; j < window.columns; ++j) {
        const DoubleVec difference = static_cast<double>(x[j]) - t.alpha * widen(load(phi + j * kLanes));
        sum = sum + difference * difference;
      }
    }
  return sum;
}

// ---- Weights -----------------------------------------------------------------------------------------------------

// Pixels of a state whose weights are moved together: p, and the pixels of y that share it.
struct State {
  std::int64_t p, y_first, y_count;
};

// Moves a state to a higher reference.
void raise_reference(const KernelTask& t, const State& state, double reference) {
  const std::int64_t p = state.p;
  const double down = t.reference[p] - reference;  // -inf while the state is empty
  const float shift = down > -126.0 ? static_cast<float>(down) : 0.0f;
  const Vec factor = down > -126.0 ? exp2(Vec{} + shift) : Vec{};
  const Vec s = load(t.s + p * kLanes);
  if (t.full) store(t.e + p * kLanes, factor * (load(t.e + p * kLanes) + s * shift));
  store(t.s + p * kLanes, factor * s);
  const std::int64_t pixels = t.height * t.width;
  for (std::int64_t c = 0; c < t.channels; ++c)
    for (std::int64_t i = state.y_first; i < state.y_first + state.y_count; ++i) {
      float* y = t.y + (c * pixels + i) * kLanes;
      store(y, factor * load(y));
    }
  t.reference[p] = reference;
  t.offset[p] = -static_cast<float>(reference);
}

// Remembers the least distance of each lane; of equal ones the first source pixel.
PYELS_INLINE void note_far(const KernelTask& t, std::int64_t p, DoubleVec distance, std::int32_t at) {
  DoubleVec& far = *reinterpret_cast<DoubleVec*>(t.far + p * kLanes);
  IntVec& far_at = *reinterpret_cast<IntVec*>(t.far_at + p * kLanes);
  const IntVec nearer = distance < far;
  far_at = (nearer | ((distance == far) & (at < far_at))) ? at : far_at;
  far = choose(nearer, distance, far);
}

// The same where float32 will do.
PYELS_INLINE void note_near(const KernelTask& t, std::int64_t p, Vec distance, std::int32_t at) {
  Vec& near = *reinterpret_cast<Vec*>(t.near + p * kLanes);
  IntVec& near_at = *reinterpret_cast<IntVec*>(t.near_at + p * kLanes);
  const IntVec nearer = (distance < near) | ((distance == near) & (at < near_at));
  near = distance < near ? distance : near;
  near_at = nearer ? at : near_at;
}

// Adds the weights of one displacement to s, e and the least distances, and gives them; false when none matters. y is
// the caller's to add to. wide() is to give the distances, where they are large, with sums in double.
template <bool full, class Wide>
PYELS_INLINE bool weigh(const KernelTask& t, const State& state, std::int32_t at, DoubleVec distances, Wide wide,
                        const MapWindow& window, Vec& w) {
  const std::int64_t p = state.p;
  // True for every lane while the state is empty (reference -inf).
  const Vec distance = narrow(distances);
  IntVec matters = t.skip + t.slack - static_cast<float>(t.reference[p]) > t.least_scale * distance;
  if (!any(matters)) return false;
  const IntVec far = matters & (distance > t.wide_above);
  if (any(far)) {
    distances = choose(far, wide(), distances);
    IntVec exact = far & (distance > t.exact_above);
    if (!full && any(exact)) {  // only what stands out; the full posterior also wants ties to be ties
      const Vec relative = narrow(-t.scale * distances - t.reference[p]);
      const Vec most = Vec{} + 120.0f;
      const Vec weight = exp2(relative < most ? relative : most);
      exact &= (weight > stands_out * load(t.s + p * kLanes)) | (distance > t.always_exact_above);
    }
    if (any(exact)) distances = choose(exact, exact_distance(t, window), distances);
  }
  const DoubleVec log_w = -t.scale * distances;
  Vec relative = narrow(log_w - t.reference[p]);
  if (any(matters & (relative > headroom))) {
    double top = t.reference[p], lanes[kLanes];
    __builtin_memcpy(lanes, &log_w, sizeof lanes);
    for (int i = 0; i < kLanes; ++i)
      if (matters[i] && lanes[i] > top) top = lanes[i];
    // A reference that is a float spares weigh_near a rounding; beyond 1e5 that plays no part.
    raise_reference(t, state, top > -1e5 ? static_cast<double>(static_cast<float>(top)) : top);
    relative = narrow(log_w - t.reference[p]);
  }
  matters &= relative > -t.skip;
  const Vec zero{};
  w = matters ? exp2(relative) : zero;
  store(t.s + p * kLanes, load(t.s + p * kLanes) + w);
  if (full) {
    store(t.e + p * kLanes, load(t.e + p * kLanes) + (matters ? w * relative : zero));
    // Decided by what does not depend on the reference, so that ties stay ties.
    note_far(t, p, distances, at);
  }
  return true;
}

// Consecutive outputs of a row, whose pixels p lie side by side.
struct Run {
  std::int64_t p;            // of the first output
  const float* distances;    // (outputs)[L]
  const float* centres;      // (outputs)[L] of channel 0
  std::int32_t at;           // number of its source pixel
  MapWindow window;          // its window
  const float* const* rows;  // (window.rows) sums along the rows of the windows
  std::int64_t first;        // place of the first output in these
};

// Adds outputs j .. j + n - 1, where all that matters is near enough for float32 and no reference needs to be raised;
// gives false, and does nothing, where one does.
template <int C, bool full, int n>
PYELS_INLINE bool weigh_near(const KernelTask& t, const Run& run, std::int64_t j, Vec scale, Vec least_weight) {
  const std::int64_t p = run.p + j;
  const float* offset = t.offset + p;
  const float* distance = run.distances + j * kLanes;
  Vec relative[n], w[n];
  for (int u = 0; u < n; ++u) relative[u] = offset[u] - scale * load(distance + u * kLanes);
  Vec top = relative[0];
  for (int u = 1; u < n; ++u) top = top > relative[u] ? top : relative[u];
  if (!any_above(top, least_weight)) return true;
  if (__builtin_expect(any_above(top, Vec{} + headroom), false)) return false;
  for (int u = 0; u < n; ++u) w[u] = exp2(relative[u]);
  float* s = t.s + p * kLanes;
  for (int u = 0; u < n; ++u) store(s + u * kLanes, load(s + u * kLanes) + w[u]);
  const float* centre = run.centres + j * kLanes;
  float* y = t.y + p * kLanes;
  const std::int64_t channels = C ? C : t.channels;
  for (std::int64_t c = 0; c < channels; ++c) {
    for (int u = 0; u < n; ++u) store(y + u * kLanes, load(y + u * kLanes) + w[u] * load(centre + u * kLanes));
    y += t.height * t.width * kLanes, centre += t.height * t.panel_width * kLanes;
  }
  if (full) {
    for (int u = 0; u < n; ++u) {
      float* e = t.e + (p + u) * kLanes;
      store(e, load(e) + w[u] * relative[u]);
      note_near(t, p + u, load(distance + u * kLanes), run.at + static_cast<std::int32_t>(j) + u);
    }
  }
  return true;
}

// And however far they are.
template <bool full>
void weigh_far(const KernelTask& t, const Run& run, std::int64_t j, std::int64_t n) {
  for (std::int64_t i = j; i < j + n; ++i) {
    const std::int64_t p = run.p + i;
    const std::int32_t at = static_cast<std::int32_t>(i);
    MapWindow window = run.window;
    window.column.query += at, window.column.source += at;
    const auto wide = [&]() __attribute__((always_inline)) {
      DoubleVec distances{};
      for (std::int32_t row = 0; row < window.rows; ++row)
        distances = distances + widen(load(run.rows[row] + (run.first + i) * kLanes));
      return distances;
    };
    Vec w;
    if (!weigh<full>(t, {p, p, 1}, run.at + at, widen(load(run.distances + i * kLanes)), wide, window, w)) continue;
    for (std::int64_t c = 0; c < t.channels; ++c) {
      float* y = t.y + (c * t.height * t.width + p) * kLanes;
      store(y, load(y) + w * load(run.centres + (c * t.height * t.panel_width + i) * kLanes));
    }
  }
}

// Outputs j .. count - 1, n at a time and then fewer.
template <int C, bool full, int n>
PYELS_INLINE void weigh_from(const KernelTask& t, const Run& run, std::int64_t j, std::int64_t count, Vec scale,
                             Vec least_weight) {
  for (; j + n <= count; j += n)
    if (!weigh_near<C, full, n>(t, run, j, scale, least_weight)) weigh_far<full>(t, run, j, n);
  if constexpr (n > 1) weigh_from<C, full, n / 2>(t, run, j, count, scale, least_weight);
}

template <int C, bool full>
void weigh_run(const KernelTask& t, const Run& run, std::int64_t count) {
  // What matters at a pixel lies within (offset + skip) / scale.
  const float nearest = static_cast<float>(t.scale) * t.wide_above - t.skip;
  const float* offset = t.offset + run.p;
  int far = 0;
  for (std::int64_t j = 0; j < count; ++j) far |= !(offset[j] <= nearest);
  if (far)
    weigh_far<full>(t, run, 0, count);
  else
    weigh_from<C, full, kChunk>(t, run, 0, count, Vec{} + static_cast<float>(t.scale), Vec{} - t.skip);
}

// ---- Displacements -----------------------------------------------------------------------------------------------

template <int K, int band_rows, int band_columns, int C, bool full>
void square_windows(const KernelTask& t, const Axis& row, const Axis& column) {
  const int k = K ? K : t.k_rows;
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
    // With bands that start at fixed rows of the query equal windows have equal distances, bit for bit: for ties.
    const std::int32_t before = full ? p_row % band_rows : 0;
    count = least(least(band_rows - before, row.outputs - i), static_cast<std::int32_t>(t.height) - p_row);
    for (; summed < i + count + k - 1; ++summed) {
      float* own = sums + summed % kept * row_size;
      const MapRow next = map_row(t, row.query + summed, row.source + summed, column);
      const bool again = t.wraps && summed >= t.height;
      if (next.x && !again) sums_along_row<K, band_columns, C, full>(t, next, column, line, own);
      row_at[summed] = next.x ? own : zeros;
    }
    sums_over_rows<K, band_rows>(row_at + i - before, k, column.outputs, distances, row_size);

    for (std::int32_t u = before; u < before + count; ++u) {
      const std::int32_t top = i - before + u;  // first row of the window
      const std::int32_t q_row = row.source + r_rows + top, q = column.source + r_columns;
      for (std::int32_t j = 0, n; j < column.outputs; j += n) {
        const std::int32_t p = t.wraps ? wrapped(column.query + r_columns + j, t.width) : column.query + r_columns + j;
        n = least(column.outputs - j, static_cast<std::int32_t>(t.width) - p);
        const Run run{(p_row - before + u) * t.width + p,
                      distances + u * row_size + j * kLanes,
                      t.panel + (q_row * t.panel_width + t.panel_margin + q + j) * kLanes,
                      t.at + q_row * static_cast<std::int32_t>(t.width) + q + j,
                      {row.query + top, row.source + top, k, {n, column.query + j, column.source + j}, t.k_columns},
                      row_at + top,
                      j};
        weigh_run<C, full>(t, run, n);
      }
    }
  }
}

template <bool full>
void whole_image(const KernelTask& t, const Axis& row, const Axis& column) {
  // Row sums first, and their sum in double: the rounding error grows with W, not with H * W.
  DoubleVec total{};
  for (std::int32_t i = 0; i < row.outputs; ++i) {
    const MapRow at = map_row(t, row.query + i, row.source + i, column);
    Vec sum{};
    for (std::int32_t j = 0; j < column.outputs; ++j) sum += squares<0>(t, at, j);
    total = total + widen(sum);
  }
  // The source is noted for pixel (0, 0); the caller moves it along to the others.
  const std::int32_t origin = wrapped(row.source - row.query, t.height) * static_cast<std::int32_t>(t.width) +
                              wrapped(column.source - column.query, t.width);
  const MapWindow window{row.query, row.source, row.outputs, column, column.outputs};
  const auto wide = [&]() __attribute__((always_inline)) { return total; };
  Vec w;
  const std::int64_t pixels = t.height * t.width;
  if (!weigh<full>(t, {0, 0, pixels}, t.at + origin, total, wide, window, w)) return;
  for (std::int64_t c = 0; c < t.channels; ++c)
    for (std::int32_t i = 0; i < row.outputs; ++i) {
      const float* phi = map_row(t, row.query + i, row.source + i, column).phi + c * t.height * t.panel_width * kLanes;
      float* y = t.y + (c * pixels + wrapped(row.query + i, t.height) * t.width) * kLanes;
      for (std::int32_t j = 0, p = wrapped(column.query, t.width); j < column.outputs; ++j) {
        store(y + p * kLanes, load(y + p * kLanes) + w * load(phi + j * kLanes));
        if (++p == t.width) p = 0;
      }
    }
}

using Displacement = void (*)(const KernelTask&, const Axis&, const Axis&);

// With the number of channels known to the compiler where it is a common one. K = 0: any k >= kernel_band.
template <int K, bool full>
Displacement with_channels(std::int64_t channels) {
  constexpr int band = K == 0 || K > kernel_band ? kernel_band : K;
  return channels == 1   ? square_windows<K, band, band, 1, full>
         : channels == 3 ? square_windows<K, band, band, 3, full>
                         : square_windows<K, band, band, 0, full>;
}

// And the window size. Windows that are not square reach beyond the image along one axis.
template <bool full>
Displacement choose(const KernelTask& t) {
  if (t.whole_image) return whole_image<full>;
  switch (t.k_rows == t.k_columns ? t.k_rows : 0) {
    case 3: return with_channels<3, full>(t.channels);
    case 5: return with_channels<5, full>(t.channels);
    case 7: return with_channels<7, full>(t.channels);
    case 9: return with_channels<9, full>(t.channels);
    case 11: return with_channels<11, full>(t.channels);
    case 13: return with_channels<13, full>(t.channels);
    case 15: return with_channels<15, full>(t.channels);
    case 17: return with_channels<17, full>(t.channels);
    default: break;
  }
  constexpr int band = kernel_band;
  const bool low = t.k_rows < band, narrow = t.k_columns < band;
  return low && narrow ? square_windows<0, 1, 1, 0, full>
         : low         ? square_windows<0, 1, band, 0, full>
         : narrow      ? square_windows<0, band, 1, 0, full>
                       : with_channels<0, full>(t.channels);
}

void accumulate(const KernelTask& t) {
  const Displacement one = t.full ? choose<true>(t) : choose<false>(t);
  for (std::int32_t i = 0; i < t.n_rows; ++i)
    for (std::int32_t j = 0; j < t.n_columns; ++j) one(t, t.rows[i], t.columns[j]);
}

// ---- Into lanes and out of them ----------------------------------------------------------------------------------

// Transposes an n x n square by log2(n) times interleaving its upper half with its lower half.
template <class Row, int n>
PYELS_INLINE void transpose(Row (&rows)[n]) {
  for (int round = 1; round < n; round *= 2) {
    Row next[n];
#pragma GCC unroll 16
    for (int i = 0; i < n / 2; ++i) {
      if constexpr (n == 16) {
        next[2 * i] =
            __builtin_shufflevector(rows[i], rows[i + n / 2], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + n / 2], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13,
                                                  29, 14, 30, 15, 31);
      } else if constexpr (n == 8) {
        next[2 * i] = __builtin_shufflevector(rows[i], rows[i + n / 2], 0, 8, 1, 9, 2, 10, 3, 11);
        next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + n / 2], 4, 12, 5, 13, 6, 14, 7, 15);
      } else {
        next[2 * i] = __builtin_shufflevector(rows[i], rows[i + n / 2], 0, 4, 1, 5);
        next[2 * i + 1] = __builtin_shufflevector(rows[i], rows[i + n / 2], 2, 6, 3, 7);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < n; ++i) rows[i] = next[i];
  }
}

// n pixels of each image from place i on, `valid` of them in the image.
template <int n, class Pixel, class Row>
PYELS_INLINE void spread_square(const Pixel* const* images, std::int64_t i, std::int64_t valid, float shift,
                                float* panel) {
  Row rows[n];
  for (int lane = 0; lane < n; ++lane) {
    rows[lane] = Row{};
    if (lane < kLanes) __builtin_memcpy(&rows[lane], images[lane] + i, static_cast<std::size_t>(valid) * sizeof(Pixel));
  }
  transpose<Row, n>(rows);
  for (std::int64_t j = 0; j < valid; ++j)
    for (int lane = 0; lane < kLanes; ++lane) panel[j * kLanes + lane] = static_cast<float>(rows[j][lane]) - shift;
}

template <int n, class Pixel>
void spread(const Pixel* const* images, std::int64_t width, float shift, float* panel) {
  typedef Pixel Row __attribute__((vector_size(n * sizeof(Pixel))));
  std::int64_t i = 0;
  for (; i + n <= width; i += n) spread_square<n, Pixel, Row>(images, i, n, shift, panel + i * kLanes);
  if (i < width) spread_square<n, Pixel, Row>(images, i, width - i, shift, panel + i * kLanes);
}

void spread_uint8(const std::uint8_t* const* images, std::int64_t width, float* panel) {
  spread<16>(images, width, 127.5f, panel);
}

void spread_float(const float* const* images, std::int64_t width, float* panel) {
  spread<kLanes>(images, width, 0.0f, panel);
}

// The sum of the first `live` lanes of each of n vectors.
void sum_lanes(const float* v, std::int64_t n, int live, double* sums) {
  Vec mask;
  for (int lane = 0; lane < kLanes; ++lane) mask[lane] = lane < live ? 1.0f : 0.0f;
  for (std::int64_t i = 0; i < n; ++i) {
    const DoubleVec wide = widen(load(v + i * kLanes) * mask);
    double lanes[kLanes];
    __builtin_memcpy(lanes, &wide, sizeof lanes);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    sums[i] = lanes[0];
  }
}

}  // namespace

extern const Kernel kernel{PYELS_ISA_TEXT, kLanes, accumulate, spread_uint8, spread_float, sum_lanes};

}  // namespace pyels::PYELS_ISA_NAME
