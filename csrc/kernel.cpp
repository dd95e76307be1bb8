// Displacement maps: the distances of all pairs (p, p + d) at once.
//
// For a fixed displacement d, the squared distance of the windows around p and q = p + d is a k x k box sum of the map
//
//     D(z) = sum_c (x_c(z) - alpha * phi_c(z + d))^2
//
// so a pair costs a few operations whatever k is. Every term is non-negative and sums only ever add, so the distance
// keeps full float32 relative accuracy; a box sum by doubling adds in the same order at every place, so equal windows
// get equal distances bit for bit.
//
// Layout: L bank images side by side in the lanes of a vector; x is broadcast. Precision: float32. Where its error in
// the log-weight could show (a large distance, and a weight that stands out), the one distance is evaluated again in
// double. The caller moves the state into double before rounding of long sums could show.
//
// Weights are summed relative to `reference`, which follows the running maximum lazily: it is raised only when a
// log-weight exceeds it by more than `kHeadroom`, so sums stay below exp(kHeadroom) * terms, far from overflow.
#include "kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pyels::PYELS_ISA_NAME {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t IntVec __attribute__((vector_size(kLanes * 4)));
typedef std::uint32_t Bits __attribute__((vector_size(kLanes * 4)));
typedef double DoubleVec __attribute__((vector_size(kLanes * 8)));

constexpr float kHeadroom = 30.0f;
constexpr float kStandsOut = 0.25f;  // of the weight that the lane has gathered so far

Vec load(const float* at) { return *reinterpret_cast<const Vec*>(at); }
void store(float* at, Vec v) { *reinterpret_cast<Vec*>(at) = v; }

bool any(IntVec mask) {
#if defined(__AVX512F__)
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask)) != 0;
#elif defined(__SSE2__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(mask)) != 0;
#else
  std::int32_t joined = 0;
  for (int i = 0; i < kLanes; ++i) joined |= mask[i];
  return joined != 0;
#endif
}

float largest(Vec v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

// exp(max(x, -87)) for x < 88, relative error below 2e-7: 2^n times a polynomial on |f| <= ln(2) / 2.
Vec exponential(Vec x) {
  const Vec least = Vec{} - 87.0f;
  x = x > least ? x : least;
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low mantissa bits
  const Vec shifted = x * 1.44269504f + magic;
  const Vec n = shifted - magic;
  const Vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
  return reinterpret_cast<Vec>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 23));
}

// Row i of the map D.
void map_row(const KernelTask& t, const Axis& row, const Axis& column, std::int32_t row_i, float* out) {
  for (std::int32_t i = 0; i < column.map_size; ++i) store(out + i * kLanes, Vec{});
  if (row_i < row.map_begin || row_i >= row.map_end) return;
  const float alpha = static_cast<float>(t.alpha);
  for (std::int64_t c = 0; c < t.channels; ++c) {
    const float* x = t.x + (c * t.height + row.map_query[row_i]) * t.width;
    const float* phi = t.panel + (c * t.height + row.map_source[row_i]) * t.width * kLanes;
    for (std::int32_t i = column.map_begin; i < column.map_end; ++i) {
      const Vec difference = x[column.map_query[i]] - alpha * load(phi + column.map_source[i] * kLanes);
      store(out + i * kLanes, load(out + i * kLanes) + difference * difference);
    }
  }
}

// Sums of k consecutive elements `stride` vectors apart, at each of the first `count` of `n` places of `a`, by doubling
// (k = 13: sums of 1, 4 and 8). Overwrites a. Every place adds in the same order.
void window_sums(float* a, std::int64_t n, std::int64_t count, std::int64_t stride, std::int32_t k, float* out) {
  std::int64_t offset = 0;
  bool first = true;
  for (std::int32_t width = 1;; width *= 2) {
    if (k & width) {
      const float* from = a + offset * stride * kLanes;
      if (first)
        for (std::int64_t i = 0; i < count; ++i) store(out + i * kLanes, load(from + i * kLanes));
      else
        for (std::int64_t i = 0; i < count; ++i)
          store(out + i * kLanes, load(out + i * kLanes) + load(from + i * kLanes));
      first = false;
      offset += width;
    }
    if (2 * width > k) return;
    n -= width * stride;
    for (std::int64_t i = 0; i < n; ++i)
      store(a + i * kLanes, load(a + i * kLanes) + load(a + (i + width * stride) * kLanes));
  }
}

// The window of one output: places of the map, rows i .. i + rows - 1, columns j .. j + columns - 1.
struct MapWindow {
  const Axis &row, &column;
  std::int32_t i, rows, j, columns;
  const DoubleVec* distance;  // the distance in double where it was summed so, or null
};

