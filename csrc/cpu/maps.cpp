// Displacement maps: the distances of all pairs (p, p + d) at once.
//
// For a fixed displacement d, the squared distance of the windows around p and q = p + d is a k x k box sum of the map
//
//     D(z) = sum_c (x_c(z) - alpha * phi_c(z + d))^2
//
// so a pair costs a few operations whatever k is. Every term is non-negative and sums only ever add, so the distance
// keeps full float32 relative accuracy. Of windows of many values that would not be enough: there D is less by what noise
// alone makes it, sigma^2 a value, and what is rounded is what a distance differs from that by, not half a nat a value.
//
// Layout: L bank images side by side in the lanes of a vector; x is broadcast. A displacement is worked off in bands of
// a few rows: map and sums along the row, sums over k rows, weights. What passes between these steps stays in the
// nearest caches. Precision: float32. Where its error in the log-weight could show (a large distance), sums over rows
// are in double, and far beyond that the one distance is evaluated again in double if its weight stands out. The caller
// moves the state into double before rounding of long sums could show.
//
// Weights are summed relative to `reference`, which follows the running maximum lazily: it is raised only when a
// log-weight exceeds it by more than `headroom`, so sums stay below 2^headroom * terms, far from overflow.
#include "cpu/distances.h"
#include "float_sums.h"

