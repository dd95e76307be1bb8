// Displacement maps, as on the CPU (cpu/maps.cpp): for a fixed displacement d = q - p the squared distances of all pairs
// (p, p + d) are k x k box sums of one map D(z) = sum_c (x_c(z) - alpha * phi_c(z + d))^2, and sums only ever add. Here
// a block has a tile of up to 32 x 32 pixels p of a query and a segment of the bank. Each of its threads holds the sums
// of 8 pixels side by side in registers, and they go through the images and displacements together:
//
//   columns   a thread has a column of a map and 8 rows of windows: D, and its sums over k rows, for 4 displacements
//   (shared memory)
//   rows      a thread sums k of these for each of its 8 pixels, and weighs
//
// Weights refer to an exponent that is raised when a weight exceeds it by 2^43. Sums are float32 for 128 terms, and
// double from there on, in the segment's partial posterior in global memory. Where the error of a float32 distance
// could show, it is found again in double (weighing.h). Logarithms are to base 2.
#pragma once

#include "cuda/device.cuh"

namespace pyels::cuda {
namespace {

constexpr double exact_float = 1e5;  // exponents above -1e5 are float32 numbers, which spares a rounding
constexpr float empty = 3e38f;       // -m of no weights: as good as infinite, but not NaN less the infinite distance of
                                     // what is no source

// ---- Sums of windows ---------------------------------------------------------------------------------------------

// Out of the terms of 8 windows of K, each a term further on, their sums. Groups of windows that share terms: those
// that all of them have, down to where each begins, and up to where it ends. The order of a sum depends on the window
// alone.
template <int K>
__device__ void window_sums(const float (&term)[strip + K - 1], float (&sum)[strip]) {
  constexpr int shared_by = K == 1 ? 1 : K == 3 ? 2 : 4;
#pragma unroll
  for (int base = 0; base < strip; base += shared_by) {
    float down = term[base + shared_by - 1];
#pragma unroll
    for (int i = base + shared_by; i < base + K; ++i) down += term[i];
    sum[base + shared_by - 1] = down;
#pragma unroll
    for (int u = shared_by - 2; u >= 0; --u) sum[base + u] = down += term[base + u];
    float up = 0.0f;
#pragma unroll
    for (int u = 1; u < shared_by; ++u) {
      up = u > 1 ? up + term[base + K + u - 1] : term[base + K];
      sum[base + u] += up;
    }
  }
}

// The same for any k >= 8, of which all 8 windows have terms 7 .. k - 1, `core`.
__device__ void window_sums(const float (&head)[strip - 1], float core, const float (&tail)[strip - 1],
                            float (&sum)[strip]) {
  sum[strip - 1] = core;
#pragma unroll
  for (int u = strip - 2; u >= 0; --u) sum[u] = core += head[u];
  float up = tail[0];
  sum[1] += up;
#pragma unroll
  for (int u = 2; u < strip; ++u) sum[u] += up += tail[u - 1];
}

// Adds a channel's term to a sum, or the only channel's sets it. (Products that the compiler fuses with the sum that
// they go into round otherwise than those it does not: not where equal windows are to have equal distances to the last
// bit.)
template <bool ONLY>
__device__ void add_squared(float x, float alpha, float phi, float& sum) {
  const float difference = fmaf(-alpha, phi, x);
  sum = ONLY ? difference * difference : fmaf(difference, difference, sum);
}

// Planes of the channels of a rectangle in shared memory.
struct Rectangle {
  const float* at;
  int pitch, plane;