// Its log-weights in double: the same terms, one after the other.
void exact_log_weights(const KernelTask& t, const MapWindow& window, DoubleVec& log_w) {
  const Axis &row = window.row, &column = window.column;
  const auto later = [](std::int32_t a, std::int32_t b) { return a > b ? a : b; };
  const auto sooner = [](std::int32_t a, std::int32_t b) { return a < b ? a : b; };
  const std::int32_t i_end = sooner(row.map_end, window.i + window.rows);
  const std::int32_t j_end = sooner(column.map_end, window.j + window.columns);
  DoubleVec sum{};
  for (std::int64_t c = 0; c < t.channels; ++c)
    for (std::int32_t i = later(row.map_begin, window.i); i < i_end; ++i) {
      const float* x = t.x + (c * t.height + row.map_query[i]) * t.width;
      const float* phi = t.panel + (c * t.height + row.map_source[i]) * t.width * kLanes;
      for (std::int32_t j = later(column.map_begin, window.j); j < j_end; ++j) {
        const DoubleVec pixel = __builtin_convertvector(load(phi + column.map_source[j] * kLanes), DoubleVec);
        const DoubleVec difference = static_cast<double>(x[column.map_query[j]]) - t.alpha * pixel;
        sum += difference * difference;
      }
    }
  log_w = -t.scale * sum;
}

// Moves the state at index p to a higher reference.
void raise_reference(const KernelTask& t, std::int64_t p, std::int64_t y_first, std::int64_t y_count,
                     double reference) {
  const double down = t.reference[p] - reference;  // -inf while the state is empty
  const Vec factor = down > -87.0 ? exponential(Vec{} + static_cast<float>(down)) : Vec{};
  const Vec s = load(t.s + p * kLanes);
  if (t.full) {
    const float shift = down > -87.0 ? static_cast<float>(down) : 0.0f;
    store(t.e + p * kLanes, factor * (load(t.e + p * kLanes) + s * shift));
  }
  store(t.s + p * kLanes, factor * s);
  const std::int64_t pixels = t.height * t.width;
  for (std::int64_t c = 0; c < t.channels; ++c)
    for (std::int64_t i = y_first; i < y_first + y_count; ++i) {
      float* y = t.y + (c * pixels + i) * kLanes;
      store(y, factor * load(y));
    }
  t.reference[p] = reference;
}

// The log-weights of one displacement relative to the reference at state index p, which is raised where they exceed it
// by far; 0 in lanes that do not matter.
Vec relative_log_weights(const KernelTask& t, std::int64_t p, std::int64_t y_first, std::int64_t y_count, Vec distance,
                         IntVec matters) {
  const float scale = static_cast<float>(t.scale);
  const Vec zero{};
  // With fused multiply-add a single rounding; +inf while the state is empty.
  Vec relative = -static_cast<float>(t.reference[p]) - scale * distance;
  if (any(matters & (relative > kHeadroom))) {
    const float top = largest(load(t.bias) - scale * distance);
    raise_reference(t, p, y_first, y_count, static_cast<double>(top));
    relative = -top - scale * distance;
  }
  return matters ? relative : zero;
}

// The same where some distance is so large that float32 will not do. Gives the log-weights in double as well, and
// narrows `matters` to the lanes that do by them.
Vec relative_log_weights_exact(const KernelTask& t, std::int64_t p, std::int64_t y_first, std::int64_t y_count,
                               Vec distance, IntVec& matters, const MapWindow& window, DoubleVec& log_w) {
  log_w = -t.scale * (window.distance ? *window.distance : __builtin_convertvector(distance, DoubleVec));
  IntVec exact = matters & (distance > t.exact_above);
  if (!t.full) {  // only what stands out; the full posterior also wants ties to be ties
    const Vec relative = __builtin_convertvector(log_w - t.reference[p], Vec);
    const Vec most = Vec{} + 80.0f;
    const Vec w = exponential(relative < most ? relative : most);
    exact &= (w > kStandsOut * load(t.s + p * kLanes)) | (distance > t.always_exact_above);
  }
  if (any(exact)) {
    DoubleVec found;
    exact_log_weights(t, window, found);
    for (int i = 0; i < kLanes; ++i)
      if (exact[i]) log_w[i] = found[i];
  }
  double top = t.reference[p];
  for (int i = 0; i < kLanes; ++i)
    if (matters[i] && log_w[i] > top + kHeadroom) top = log_w[i];
  if (top > t.reference[p]) {
    // A reference that is a float spares the fast path above a rounding; beyond 1e5 nats that path plays no part.
    const double rounded = static_cast<double>(static_cast<float>(top));
    raise_reference(t, p, y_first, y_count, top > -1e5 ? rounded : top);
  }
  const Vec relative = __builtin_convertvector(log_w - t.reference[p], Vec);
  matters &= relative > -t.skip;
  const Vec zero{};
  return matters ? relative : zero;
}