namespace pyels::PYELS_ISA_NAME {
namespace {

constexpr int kChunk = 4;  // vectors weighed together, so that their latencies overlap

// ---- Weights -----------------------------------------------------------------------------------------------------

// Pixels of a state whose weights are moved together: p, and the pixels of y that share it.
struct State {
  std::int64_t p, y_first, y_count;
};

DoubleVec& wide_at(double* all, std::int64_t i) { return *reinterpret_cast<DoubleVec*>(all + i * kLanes); }

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
  if (t.wide_y) wide_at(t.wide_s, p) = widen(factor) * wide_at(t.wide_s, p);
  for (std::int64_t c = 0; c < t.answer_channels; ++c)
    for (std::int64_t i = c * pixels + state.y_first; i < c * pixels + state.y_first + state.y_count; ++i) {
      if (t.y) store(t.y + i * kLanes, factor * load(t.y + i * kLanes));
      if (t.wide_y) wide_at(t.wide_y, i) = widen(factor) * wide_at(t.wide_y, i);
    }
  t.reference[p] = reference;
  t.offset[p] = -static_cast<float>(reference);
}

// Adds the weights of n neighbours, times what answers, to y. C = 0: any number of channels.
template <int C, int n>
PYELS_INLINE void add_answers(const KernelTask& t, std::int64_t p, const float* centre, const Vec (&w)[n]) {
  const std::int64_t channels = C ? C : t.answer_channels, pixels = t.height * t.width;
  const std::int64_t image = t.height * t.panel_width * kLanes;
  if (t.y) {
    float* y = t.y + p * kLanes;
    for (std::int64_t c = 0; c < channels; ++c, y += pixels * kLanes, centre += image)
      for (int u = 0; u < n; ++u) store(y + u * kLanes, load(y + u * kLanes) + w[u] * load(centre + u * kLanes));
  } else if (t.wide_y) {
    for (int u = 0; u < n; ++u) {
      const DoubleVec weight = widen(w[u]);
      wide_at(t.wide_s, p + u) = wide_at(t.wide_s, p + u) + weight;
      for (std::int64_t c = 0; c < channels; ++c) {
        DoubleVec& y = wide_at(t.wide_y, c * pixels + p + u);
        y = y + weight * widen(load(centre + c * image + u * kLanes));
      }
    }
  }
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
  const IntVec far = matters & beyond(distance, t.wide_above);
  if (any(far)) {
    distances = choose(far, wide(), distances);
    IntVec exact = far & beyond(distance, t.exact_above);
    if (!full && !t.all_exact && any(exact)) {  // only what stands out; the full posterior also wants ties to be ties
      const Vec relative = narrow(-t.scale * distances - t.reference[p]);
      const Vec most = Vec{} + 120.0f;
      const Vec weight = exp2(relative < most ? relative : most);
      exact &= (weight > stands_out * load(t.s + p * kLanes)) | beyond(distance, t.always_exact_above);
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
  add_answers<C>(t, p, run.centres + j * kLanes, w);
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
    const auto wide = [&]() __attribute__((always_inline)) { return wide_distance(t, run, i); };
    Vec w[1];
    const DoubleVec distances = widen(load(run.distances + i * kLanes));
    if (weigh<full>(t, {p, p, 1}, run.at + at, distances, wide, window_of(run, at), w[0]))
      add_answers<0>(t, p, run.centres + i * kLanes, w);
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
  if (any_beyond(t, t.offset + run.p, count))
    weigh_far<full>(t, run, 0, count);
  else
    weigh_from<C, full, kChunk>(t, run, 0, count, Vec{} + static_cast<float>(t.scale), Vec{} - t.skip);
}

// ---- Displacements -----------------------------------------------------------------------------------------------

template <bool full, bool precise>
void whole_image(const KernelTask& t, const Axis& row, const Axis& column) {
  const DoubleVec total = image_distance<precise>(t, row, column);
  // The source is noted for pixel (0, 0); the caller moves it along to the others.
  const std::int32_t origin = wrapped(row.source - row.query, t.height) * static_cast<std::int32_t>(t.width) +
                              wrapped(column.source - column.query, t.width);
  const MapWindow window{row.query, row.source, row.outputs, column, column.outputs};
  const auto wide = [&]() __attribute__((always_inline)) { return total; };
  Vec w;
  const std::int64_t pixels = t.height * t.width;
  if (!weigh<full>(t, {0, 0, pixels}, t.at + origin, total, wide, window, w)) return;
  if (t.wide_y) wide_at(t.wide_s, 0) = wide_at(t.wide_s, 0) + widen(w);
  if (!t.y && !t.wide_y) return;
  for (std::int64_t c = 0; c < t.answer_channels; ++c)
    for (std::int32_t i = 0; i < row.outputs; ++i) {
      const float* phi = t.answers + (map_row(t, row.query + i, row.source + i, column).phi - t.panel) +
                         c * t.height * t.panel_width * kLanes;
      const std::int64_t first = c * pixels + wrapped(row.query + i, t.height) * t.width;
      for (std::int32_t j = 0, p = wrapped(column.query, t.width); j < column.outputs; ++j) {
        const Vec answer = load(phi + j * kLanes);
        float* y = t.y + (first + p) * kLanes;
        if (t.y)
          store(y, load(y) + w * answer);
        else
          wide_at(t.wide_y, first + p) = wide_at(t.wide_y, first + p) + widen(w) * widen(answer);
        if (++p == t.width) p = 0;
      }
    }
}

template <bool full>
struct Weigh {
  using Task = KernelTask;

  template <int K, int band_rows, int band_columns, int C>
  static void squares(const KernelTask& t, const Axis& row, const Axis& column) {
    for_each_run<K, band_rows, band_columns, C, full>(
        t, row,
        column, [&](const Run& run, std::int64_t n) __attribute__((always_inline)) { weigh_run<C, full>(t, run, n); });
  }

  static Displacement<Task> choose(const KernelTask& t) {
    if (t.whole_image) return t.precision ? whole_image<full, true> : whole_image<full, false>;
    return fitting<Weigh>(t);
  }
};

void accumulate(const KernelTask& t) {
  for_each_displacement(t, t.full ? Weigh<true>::choose(t) : Weigh<false>::choose(t));
}

// ---- Into lanes and out of them ----------------------------------------------------------------------------------

// Rows of n pixels, one of each image, become their pixels place by place, by log2(lanes) times interleaving the upper
// half of the rows with the lower half.
template <int n, class Row>
PYELS_INLINE void interleave(Row (&rows)[kLanes]) {
  for (int round = 1; round < kLanes; round *= 2) {
    Row next[kLanes];
#pragma GCC unroll 16
    for (int i = 0; i < kLanes / 2; ++i) {
      const Row upper = rows[i], lower = rows[i + kLanes / 2];
      if constexpr (n == 16) {
        next[2 * i] = __builtin_shufflevector(upper, lower, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
        next[2 * i + 1] =
            __builtin_shufflevector(upper, lower, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
      } else if constexpr (n == 8) {
        next[2 * i] = __builtin_shufflevector(upper, lower, 0, 8, 1, 9, 2, 10, 3, 11);
        next[2 * i + 1] = __builtin_shufflevector(upper, lower, 4, 12, 5, 13, 6, 14, 7, 15);
      } else {
        next[2 * i] = __builtin_shufflevector(upper, lower, 0, 4, 1, 5);
        next[2 * i + 1] = __builtin_shufflevector(upper, lower, 2, 6, 3, 7);
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) rows[i] = next[i];
  }
}

// n pixels of each image from place i on, `valid` of them in the image.
template <int n, class Pixel>
PYELS_INLINE void spread_some(const Pixel* const* images, std::int64_t i, std::int64_t valid, float shift,
                              float* panel) {
  typedef Pixel Row __attribute__((vector_size(n * sizeof(Pixel))));
  Row rows[kLanes] = {};
  for (int lane = 0; lane < kLanes; ++lane)
    __builtin_memcpy(&rows[lane], images[lane] + i, static_cast<std::size_t>(valid) * sizeof(Pixel));
  interleave<n>(rows);
  Pixel pixels[n * kLanes];
  __builtin_memcpy(pixels, rows, sizeof pixels);
  for (std::int64_t j = 0; j < valid * kLanes; ++j) panel[i * kLanes + j] = static_cast<float>(pixels[j]) - shift;
}

template <int n, class Pixel>
void spread(const Pixel* const* images, std::int64_t width, float shift, float* panel) {
  std::int64_t i = 0;
  for (; i + n <= width; i += n) spread_some<n>(images, i, n, shift, panel);
  if (i == width) return;
  if (width >= n)  // the last n, of which some are there already
    spread_some<n>(images, width - n, n, shift, panel);
  else
    spread_some<n>(images, 0, width, shift, panel);
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