  __device__ float operator()(int c, int row, int column) const { return at[c * plane + row * pitch + column]; }
};

// Sums over the rows of 8 windows, one below the other, of one column of the maps of `together` displacements.
// put(g, u, sum) takes them.
template <int K, bool ONLY, class Put>
__device__ void column_sums(const Rectangle& x, const Rectangle& phi, int channels, int k, float alpha, Put put) {
  float sums[strip];
  if constexpr (K > 0) {
    float d[together][strip + K - 1];
    if constexpr (!ONLY) {
#pragma unroll
      for (int g = 0; g < together; ++g)
#pragma unroll
        for (int i = 0; i < strip + K - 1; ++i) d[g][i] = 0.0f;
    }
    for (int c = 0; c < channels; ++c) {
      float rows[strip + K + together - 2];
#pragma unroll
      for (int i = 0; i < strip + K + together - 2; ++i) rows[i] = phi(c, i, 0);
#pragma unroll
      for (int i = 0; i < strip + K - 1; ++i) {
        const float value = x(c, i, 0);
#pragma unroll
        for (int g = 0; g < together; ++g) add_squared<ONLY>(value, alpha, rows[i + g], d[g][i]);
      }
    }
#pragma unroll
    for (int g = 0; g < together; ++g) {
      window_sums<K>(d[g], sums);
#pragma unroll
      for (int u = 0; u < strip; ++u) put(g, u, sums[u]);
    }
  } else {
    float head[together][strip - 1], core[together], tail[together][strip - 1];
#pragma unroll
    for (int g = 0; g < together; ++g) {
      core[g] = 0.0f;
#pragma unroll
      for (int i = 0; i < strip - 1; ++i) head[g][i] = tail[g][i] = 0.0f;
    }
    for (int c = 0; c < channels; ++c) {
      float rows[together];  // of the image, those that row i of x meets
#pragma unroll
      for (int g = 1; g < together; ++g) rows[g] = phi(c, g - 1, 0);
      const auto next = [&](int i) {
#pragma unroll
        for (int g = 1; g < together; ++g) rows[g - 1] = rows[g];
        rows[together - 1] = phi(c, i + together - 1, 0);
        return x(c, i, 0);
      };
#pragma unroll
      for (int i = 0; i < strip - 1; ++i) {
        const float value = next(i);
#pragma unroll
        for (int g = 0; g < together; ++g) add_squared<ONLY>(value, alpha, rows[g], head[g][i]);
      }
#pragma unroll 4
      for (int i = strip - 1; i < k; ++i) {
        const float value = next(i);
#pragma unroll
        for (int g = 0; g < together; ++g) add_squared<false>(value, alpha, rows[g], core[g]);
      }
#pragma unroll
      for (int i = 0; i < strip - 1; ++i) {
        const float value = next(k + i);
#pragma unroll
        for (int g = 0; g < together; ++g) add_squared<ONLY>(value, alpha, rows[g], tail[g][i]);
      }
    }
#pragma unroll
    for (int g = 0; g < together; ++g) {
      window_sums(head[g], core[g], tail[g], sums);
#pragma unroll
      for (int u = 0; u < strip; ++u) put(g, u, sums[u]);
    }
  }
}

// Sums of k neighbours, `step` apart, for 8 windows side by side.
template <int K>
__device__ void row_sums(const float* v, int step, int k, float (&sums)[strip]) {
  if constexpr (K > 0) {
    float term[strip + K - 1];
#pragma unroll
    for (int i = 0; i < strip + K - 1; ++i) term[i] = v[i * step];
    window_sums<K>(term, sums);
  } else {
    float head[strip - 1], tail[strip - 1], core = v[(strip - 1) * step];
#pragma unroll
    for (int i = 0; i < strip - 1; ++i) head[i] = v[i * step], tail[i] = v[(k + i) * step];
#pragma unroll 4
    for (int i = strip; i < k; ++i) core += v[i * step];
    window_sums(head, core, tail, sums);
  }
}

// ---- Weights -----------------------------------------------------------------------------------------------------

// What a thread weighs: 8 pixels against 8 sources side by side, with what is needed to look closer.
struct Run {
  const float* v;    // sums along columns, at the first column of the first window
  Rectangle x, phi;  // at the first place of the first window, of the query and of the image
  int k, r;
  std::int32_t row_source, column, width;  // number of the row's first source pixel in the segment; the source's column

  __device__ std::int32_t source(int j) const {
    return row_source + (column + j < width ? column + j : column + j - width);
  }
};

// The sums of 8 pixels, in registers. YC: as many channels of y as there is room for; FULL: also e and source.
template <int YC, bool FULL>
struct State {
  float offset[strip];  // -m, of which m is a float32 number unless it is below -exact_float; or `empty`
  float s[strip], y[YC][strip];
  float e[FULL ? strip : 1], nearest[FULL ? strip : 1];
  std::int32_t source[FULL ? strip : 1];
  float least;  // log-weights below do not matter to any of them; conservative
  bool far;     // what matters may lie beyond wide_above

  __device__ void clear() {
#pragma unroll
    for (int j = 0; j < strip; ++j) {
      offset[j] = empty;
      if (FULL) nearest[j] = static_cast<float>(infinite), source[j] = 0;
    }
    clear_sums();
    least = nothing / 2, far = true;
  }

