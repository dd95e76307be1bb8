// The exact engine on NVIDIA GPUs.
//
// Displacement maps, as on the CPU (kernel.cpp): for a fixed displacement d = q - p the squared distances of all pairs
// (p, p + d) are k x k box sums of one map D(z) = sum_c (x_c(z) - alpha * phi_c(z + d))^2, and sums only ever add. Here
// a block has a tile of up to 32 x 32 pixels p of a query and a segment of the bank. Each of its threads holds the sums
// of 8 pixels side by side in registers, and they go through the images and displacements together:
//
//   columns   a thread has a column of a map and 8 rows of windows: D, and its sums over k rows, for 4 displacements
//   (shared memory)
//   rows      a thread sums k of these for each of its 8 pixels, and weighs
//
// Weights refer to an exponent that is raised when a weight exceeds it by 2^43. Sums are float32 for 128 terms, and
// double from there on, in the segment's partial posterior in global memory. Segments are merged in the order of the
// bank, so nothing depends on which block was first. Where the error of a float32 distance could show, it is found again
// in double (weighing.h). Logarithms are to base 2.
#include <limits>
#include <stdexcept>
#include <string>

#include "cuda_plan.h"
#include "device.h"

namespace pyels {
namespace cuda {
namespace {

constexpr float headroom = 43.0f;    // 2^43 is far from overflow
constexpr float stands_out = 0.25f;  // of the weight gathered so far
constexpr double exact_float = 1e5;  // exponents above -1e5 are float32 numbers, which spares a rounding
constexpr float nothing = -1e4f;     // log-weight far below any that matters
constexpr float empty = 3e38f;       // -m of no weights: as good as infinite, but not NaN less the infinite distance of
                                     // what is no source

struct Query {
  std::int64_t b, begin, end;
  std::int64_t partials;  // where its segments begin
  std::int32_t segments;
  double alpha;           // times the value of one unit of the bank
  Weighing weighing;
};

struct Task {
  const std::uint8_t* bytes;  // (N, C, H, W), one of the two; uint8 v is taken as v - 127.5, in units of 1 / 127.5
  const float* floats;
  const std::int64_t* order;
  const float* x;             // (B, C, H, W)
  double* partials;           // (segments of all queries, fields, H, W)
  double* distances;          // (queries, most) of whole images
  std::int64_t distances_most;
  double unit;
  std::int32_t channels, height, width;
  std::int32_t first_channel, channel_count;  // of y in this launch
  bool wraps, full;
  std::int32_t moves;
  AxisPlan rows, columns;
  Layout layout;
  std::int32_t queries;
  Query query[most_queries];
};

// ---- Memory ------------------------------------------------------------------------------------------------------

__device__ int wrapped(int i, int n) {
  i %= n;
  return i < 0 ? i + n : i;
}

__device__ float bank_pixel(const Task& t, std::int64_t at) {
  return t.bytes ? static_cast<float>(t.bytes[at]) - 127.5f : t.floats[at];
}

__device__ std::int64_t image_number(const Task& t, std::int64_t n) { return t.order ? t.order[n] : n; }

// Copies a rectangle of each channel's plane to shared memory: rows first_row .. + rows - 1, columns likewise, which wrap
// around, or are zero beyond the border.
template <class Pixel>
__device__ void copy_rectangle(const Task& t, Pixel pixel, int first_row, int first_column, int rows, int columns,
                               int pitch, int plane, float* to) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int line = threadIdx.x / 32; line < t.channels * rows; line += warps) {
    const int c = line / rows, i = line % rows;
    int row = first_row + i;
    if (t.wraps) row = wrapped(row, t.height);
    const bool inside = row >= 0 && row < t.height;
    for (int j = lane; j < columns; j += 32) {
      int column = first_column + j;
      if (t.wraps) column = wrapped(column, t.width);
      const bool there = inside && column >= 0 && column < t.width;
      to[c * plane + i * pitch + j] = there ? pixel((static_cast<std::int64_t>(c) * t.height + row) * t.width + column) : 0.0f;
    }
  }
}

// The partial posterior of a segment of a query, (fields, H, W).
struct PartialAt {
  double* at;
  std::int64_t pixels;
  int channels;