// Adds log-weights of one displacement to s, e and best at state index p and gives the weights; false when none
// matters. y, whose pixels are y_first .. y_first + y_count - 1, is the caller's to add to.
template <bool full>
bool weigh(const KernelTask& t, std::int64_t p, std::int64_t y_first, std::int64_t y_count, std::int32_t at,
           Vec distance, const MapWindow& window, Vec& w) {
  // True for every lane while the state is empty (reference -inf), and never for a lane without an image (bias -inf).
  IntVec matters = load(t.bias) + (t.skip - static_cast<float>(t.reference[p])) > t.least_scale * distance;
  if (!any(matters)) return false;

  Vec relative;
  DoubleVec log_w;
  const bool large = any(matters & (distance > t.exact_above));
  if (__builtin_expect(large, false))
    relative = relative_log_weights_exact(t, p, y_first, y_count, distance, matters, window, log_w);
  else
    relative = relative_log_weights(t, p, y_first, y_count, distance, matters);
  const Vec zero{};
  w = matters ? exponential(relative) : zero;
  store(t.s + p * kLanes, load(t.s + p * kLanes) + w);
  if (full) {
    store(t.e + p * kLanes, load(t.e + p * kLanes) + w * relative);
    // The heaviest source is decided by log-weights that do not depend on the reference, so that ties stay ties.
    if (!large) log_w = -t.scale * __builtin_convertvector(distance, DoubleVec);
    for (int i = 0; i < kLanes; ++i) {
      if (!matters[i]) continue;
      double& best = t.best[p * kLanes + i];
      std::int32_t& best_at = t.best_at[p * kLanes + i];
      if (log_w[i] > best || (log_w[i] == best && at < best_at)) best = log_w[i], best_at = at;
    }
  }
  return true;
}

void add_centres(const KernelTask& t, std::int64_t p, std::int64_t q, Vec w) {
  const std::int64_t pixels = t.height * t.width;
  for (std::int64_t c = 0; c < t.channels; ++c) {
    float* y = t.y + (c * pixels + p) * kLanes;
    store(y, load(y) + w * load(t.panel + (c * pixels + q) * kLanes));
  }
}

template <bool full>
void whole_image(const KernelTask& t, const Axis& row, const Axis& column) {
  // Row sums first, and their sum in double: the rounding error grows with W, not with H * W.
  DoubleVec total{};
  for (std::int32_t i = 0; i < row.map_size; ++i) {
    map_row(t, row, column, i, t.scratch);
    Vec sum{};
    for (std::int32_t j = 0; j < column.map_size; ++j) sum += load(t.scratch + j * kLanes);
    total += __builtin_convertvector(sum, DoubleVec);
  }
  const Vec distance = __builtin_convertvector(total, Vec);
  // The source is noted for pixel (0, 0); the caller moves it along to the others.
  std::int32_t origin_row = 0, origin_column = 0;
  for (std::int32_t i = 0; i < row.outputs; ++i)
    if (row.p[i] == 0) origin_row = row.q[i];
  for (std::int32_t j = 0; j < column.outputs; ++j)
    if (column.p[j] == 0) origin_column = column.q[j];
  const std::int32_t at = t.at + origin_row * static_cast<std::int32_t>(t.width) + origin_column;
  const MapWindow window{row, column, 0, row.map_size, 0, column.map_size, &total};
  Vec w;
  if (!weigh<full>(t, 0, 0, t.height * t.width, at, distance, window, w)) return;
  for (std::int32_t i = 0; i < row.outputs; ++i)
    for (std::int32_t j = 0; j < column.outputs; ++j)
      add_centres(t, row.p[i] * t.width + column.p[j], row.q[i] * t.width + column.q[j], w);
}

template <bool full>
void square_windows(const KernelTask& t, const Axis& row, const Axis& column) {
  const std::int64_t outputs = column.outputs;
  float* line = t.scratch;
  float* sums = line + map_limit(t.width) * kLanes;                 // window sums along rows
  float* distances = sums + map_limit(t.height) * t.width * kLanes;  // and then along columns
  for (std::int32_t i = 0; i < row.map_size; ++i) {
    map_row(t, row, column, i, line);
    window_sums(line, column.map_size, outputs, 1, t.k_columns, sums + i * outputs * kLanes);
  }
  window_sums(sums, row.map_size * outputs, row.outputs * outputs, outputs, t.k_rows, distances);
  for (std::int32_t i = 0; i < row.outputs; ++i)
    for (std::int32_t j = 0; j < outputs; ++j) {
      const std::int32_t p = row.p[i] * static_cast<std::int32_t>(t.width) + column.p[j];
      const std::int32_t q = row.q[i] * static_cast<std::int32_t>(t.width) + column.q[j];
      const MapWindow window{row, column, i, t.k_rows, j, t.k_columns, nullptr};
      Vec w;
      if (weigh<full>(t, p, p, 1, t.at + q, load(distances + (i * outputs + j) * kLanes), window, w))
        add_centres(t, p, q, w);
    }
}

void accumulate(const KernelTask& t) {
  const auto one = t.whole_image ? (t.full ? whole_image<true> : whole_image<false>)
                                 : (t.full ? square_windows<true> : square_windows<false>);
  for (std::int32_t i = 0; i < t.n_rows; ++i)
    for (std::int32_t j = 0; j < t.n_columns; ++j) one(t, t.rows[i], t.columns[j]);
}

}  // namespace

extern const Kernel kernel{PYELS_ISA_TEXT, kLanes, accumulate};

}  // namespace pyels::PYELS_ISA_NAME