  __device__ void clear_sums() {
#pragma unroll
    for (int j = 0; j < strip; ++j) {
      s[j] = 0.0f;
      if (FULL) e[j] = 0.0f;
#pragma unroll
      for (int c = 0; c < YC; ++c) y[c][j] = 0.0f;
    }
  }

  __device__ void exponents_changed(const Weighing& w) {
    float furthest = -static_cast<float>(infinite);
#pragma unroll
    for (int j = 0; j < strip; ++j)
      if (offset[j] < empty) furthest = fmaxf(furthest, offset[j]);
    // Float32 log-weights, offset - scale * distance, err by less than a millionth of the offset.
    least = -w.skip - 1e-6f * fabsf(furthest);
    far = !(furthest + w.skip < static_cast<float>(w.scale) * w.wide_above);
  }
};

// Pixels of a thread: p0 .. p0 + 7 of a row, of which those from `end` on are not there.
struct Pixels {
  std::int64_t p0;
  int end;
};

__device__ double exponent(const PartialAt& part, std::int64_t p, float offset) {
  return offset < exact_float ? -static_cast<double>(offset) : part.m(p);
}

// What the segment's sums of pixel p are to be multiplied by to refer to exponent m.
__device__ double flush_factor(const PartialAt& part, std::int64_t p, double m) {
  const double before = part.m(p);
  return before == m ? 1.0 : before == -infinite ? 0.0 : exp2(before - m);
}

// Adds the sums of pixel p but y, which refer to exponent m, to the segment's.
__device__ void flush(const PartialAt& part, std::int64_t p, double m, float s, float e, bool full) {
  const double before = part.m(p);
  if (before != m) {
    const double factor = flush_factor(part, p, m);
    if (full) part.e(p) = before == -infinite ? 0.0 : factor * (part.e(p) + part.s(p) * (before - m));
    part.s(p) *= factor, part.m(p) = m;
  }
  part.s(p) += s;
  if (full) part.e(p) += e;
}

template <int YC, bool FULL>
__device__ void flush(const Task& t, const PartialAt& part, const Pixels& pixels, State<YC, FULL>& state) {
#pragma unroll
  for (int j = 0; j < strip; ++j) {
    if (j >= pixels.end || !(state.s[j] > 0.0f)) continue;
    const std::int64_t p = pixels.p0 + j;
    const double m = exponent(part, p, state.offset[j]), factor = flush_factor(part, p, m);
#pragma unroll
    for (int c = 0; c < YC; ++c)
      if (c < t.channel_count) {
        double& y = part.y(t.first_channel + c, p);
        y = factor * y + state.y[c][j];
      }
    flush(part, p, m, state.s[j], FULL ? state.e[j] : 0.0f, FULL);
  }
  state.clear_sums();
}

// The pairs of a run one by one, wherever they lie. A loop, not eight copies: this is the rare case.
template <int YC, bool FULL>
__device__ void weigh_far(const Task& t, const Query& query, const PartialAt& part, const Pixels& pixels,
                          const Run& run, int first, int last, const float (&distances)[strip],
                          State<YC, FULL>& state) {
  const Weighing& w = query.weighing;
  float distance[strip], s[strip], offset[strip], e[strip], y[YC][strip];
#pragma unroll
  for (int j = 0; j < strip; ++j) {
    distance[j] = distances[j], s[j] = state.s[j], offset[j] = state.offset[j], e[j] = FULL ? state.e[j] : 0.0f;
#pragma unroll
    for (int c = 0; c < YC; ++c) y[c][j] = state.y[c][j];
  }
#pragma unroll 1
  for (int j = first; j < last; ++j) {
    // Always so while the state is empty.
    if (!(w.skip + offset[j] > w.least_scale * distance[j])) continue;
    const std::int64_t p = pixels.p0 + j;
    double m = exponent(part, p, offset[j]), wide = distance[j];
    if (distance[j] > w.wide_above) {
      wide = 0.0;
      for (int i = 0; i < run.k; ++i) wide += run.v[j + i];
      const double relative = -w.scale * wide - m;
      if (distance[j] > w.exact_above && (FULL || distance[j] > w.always_exact_above || relative > 120.0 ||
                                          exp2_approx(static_cast<float>(relative)) > stands_out * s[j])) {
        wide = 0.0;
        for (int c = 0; c < t.channels; ++c)
          for (int row = 0; row < run.k; ++row)
            for (int column = j; column < j + run.k; ++column) {
              const double difference =
                  static_cast<double>(run.x(c, row, column)) - query.alpha * run.phi(c, row, column);
              wide += difference * difference;
            }
      }
    }
    const double log_w = -w.scale * wide;
    if (log_w - m > headroom) {
      const double raised = log_w > -exact_float ? static_cast<double>(static_cast<float>(log_w)) : log_w;
      // What was gathered goes to the segment's sums, which so have this exponent, however large, in double.
      const double before = flush_factor(part, p, raised);
      const double own = m == -infinite ? 0.0 : exp2(m - raised);
      for (int c = 0; c < t.channel_count; ++c) {
        double& sum = part.y(t.first_channel + c, p);
        sum = before * sum + own * y[c][j];
        y[c][j] = 0.0f;
      }
      const double moved = m == -infinite ? 0.0 : own * (e[j] + s[j] * (m - raised));
      flush(part, p, raised, 0.0f, 0.0f, FULL);
      part.s(p) += own * s[j];
      if (FULL) part.e(p) += moved;
      s[j] = 0.0f, e[j] = 0.0f, offset[j] = -static_cast<float>(raised), m = raised;
    }
    const float relative = static_cast<float>(log_w - m);
    if (!(relative > -w.skip)) continue;
    const float weight = exp2_approx(relative);
    s[j] += weight;
    for (int c = 0; c < t.channel_count; ++c)
      y[c][j] = fmaf(weight, run.phi(t.first_channel + c, run.r, run.r + j), y[c][j]);
    if (!FULL) continue;
    e[j] = fmaf(weight, relative, e[j]);
    const std::int64_t source = run.source(j);
    if (wide < part.nearest(p) || (wide == part.nearest(p) && source < part.source(p)))
      part.nearest(p) = wide, part.source(p) = source;
  }
#pragma unroll
  for (int j = 0; j < strip; ++j) {
    state.s[j] = s[j], state.offset[j] = offset[j];
    if (FULL) state.e[j] = e[j];
#pragma unroll
    for (int c = 0; c < YC; ++c) state.y[c][j] = y[c][j];
  }
  state.exponents_changed(w);
}

// Adds pairs first .. last - 1 of a run.
template <int YC, bool FULL>
__device__ void weigh(const Task& t, const Query& query, const PartialAt& part, const Pixels& pixels, const Run& run,
                      int first, int last, float (&distance)[strip], State<YC, FULL>& state) {
  const Weighing& w = query.weighing;
  const float scale = fmaxf(static_cast<float>(w.scale), 1e-37f);  // not 0, whose product with infinity is no number
  float log_w[strip];
  if (first > 0 || last < strip) {
#pragma unroll
    for (int j = 0; j < strip; ++j)
      if (j < first || j >= last) distance[j] = static_cast<float>(infinite);
  }
#pragma unroll
  for (int j = 0; j < strip; ++j) log_w[j] = fmaf(-scale, distance[j], state.offset[j]);
  float top = log_w[0];
#pragma unroll
  for (int j = 1; j < strip; ++j) top = fmaxf(top, log_w[j]);
  if (!(top > state.least)) return;

  if (top > headroom || state.far) {
    bool far = false;
#pragma unroll
    for (int j = 0; j < strip; ++j) far |= log_w[j] > state.least && distance[j] > w.wide_above;
    if (far) {
      weigh_far(t, query, part, pixels, run, first, last, distance, state);
      return;
    }
#pragma unroll
    for (int j = 0; j < strip; ++j) {
      if (!(log_w[j] > headroom)) continue;
      const float raised = scale * distance[j];      // the new offset
      const float shift = raised - state.offset[j];  // below all others while the state is empty
      const float factor = exp2_approx(shift);
      if (FULL) state.e[j] = factor > 0.0f ? factor * fmaf(state.s[j], shift, state.e[j]) : 0.0f;
      state.s[j] *= factor;
#pragma unroll
      for (int c = 0; c < YC; ++c) state.y[c][j] *= factor;
      state.offset[j] = raised;
      log_w[j] = fmaf(-scale, distance[j], raised);
    }
    state.exponents_changed(w);
  }
#pragma unroll
  for (int j = 0; j < strip; ++j) {
    const float weight = exp2_approx(log_w[j]);
    state.s[j] += weight;
    if (FULL) {
      state.e[j] = fmaf(weight, fmaxf(log_w[j], nothing), state.e[j]);
      const std::int32_t source = run.source(j);
      const bool nearer =
          distance[j] < state.nearest[j] || (distance[j] == state.nearest[j] && source < state.source[j]);
      state.nearest[j] = nearer ? distance[j] : state.nearest[j];
      state.source[j] = nearer ? source : state.source[j];
    }
    log_w[j] = weight;
  }
#pragma unroll
  for (int c = 0; c < YC; ++c)
    if (c < t.channel_count) {
#pragma unroll
      for (int j = 0; j < strip; ++j)
        state.y[c][j] = fmaf(log_w[j], run.phi(t.first_channel + c, run.r, run.r + j), state.y[c][j]);
    }
}

// ---- Displacement maps -------------------------------------------------------------------------------------------

template <int K, int YC, bool FULL>
__global__ void __launch_bounds__(most_threads) maps(const __grid_constant__ Task t) {
  const Query& query = t.query[blockIdx.z];
  const int segment = static_cast<int>(blockIdx.y);
  if (segment >= query.segments) return;
  const int column_tiles = tiles_of(t.columns), tile = static_cast<int>(blockIdx.x);
  const Span rows = tile_of(t.rows, tile / column_tiles), columns = tile_of(t.columns, tile % column_tiles);
  if (query.by_products && rows.meets != Meets::itself && columns.meets != Meets::itself) return;
  const int k = K > 0 ? K : t.rows.window, r = k / 2;
  const float alpha = static_cast<float>(query.alpha);

  const Layout& layout = t.layout;
  // Known to the compiler where k is, for addresses of no more than a register and a constant.
  const int x_pitch = K > 0 ? x_pitch_of(K) : layout.x_pitch, v_pitch = K > 0 ? v_pitch_of(K) : layout.v_pitch;
  const int v_rows = K > 0 ? tile_side : layout.v_rows;
  float* const x_shared = dynamic_shared<float>();
  const Rectangle x{x_shared, x_pitch, layout.x_rows * x_pitch};
  float* const phi_shared = x_shared + t.channels * x.plane;
  const Rectangle phi{phi_shared, layout.phi_pitch, layout.phi_rows * layout.phi_pitch};
  float* const v = phi_shared + t.channels * phi.plane;

  const int bands = strips_of(rows), strips = strips_of(columns), tall = bands * strip;
  const int row_steps = steps_of(rows), column_steps = steps_of(columns);
  const bool each_its_own = rows.meets == Meets::itself;
  const int phi_rows = (each_its_own ? tall : strip) + k - 1 + together - 1;
  const int phi_columns =
      k - 1 + (columns.meets == Meets::all ? column_steps + strip - 1 : strips * strip + column_steps - 1);
  const int phi_row = each_its_own               ? rows.first - r
                      : rows.meets == Meets::all ? rows.source_first - (strip - 1) - r
                                                 : -r;
  const int phi_column = columns.meets == Meets::all ? columns.source_first - (strip - 1) - r : columns.first - r;

  const auto query_pixel = [&](std::int64_t at) { return t.x[query.b * t.channels * t.height * t.width + at]; };
  copy_rectangle(t, query_pixel, rows.first - r, columns.first - r, tall + k - 1, strips * strip + k - 1, x.pitch,
                 x.plane, x_shared);

  // This thread's pixels.
  const int row = static_cast<int>(threadIdx.x) % tall, own_strip = static_cast<int>(threadIdx.x) / tall;
  const bool weighs = own_strip < strips && row < rows.count;
  const int own_band_row = each_its_own ? row : row % strip;  // of the rows of the image in shared memory
  const Pixels pixels{std::int64_t{rows.first + row} * t.width + columns.first + strip * own_strip,
                      min(strip, columns.count - strip * own_strip)};
  const PartialAt part = partial_at(t, query, segment);
  State<YC, FULL> state;
  state.clear();
  if (weighs)
    for (int j = 0; j < pixels.end; ++j) clear_partial(part, pixels.p0 + j, t.first_channel, t.channel_count, FULL);

  const std::int64_t images = query.end - query.begin, first = first_of(segment, query.segments, images);
  const std::int64_t last = first_of(segment + 1, query.segments, images);
  const int size = t.height * t.width;
  int terms = 0;
  for (std::int64_t n = first; n < last; ++n) {
    const std::int64_t base = image_number(t, query.begin + n) * t.channels * size;
    const auto image_pixel = [&](std::int64_t at) { return bank_pixel(t, base + at); };
    for (int step = 0; step < row_steps; step += together) {
      copy_rectangle(t, image_pixel, phi_row + step, phi_column, phi_rows, phi_columns, phi.pitch, phi.plane,
                     phi_shared);
      __syncthreads();
      const int here = min(together, row_steps - step);
      for (int e = 0; e < column_steps; ++e) {
        // Pieces begin at the first strip that has wrapped so often, and at a column of v.
        int pieces = 1;
        if (columns.meets == Meets::all)
          while (strip * (strips - 1) + e >= pieces * column_steps) ++pieces;
        const auto piece_strip = [&](int piece) { return (piece * column_steps - e + strip - 1) / strip; };
        const int v_columns = strips * strip + pieces * (k - 1);
        const float per_band = 1.0f / static_cast<float>(v_columns);
        for (int i = static_cast<int>(threadIdx.x); i < bands * v_columns; i += blockDim.x) {
          const int band = static_cast<int>((i + 0.5f) * per_band), column = i - band * v_columns;  // i / v_columns
          int piece = pieces - 1;
          while (piece > 0 && column < piece_strip(piece) * strip + piece * (k - 1)) --piece;
          const int x_column = column - piece * (k - 1);
          const int phi_at = x_column + (columns.meets == Meets::itself ? 0 : e - piece * column_steps);
          const Rectangle own_x{x.at + band * strip * x.pitch + x_column, x.pitch, x.plane};
          const Rectangle own_phi{phi.at + (each_its_own ? band * strip : 0) * phi.pitch + phi_at, phi.pitch,
                                  phi.plane};
          float* const to = v + band * strip * v_pitch + column;
          column_sums<K, YC == 1 && !FULL>(own_x, own_phi, YC == 1 ? 1 : t.channels, k, alpha,
                                           [&](int g, int u, float sum) { to[(g * v_rows + u) * v_pitch] = sum; });
        }
        __syncthreads();
        if (weighs) {
          int piece = 0, at = strip * own_strip + e;  // where the strip begins, in the sources
          if (columns.meets == Meets::all)
            for (; at >= column_steps; at -= column_steps) ++piece;
          int begin = 0, end = pixels.end;
          if (columns.meets == Meets::all) {
            begin = max(0, strip - 1 - at);
            end = min(end, columns.source_count + strip - 1 - at);
          }
          const int phi_at = columns.meets == Meets::itself ? strip * own_strip : at;
          for (int g = 0; g < here && begin < end; ++g) {
            int q_row = rows.first + row;
            if (!each_its_own) q_row = phi_row + r + step + g + own_band_row;
            if (rows.meets == Meets::all &&
                (q_row < rows.source_first || q_row >= rows.source_first + rows.source_count))
              continue;
            if (rows.meets == Meets::around) q_row = wrapped(q_row, t.height);
            int q_column = phi_column + r + phi_at;
            if (columns.meets == Meets::around) q_column = wrapped(q_column, t.width);
            const Run run{v + (g * v_rows + row) * v_pitch + strip * own_strip + piece * (k - 1),
                          {x.at + row * x.pitch + strip * own_strip, x.pitch, x.plane},
                          {phi.at + (own_band_row + g) * phi.pitch + phi_at, phi.pitch, phi.plane},
                          k,
                          r,
                          static_cast<std::int32_t>(n - first) * size + q_row * t.width,
                          q_column,
                          t.width};
            float distance[strip];
            row_sums<K>(run.v, 1, k, distance);
            weigh(t, query, part, pixels, run, begin, end, distance, state);
          }
        }
        terms += here;
        if (terms >= max_float_terms) {
          if (weighs) flush(t, part, pixels, state);
          terms = 0;
        }
        __syncthreads();
      }
    }
  }
  if (!weighs) return;
  flush(t, part, pixels, state);
  if constexpr (FULL) {
#pragma unroll
    for (int j = 0; j < strip; ++j) {
      if (j >= pixels.end) continue;
      const std::int64_t p = pixels.p0 + j;
      const double nearest = state.nearest[j];
      if (nearest < part.nearest(p) || (nearest == part.nearest(p) && state.source[j] < part.source(p)))
        part.nearest(p) = nearest, part.source(p) = state.source[j];
    }
  }
}

}  // namespace
}  // namespace pyels::cuda