  __device__ double& m(std::int64_t p) const { return at[p]; }
  __device__ double& s(std::int64_t p) const { return at[pixels + p]; }
  __device__ double& y(int c, std::int64_t p) const { return at[(2 + c) * pixels + p]; }
  __device__ double& e(std::int64_t p) const { return at[(2 + channels) * pixels + p]; }
  __device__ double& nearest(std::int64_t p) const { return at[(3 + channels) * pixels + p]; }
  __device__ std::int64_t& source(std::int64_t p) const {
    return reinterpret_cast<std::int64_t*>(at)[(4 + channels) * pixels + p];
  }
};

__device__ PartialAt partial_at(const Task& t, const Query& query, std::int64_t segment) {
  const std::int64_t pixels = std::int64_t{t.height} * t.width;
  const int fields = 2 + t.channels + (t.full ? 3 : 0);
  return {t.partials + (query.partials + segment) * fields * pixels, pixels, t.channels};
}

constexpr double infinite = std::numeric_limits<double>::infinity();

__device__ void clear_partial(const PartialAt& to, std::int64_t p, int first_channel, int channel_count, bool full) {
  to.m(p) = -infinite, to.s(p) = 0.0;
  for (int c = 0; c < channel_count; ++c) to.y(first_channel + c, p) = 0.0;
  if (full) to.e(p) = 0.0, to.nearest(p) = infinite, to.source(p) = -1;
}

// ---- Sums of windows ---------------------------------------------------------------------------------------------

// Out of the terms of 8 windows of K, each a term further on, their sums. Groups of windows that share terms: those that
// all of them have, down to where each begins, and up to where it ends. The order of a sum depends on the window alone.
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

// Adds a channel's term to a sum, or the only channel's sets it. (Products that the compiler fuses with the sum that they
// go into round otherwise than those it does not: not where equal windows are to have equal distances to the last bit.)
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

// Sums of k neighbours in a row of these, for 8 windows side by side.
template <int K>
__device__ void row_sums(const float* v, int k, float (&sums)[strip]) {
  if constexpr (K > 0) {
    float term[strip + K - 1];
#pragma unroll
    for (int i = 0; i < strip + K - 1; ++i) term[i] = v[i];
    window_sums<K>(term, sums);
  } else {
    float head[strip - 1], tail[strip - 1], core = v[strip - 1];
#pragma unroll
    for (int i = 0; i < strip - 1; ++i) head[i] = v[i], tail[i] = v[k + i];
#pragma unroll 4
    for (int i = strip; i < k; ++i) core += v[i];
    window_sums(head, core, tail, sums);
  }
}

// ---- Weights -----------------------------------------------------------------------------------------------------

// What a thread weighs: 8 pixels against 8 sources side by side, with what is needed to look closer.
struct Run {
  const float* v;        // sums along columns, at the first column of the first window
  Rectangle x, phi;      // at the first place of the first window, of the query and of the image
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
  float least;          // log-weights below do not matter to any of them; conservative
  bool far;             // what matters may lie beyond wide_above

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

// Adds the sums of pixel p, which refer to exponent m, to the segment's.
__device__ void flush(const PartialAt& part, std::int64_t p, double m, float s, float e, bool full) {
  const double before = part.m(p);
  if (before != m) {
    const double factor = before == -infinite ? 0.0 : exp2(before - m);
    if (full) part.e(p) = before == -infinite ? 0.0 : factor * (part.e(p) + part.s(p) * (before - m));
    part.s(p) *= factor, part.m(p) = m;
  }
  part.s(p) += s;
  if (full) part.e(p) += e;
}
__device__ double flush_factor(const PartialAt& part, std::int64_t p, double m) {
  const double before = part.m(p);
  return before == m ? 1.0 : before == -infinite ? 0.0 : exp2(before - m);
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
      if (distance[j] > w.exact_above &&
          (FULL || distance[j] > w.always_exact_above || relative > 120.0 ||
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
      const float raised = scale * distance[j];  // the new offset
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
      const bool nearer = distance[j] < state.nearest[j] || (distance[j] == state.nearest[j] && source < state.source[j]);
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
  const int segment = static_cast<int>(blockIdx.x);
  if (segment >= query.segments) return;
  const int column_tiles = tiles_of(t.columns), tile = static_cast<int>(blockIdx.y);
  const Span rows = tile_of(t.rows, tile / column_tiles), columns = tile_of(t.columns, tile % column_tiles);
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
  const int phi_row = each_its_own ? rows.first - r : rows.meets == Meets::all ? rows.source_first - (strip - 1) - r : -r;
  const int phi_column = columns.meets == Meets::all ? columns.source_first - (strip - 1) - r : columns.first - r;

  const auto query_pixel = [&](std::int64_t at) {
    return t.x[query.b * t.channels * t.height * t.width + at];
  };
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
    for (int j = 0; j < pixels.end; ++j)
      clear_partial(part, pixels.p0 + j, t.first_channel, t.channel_count, FULL);

  const std::int64_t images = query.end - query.begin, first = first_of(segment, query.segments, images);
  const std::int64_t last = first_of(segment + 1, query.segments, images);
  const int size = t.height * t.width;
  int terms = 0;
  for (std::int64_t n = first; n < last; ++n) {
    const std::int64_t base = image_number(t, query.begin + n) * t.channels * size;
    const auto image_pixel = [&](std::int64_t at) { return bank_pixel(t, base + at); };
    for (int step = 0; step < row_steps; step += together) {
      copy_rectangle(t, image_pixel, phi_row + step, phi_column, phi_rows, phi_columns, phi.pitch, phi.plane, phi_shared);
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
          const Rectangle own_phi{phi.at + (each_its_own ? band * strip : 0) * phi.pitch + phi_at, phi.pitch, phi.plane};
          float* const to = v + band * strip * v_pitch + column;
          column_sums<K, YC == 1 && !FULL>(own_x, own_phi, YC == 1 ? 1 : t.channels, k, alpha, [&](int g, int u, float sum) {
            to[(g * v_rows + u) * v_pitch] = sum;
          });
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
            if (rows.meets == Meets::all && (q_row < rows.source_first || q_row >= rows.source_first + rows.source_count))
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
            row_sums<K>(run.v, k, distance);
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

// ---- Windows that reach beyond the image, or are too large for shared memory ----------------------------------------

// A thread's sums of one pixel, or those of a block; all in double.
template <int YC>
struct Total {
  double m, s, y[YC], e, nearest;
  std::int64_t source;  // image in the segment * pixels + q

  __device__ void clear() {
    m = -infinite, s = 0.0, e = 0.0, nearest = infinite, source = -1;
    for (int c = 0; c < YC; ++c) y[c] = 0.0;
  }
  // Moves to a higher exponent.
  __device__ void raise(double raised) {
    const double factor = s == 0.0 ? 0.0 : exp2(m - raised);
    if (s > 0.0) e = factor * (e + s * (m - raised));
    s *= factor, m = raised;
    for (int c = 0; c < YC; ++c) y[c] *= factor;
  }
  __device__ void note(double distance, std::int64_t at) {
    if (distance < nearest || (distance == nearest && at < source)) nearest = distance, source = at;
  }
  __device__ void add(Total other) {
    if (other.s == 0.0) return;
    if (other.m > m) raise(other.m);
    if (m > other.m) other.raise(m);
    s += other.s, e += other.e;
    for (int c = 0; c < YC; ++c) y[c] += other.y[c];
    note(other.nearest, other.source);
  }
};

// A block has one pixel and a segment, and its threads share the sources: for each the distance, from the definition.
template <int YC>
__global__ void __launch_bounds__(most_threads) direct(const __grid_constant__ Task t) {
  const Query& query = t.query[blockIdx.z];
  const int segment = static_cast<int>(blockIdx.y);
  if (segment >= query.segments) return;
  const int p_row = static_cast<int>(blockIdx.x) / t.width, p_column = static_cast<int>(blockIdx.x) % t.width;
  const auto span_of = [](const AxisPlan& axis, int p) {
    int i = 0;
    while (p < axis.span[i].first || p >= axis.span[i].first + axis.span[i].count) ++i;
    Span span = axis.span[i];
    if (span.meets == Meets::itself) span.source_first = p, span.source_count = 1;
    return span;
  };
  const Span rows = span_of(t.rows, p_row), columns = span_of(t.columns, p_column);
  const std::int64_t size = std::int64_t{t.height} * t.width, images = query.end - query.begin;
  const std::int64_t first = first_of(segment, query.segments, images);
  const std::int64_t places = std::int64_t{rows.source_count} * columns.source_count;
  const std::int64_t pairs = (first_of(segment + 1, query.segments, images) - first) * places;

  // The window's rows and columns around p and q, those inside the image where it is clipped.
  const int r_rows = t.rows.window / 2, r_columns = t.columns.window / 2;
  const int top = t.wraps ? -r_rows : max(-r_rows, -p_row), left = t.wraps ? -r_columns : max(-r_columns, -p_column);
  const int bottom = t.wraps ? r_rows : min(r_rows, t.height - 1 - p_row);
  const int right = t.wraps ? r_columns : min(r_columns, t.width - 1 - p_column);

  Total<YC> own;
  own.clear();
  for (std::int64_t i = threadIdx.x; i < pairs; i += blockDim.x) {
    const std::int64_t n = i / places;
    const int place = static_cast<int>(i % places);
    const int q_row = rows.source_first + place / columns.source_count;
    const int q_column = columns.source_first + place % columns.source_count;
    const std::int64_t image = image_number(t, query.begin + first + n) * t.channels * size;
    double distance = 0.0;
    for (int c = 0; c < t.channels; ++c)
      for (int y = top; y <= bottom; ++y) {
        const std::int64_t x_line = (query.b * t.channels + c) * size + std::int64_t{wrapped(p_row + y, t.height)} * t.width;
        const std::int64_t line = image + c * size + std::int64_t{wrapped(q_row + y, t.height)} * t.width;
        for (int z = left; z <= right; ++z) {
          const double difference = static_cast<double>(t.x[x_line + wrapped(p_column + z, t.width)]) -
                                    query.alpha * bank_pixel(t, line + wrapped(q_column + z, t.width));
          distance += difference * difference;
        }
      }
    const double log_w = -query.weighing.scale * distance;
    if (log_w > own.m) own.raise(log_w);
    const double relative = log_w - own.m, weight = exp2(relative);
    own.s += weight, own.e += weight * relative;
    const std::int64_t q = std::int64_t{q_row} * t.width + q_column;
    for (int c = 0; c < YC; ++c)
      if (c < t.channel_count) own.y[c] += weight * bank_pixel(t, image + (t.first_channel + c) * size + q);
    own.note(distance, n * size + q);
  }

  Total<YC>* const totals = dynamic_shared<Total<YC>>();
  totals[threadIdx.x] = own;
  for (int half = most_threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) totals[threadIdx.x].add(totals[threadIdx.x + half]);
  }
  if (threadIdx.x > 0) return;
  const Total<YC>& total = totals[0];
  const PartialAt part = partial_at(t, query, segment);
  const std::int64_t p = blockIdx.x;
  part.m(p) = total.m, part.s(p) = total.s;
  for (int c = 0; c < YC; ++c)
    if (c < t.channel_count) part.y(t.first_channel + c, p) = total.y[c];
  if (t.full) part.e(p) = total.e, part.nearest(p) = total.nearest, part.source(p) = total.source;
}

// ---- Whole images ------------------------------------------------------------------------------------------------

// An entry is an image moved by (row, column): pixel p of the query meets p + (row, column).
struct Entry {
  std::int64_t base;  // of the image's pixels
  int row, column;
};

__device__ Entry entry_at(const Task& t, const Query& query, std::int64_t i) {
  const int move = static_cast<int>(i % t.moves);
  const std::int64_t size = std::int64_t{t.channels} * t.height * t.width;
  return {image_number(t, query.begin + i / t.moves) * size, move / t.width, move % t.width};
}

// The squared distance of a whole image, by a warp; every thread of it gets the sum. EXACT: all in double, else sums of
// 16 rows are float32.
template <bool EXACT>
__device__ double image_distance(const Task& t, const Query& query, const Entry& entry) {
  using Number = std::conditional_t<EXACT, double, float>;
  const int lane = threadIdx.x % 32, lines = t.channels * t.height;
  const Number alpha = static_cast<Number>(query.alpha);
  const float* x = t.x + query.b * lines * t.width;
  double total = 0.0;
  for (int block = 0; block < lines; block += 16) {
    Number sum = 0;
    for (int line = block; line < min(block + 16, lines); ++line) {
      const int c = line / t.height, row = line % t.height + entry.row;
      const std::int64_t from = entry.base + (std::int64_t{c} * t.height + (row < t.height ? row : row - t.height)) * t.width;
      for (int column = lane; column < t.width; column += 32) {
        const int moved = column + entry.column;
        const Number phi = bank_pixel(t, from + (moved < t.width ? moved : moved - t.width));
        const Number difference = static_cast<Number>(x[std::int64_t{line} * t.width + column]) - alpha * phi;
        sum += difference * difference;
      }
    }
    total += sum;
  }
  for (int other = 16; other > 0; other /= 2) total += __shfl_xor_sync(0xffffffffu, total, other);
  return total;
}

__device__ double* distances_of(const Task& t) { return t.distances + blockIdx.z * t.distances_most; }

__global__ void __launch_bounds__(most_threads) image_distances(const __grid_constant__ Task t) {
  const Query& query = t.query[blockIdx.z];
  const std::int64_t entries = (query.end - query.begin) * t.moves;
  const std::int64_t i = std::int64_t{blockIdx.x} * (most_threads / 32) + threadIdx.x / 32;
  if (i >= entries) return;
  const double distance = image_distance<false>(t, query, entry_at(t, query, i));
  if (threadIdx.x % 32 == 0) distances_of(t)[i] = distance;
}

// The least distance of a segment's entries, for every thread of the block.
__device__ double least_distance(const double* distances, std::int64_t first, std::int64_t last) {
  double* const shared = dynamic_shared<double>();
  double least = infinite;
  for (std::int64_t i = first + threadIdx.x; i < last; i += blockDim.x) least = fmin(least, distances[i]);
  shared[threadIdx.x] = least;
  for (int half = most_threads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < half) shared[threadIdx.x] = fmin(shared[threadIdx.x], shared[threadIdx.x + half]);
  }
  __syncthreads();
  return shared[0];
}

// Distances that matter and that float32 terms may not be good enough for: once more in double.
__global__ void __launch_bounds__(most_threads) exact_distances(const __grid_constant__ Task t) {
  const Query& query = t.query[blockIdx.z];
  const Weighing& w = query.weighing;
  if (static_cast<int>(blockIdx.x) >= query.segments) return;
  const std::int64_t entries = (query.end - query.begin) * t.moves;
  const std::int64_t first = first_of(blockIdx.x, query.segments, entries);
  const std::int64_t last = first_of(blockIdx.x + 1, query.segments, entries);
  double* const distances = distances_of(t);
  const double nearest = least_distance(distances, first, last);
  for (std::int64_t i = first + threadIdx.x / 32; i < last; i += blockDim.x / 32) {
    const double distance = distances[i];
    if (distance <= w.exact_above || w.least_scale * distance > w.scale * nearest + w.skip) continue;
    const double exact = image_distance<true>(t, query, entry_at(t, query, i));
    if (threadIdx.x % 32 == 0) distances[i] = exact;
  }
}

// A block has up to 128 pixels and a segment of the entries.
template <int YC>
__global__ void __launch_bounds__(most_threads) weigh_images(const __grid_constant__ Task t) {
  const Query& query = t.query[blockIdx.z];
  const Weighing& w = query.weighing;
  const int segment = static_cast<int>(blockIdx.y);
  if (segment >= query.segments) return;
  const std::int64_t entries = (query.end - query.begin) * t.moves;
  const std::int64_t first = first_of(segment, query.segments, entries);
  const std::int64_t last = first_of(segment + 1, query.segments, entries);
  const double* const distances = distances_of(t);
  const double nearest = least_distance(distances, first, last), m = -w.scale * nearest;
  const std::int64_t p = std::int64_t{blockIdx.x} * most_threads + threadIdx.x;
  const std::int64_t size = std::int64_t{t.height} * t.width;
  if (p >= size) return;
  const int row = static_cast<int>(p / t.width), column = static_cast<int>(p % t.width);
  double total_s = 0.0, total_y[YC] = {}, total_e = 0.0;
  float s = 0.0f, y[YC] = {}, e = 0.0f;
  std::int64_t source = -1;
  int terms = 0;
  const auto flush_terms = [&] {
    total_s += s, total_e += e, s = e = 0.0f, terms = 0;
    for (int c = 0; c < YC; ++c) total_y[c] += y[c], y[c] = 0.0f;
  };
  for (std::int64_t i = first; i < last; ++i) {
    const double log_w = -w.scale * distances[i];
    const float relative = static_cast<float>(log_w - m);
    if (!(relative > -w.skip)) continue;
    const Entry entry = entry_at(t, query, i);
    const int q_row = wrapped(row + entry.row, t.height), q_column = wrapped(column + entry.column, t.width);
    const std::int64_t q = std::int64_t{q_row} * t.width + q_column;
    const float weight = exp2_approx(relative);
    s += weight, e = fmaf(weight, relative, e);
    for (int c = 0; c < YC; ++c)
      if (c < t.channel_count) y[c] = fmaf(weight, bank_pixel(t, entry.base + (t.first_channel + c) * size + q), y[c]);
    if (source < 0 && distances[i] == nearest) source = i / t.moves * size + q;  // the first of equals
    if (++terms == max_float_terms) flush_terms();
  }
  flush_terms();
  const PartialAt part = partial_at(t, query, segment);
  part.m(p) = m, part.s(p) = total_s;
  for (int c = 0; c < YC; ++c)
    if (c < t.channel_count) part.y(t.first_channel + c, p) = total_y[c];
  if (t.full) part.e(p) = total_e, part.nearest(p) = nearest, part.source(p) = source;
}

// ---- Merging -----------------------------------------------------------------------------------------------------

// The segments of every pixel, in the order of the bank, after what `out` holds already (more) or not.
__global__ void __launch_bounds__(most_threads) merge_segments(const __grid_constant__ Task t, CudaOut out, bool by_entries,
                                                               bool more) {
  const Query& query = t.query[blockIdx.z];
  const std::int64_t pixels = std::int64_t{t.height} * t.width;
  const std::int64_t p = std::int64_t{blockIdx.x} * most_threads + threadIdx.x, at = query.b * pixels + p;
  if (p >= pixels) return;
  const auto y_of = [&](int c) -> double& { return out.y[(query.b * t.channels + c) * pixels + p]; };
  Sums total{-infinite, 0.0, 0.0, -infinite, -1};
  if (more) {
    total.m = out.m[at], total.s = out.s[at];
    if (t.full) total.e = out.e[at], total.top = out.top[at], total.source = out.source[at];
  } else {
    for (int c = 0; c < t.channels; ++c) y_of(c) = 0.0;
  }
  const std::int64_t images = query.end - query.begin;
  for (int segment = 0; segment < query.segments; ++segment) {
    const PartialAt part = partial_at(t, query, segment);
    if (!(part.s(p) > 0.0)) continue;
    Sums own{part.m(p) * ln2, part.s(p), 0.0, 0.0, 0};
    if (t.full) {
      // Sources are numbered from the segment's first image.
      const std::int64_t first = by_entries ? 0 : first_of(segment, query.segments, images);
      const std::int64_t source = part.source(p), image = image_number(t, query.begin + first + source / pixels);
      own.e = part.e(p) * ln2;
      own.top = -query.weighing.scale * part.nearest(p) * ln2;
      own.source = image * pixels + source % pixels;
    }
    const Scales scales = merge_sums(total, own, t.full, pixels);
    for (int c = 0; c < t.channels; ++c) y_of(c) = scales.into * y_of(c) + scales.from * (part.y(c, p) * t.unit);
  }
  out.m[at] = total.m, out.s[at] = total.s;
  if (t.full) out.e[at] = total.e, out.top[at] = total.top, out.source[at] = total.source;
}

// ---- Launches ----------------------------------------------------------------------------------------------------

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Makes a device the current one of this thread, as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_));
    if (device == before_) before_ = -1;  // nothing to go back to: that would open a context there
    else check(cudaSetDevice(device));
  }
  ~OnDevice() {
    if (before_ >= 0) (void)cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

// What a block of the current device may have.
int shared_bytes() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, std::int64_t shared, cudaStream_t stream,
            Arguments... arguments) {
  if (shared > 48 * 1024)
    // Always the most: other threads launch the same kernel for other sizes.
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared_bytes()));
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared), config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

