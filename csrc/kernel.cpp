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
// Layout: L bank images side by side in the lanes of a vector; x is broadcast. Precision: float32 throughout; the
// caller moves the state into double before rounding of long sums could show.
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

constexpr float kHeadroom = 30.0f;

Vec load(const float* at) { return *reinterpret_cast<const Vec*>(at); }
void store(float* at, Vec v) { *reinterpret_cast<Vec*>(at) = v; }
IntVec load(const std::int32_t* at) { return *reinterpret_cast<const IntVec*>(at); }
void store(std::int32_t* at, IntVec v) { *reinterpret_cast<IntVec*>(at) = v; }

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

// exp(x) for -87 < x < 88, relative error below 2e-7: 2^n times a polynomial on |f| <= ln(2) / 2.
Vec exponential(Vec x) {
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
  return reinterpret_cast<Vec>(reinterpret_cast<IntVec>(p) + (reinterpret_cast<IntVec>(shifted) << 23));
}

// Row i of the map D.
void map_row(const KernelTask& t, const Axis& row, const Axis& column, std::int32_t row_i, float* out) {
  for (std::int32_t i = 0; i < column.map_size; ++i) store(out + i * kLanes, Vec{});
  if (row_i < row.map_begin || row_i >= row.map_end) return;
  for (std::int64_t c = 0; c < t.channels; ++c) {
    const float* x = t.x + (c * t.height + row.map_query[row_i]) * t.width;
    const float* phi = t.panel + (c * t.height + row.map_source[row_i]) * t.width * kLanes;
    for (std::int32_t i = column.map_begin; i < column.map_end; ++i) {
      const Vec difference = x[column.map_query[i]] - t.alpha * load(phi + column.map_source[i] * kLanes);
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

// Moves the state at index p to a higher reference.
void raise_reference(const KernelTask& t, std::int64_t p, std::int64_t y_first, std::int64_t y_count, float reference) {
  const float old = t.reference[p];
  Vec factor{};
  if (old - reference > -87.0f) factor = exponential(Vec{} + (old - reference));
  const Vec s = load(t.s + p * kLanes);
  if (t.full && factor[0] > 0.0f)
    store(t.e + p * kLanes, factor * (load(t.e + p * kLanes) + s * (old - reference)));
  else if (t.full)
    store(t.e + p * kLanes, Vec{});
  store(t.s + p * kLanes, factor * s);
  const std::int64_t pixels = t.height * t.width;
  for (std::int64_t c = 0; c < t.channels; ++c)
    for (std::int64_t i = y_first; i < y_first + y_count; ++i) {
      float* y = t.y + (c * pixels + i) * kLanes;
      store(y, factor * load(y));
    }
  t.reference[p] = reference;
}

// Adds log-weights of one displacement to s, e and best at state index p and gives the weights; false when none matters.
// y, whose pixels are y_first .. y_first + y_count - 1, is the caller's to add to.
template <bool full>
bool weigh(const KernelTask& t, std::int64_t p, std::int64_t y_first, std::int64_t y_count, std::int32_t at,
           Vec distance, Vec& w) {
  const Vec log_w = load(t.bias) - t.scale * distance;
  Vec relative = log_w - t.reference[p];  // +inf while the state is empty; NaN for a lane without an image
  IntVec matters = relative > -t.skip;
  if (!any(matters)) return false;
  if (any(relative > kHeadroom)) {
    raise_reference(t, p, y_first, y_count, largest(log_w));
    relative = log_w - t.reference[p];
    matters = relative > -t.skip;
  }
  const Vec zero{};
  relative = matters ? relative : zero;
  w = matters ? exponential(relative) : zero;
  store(t.s + p * kLanes, load(t.s + p * kLanes) + w);
  if (full) {
    store(t.e + p * kLanes, load(t.e + p * kLanes) + w * relative);
    const Vec best = load(t.best + p * kLanes);
    const IntVec best_at = load(t.best_at + p * kLanes), here = IntVec{} + at;
    const IntVec better = matters & ((log_w > best) | ((log_w == best) & (here < best_at)));
    store(t.best + p * kLanes, better ? log_w : best);
    store(t.best_at + p * kLanes, better ? here : best_at);
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
  // Row sums first, then their sum: the rounding error grows with H + W, not with H * W.
  Vec distance{};
  for (std::int32_t i = 0; i < row.map_size; ++i) {
    map_row(t, row, column, i, t.scratch);
    Vec sum{};
    for (std::int32_t j = 0; j < column.map_size; ++j) sum += load(t.scratch + j * kLanes);
    distance += sum;
  }
  // The source is noted for pixel (0, 0); the caller moves it along to the others.
  std::int32_t origin_row = 0, origin_column = 0;
  for (std::int32_t i = 0; i < row.outputs; ++i)
    if (row.p[i] == 0) origin_row = row.q[i];
  for (std::int32_t j = 0; j < column.outputs; ++j)
    if (column.p[j] == 0) origin_column = column.q[j];
  const std::int32_t at = t.at + origin_row * static_cast<std::int32_t>(t.width) + origin_column;
  Vec w;
  if (!weigh<full>(t, 0, 0, t.height * t.width, at, distance, w)) return;
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
      Vec w;
      if (weigh<full>(t, p, p, 1, t.at + q, load(distances + (i * outputs + j) * kLanes), w))
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