using Kernel = void (*)(Task);

// The kernels for K, or those for any larger window (K = 0); for one channel, or for up to y_channels at a time.
template <int K>
Kernel maps_kernel(bool one_channel, bool full) {
  return one_channel ? (full ? maps<K, 1, true> : maps<K, 1, false>)
                     : (full ? maps<K, y_channels, true> : maps<K, y_channels, false>);
}
Kernel maps_kernel(int k, bool one_channel, bool full) {
  switch (k) {
    case 1: return maps_kernel<1>(one_channel, full);
    case 3: return maps_kernel<3>(one_channel, full);
    case 5: return maps_kernel<5>(one_channel, full);
    case 7: return maps_kernel<7>(one_channel, full);
    default: return maps_kernel<0>(one_channel, full);
  }
}

dim3 grid(std::int64_t x, std::int64_t y, std::int64_t z) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

Task make_task(const Problem& a, const Plan& plan, void* workspace) {
  Task t{};
  t.bytes = a.pixels_uint8, t.floats = a.pixels_float, t.order = a.order, t.x = a.x;
  t.unit = a.pixels_uint8 ? 1 / 127.5 : 1.0;
  t.partials = static_cast<double*>(workspace);
  t.channels = static_cast<std::int32_t>(a.channels);
  t.height = static_cast<std::int32_t>(a.height), t.width = static_cast<std::int32_t>(a.width);
  t.wraps = a.sources == Sources::circular || a.sources == Sources::interior;
  t.full = a.full, t.moves = plan.moves;
  t.rows = plan.rows, t.columns = plan.columns, t.layout = plan.layout;
  return t;
}

// Sources that a pixel meets in one image, at most.
double most_sources(const AxisPlan& axis) {
  int most = 1;
  for (int i = 0; i < axis.spans; ++i)
    if (axis.span[i].meets != Meets::itself) most = std::max(most, axis.span[i].source_count);
  return most;
}

}  // namespace
}  // namespace cuda

std::int64_t cuda_workspace(const Problem& a, int device) {
  const cuda::OnDevice on_device(device);
  return cuda::make_plan(a, cuda::shared_bytes()).workspace;
}

int cuda_driver_lacks() {
  int driver = 0, runtime = 0;
  cuda::check(cudaDriverGetVersion(&driver)), cuda::check(cudaRuntimeGetVersion(&runtime));
  return driver / 1000 < runtime / 1000 ? runtime : 0;  // within a major version any driver will do
}

void cuda_engine(const Problem& a, const CudaOut& out, void* workspace, int device, void* stream_) {
  using namespace cuda;
  const OnDevice on_device(device);
  const auto stream = static_cast<cudaStream_t>(stream_);
  const Plan plan = make_plan(a, shared_bytes());
  const std::int64_t pixels = a.height * a.width;
  const bool whole_images = plan.method == Method::images;
  const std::int64_t window_values =
      a.channels * (whole_images ? pixels : std::int64_t{plan.rows.window} * plan.columns.window);
  const double sources = whole_images ? plan.moves : most_sources(plan.rows) * most_sources(plan.columns);
  const std::int64_t pixel_blocks = (pixels + most_threads - 1) / most_threads;

  for (std::int64_t b0 = 0; b0 < a.queries; b0 += plan.queries) {
    Task t = make_task(a, plan, workspace);
    t.queries = static_cast<std::int32_t>(std::min<std::int64_t>(plan.queries, a.queries - b0));
    std::int32_t segments = 0;
    std::int64_t partials = 0, images = 0;
    for (std::int32_t i = 0; i < t.queries; ++i) {
      const std::int64_t b = b0 + i, own = a.end[b] - a.begin[b];
      const std::int32_t own_segments = segments_of(a, plan, own);
      t.query[i] = {b, a.begin[b], a.end[b], partials, own_segments, a.alpha[b] * t.unit,
                    weighing(a, b, std::max<double>(1.0, static_cast<double>(own)) * sources, window_values)};
      partials += own_segments, segments = std::max(segments, own_segments), images = std::max(images, own);
    }
    t.distances = t.partials + partials * plan.partial_size;

    // Every launch has as many channels of y as a thread holds sums of.
    const bool one_channel = a.channels == 1;
    const auto for_all_channels = [&](Task task, Kernel kernel, dim3 blocks, int threads, std::int64_t shared) {
      for (task.first_channel = 0; task.first_channel < task.channels; task.first_channel += y_channels) {
        task.channel_count = std::min(y_channels, task.channels - task.first_channel);
        launch(kernel, blocks, threads, shared, stream, task);
      }
    };
    const auto merge_all = [&](const Task& task, bool more) {
      launch(merge_segments, grid(pixel_blocks, 1, t.queries), most_threads, 0, stream, task, out, whole_images, more);
    };
    if (plan.method == Method::maps) {
      const std::int64_t tiles = std::int64_t{tiles_of(plan.rows)} * tiles_of(plan.columns);
      for_all_channels(t, maps_kernel(plan.rows.window, one_channel, a.full), grid(segments, tiles, t.queries),
                       plan.layout.threads, plan.layout.floats * 4);
      merge_all(t, false);
    } else if (plan.method == Method::direct) {
      if (one_channel)
        for_all_channels(t, direct<1>, grid(pixels, segments, t.queries), most_threads, most_threads * sizeof(Total<1>));
      else
        for_all_channels(t, direct<y_channels>, grid(pixels, segments, t.queries), most_threads,
                         most_threads * sizeof(Total<y_channels>));
      merge_all(t, false);
    } else {
      const std::int64_t step = images_at_once(a, plan), entries = step * t.moves;
      t.distances_most = entries;
      for (std::int64_t done = 0; done == 0 || done < images; done += step) {
        Task part = t;
        for (std::int32_t i = 0; i < t.queries; ++i) {
          Query& query = part.query[i];
          query.begin = std::min(query.begin + done, query.end), query.end = std::min(query.begin + step, query.end);
        }
        const std::int64_t warps = most_threads / 32;
        launch(image_distances, grid((entries + warps - 1) / warps, 1, t.queries), most_threads, 0, stream, part);
        launch(exact_distances, grid(segments, 1, t.queries), most_threads, most_threads * 8, stream, part);
        for_all_channels(part, one_channel ? weigh_images<1> : weigh_images<y_channels>,
                         grid(pixel_blocks, segments, t.queries), most_threads, most_threads * 8);
        merge_all(part, done > 0);
      }
    }
  }
}

}  // namespace pyels
