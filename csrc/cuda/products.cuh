// Small windows by inner products on tensor cores, for precision "high":
//
//     log2 w = scale (2 alpha x.phi - |alpha phi|^2) - scale |x|^2        scale = log2(e) / (2 sigma^2)
//
// A tensor core multiplies numbers of 11 bits (tf32) and sums in float32. A uint8 pixel is such a number; a pixel of x
// is split into two, high + low. That is as exact as float32, but of the whole product, which is much larger than the
// differences of log-weights where the noise is low: such queries are left to maps (by_products).
//
// A warp has 16 neighbouring pixels of a query, whose windows, times 2 scale alpha, it holds in registers, as the rows
// of a matrix; its columns are sources, 8 side by side and the 8 below these, whose windows come from a tile of the
// image in shared memory. Of the products every thread gets those of 2 pixels, each with 2 + 2 sources, weighs them,
// and sums in float32 up to 128 terms, then in double. Sums of the four threads that share a pixel are added at the
// end.
#pragma once

#include "cuda/device.cuh"

namespace pyels::cuda {

#if defined(__CUDACC__)
// sum += a b, of 16 x 8 and 8 x 8 numbers of 11 bits: of a, a thread holds rows lane / 4 and 8 more, columns lane % 4
// and 4 more; of b, rows lane % 4 and 4 more, column lane / 4; of the sum, rows as of a, columns 2 (lane % 4) and 1
// more.
__device__ inline void multiply_add(float (&sum)[4], const float (&a)[4], const float (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])), "r"(__float_as_uint(a[3])),
        "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}
#endif

namespace {

// The nearest number of 11 bits.
__device__ inline float tf32(float x) { return __uint_as_float((__float_as_uint(x) + 0x1000) & ~0x1fffu); }

constexpr float no_source = -3e38f;   // log-weight
constexpr float no_exponent = 1e30f;  // -m of no weights; still far below any log-weight where there is no source

// What a thread has of its 2 pixels.
template <int YC, bool FULL>
struct ProductSums {
  float offset[2], s[2], y[YC][2];  // -m, and what refers to it
  float e[FULL ? 2 : 1], heaviest[FULL ? 2 : 1];
  std::int32_t source[FULL ? 2 : 1];

  __device__ void clear() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      offset[h] = no_exponent;
      if (FULL) heaviest[h] = no_source, source[h] = -1;
    }
    clear_sums();
  }
  __device__ void clear_sums() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      s[h] = 0.0f;
      if (FULL) e[h] = 0.0f;
#pragma unroll
      for (int c = 0; c < YC; ++c) y[c][h] = 0.0f;
    }
  }

  // Adds 2 + 2 sources, of which product[u][2 h + v] + offset[h] is the log-weight for pixel h: in row u, column v.
  // centre(c, u, v) and number(u, v) tell about them.
  template <class Centre, class Number>
  __device__ void add(const float (&product)[2][4], float skip, int channel_count, Centre centre, Number number) {
    float most[2], weights[2][4];
#pragma unroll
    for (int h = 0; h < 2; ++h)
      most[h] = fmaxf(fmaxf(product[0][2 * h], product[0][2 * h + 1]), fmaxf(product[1][2 * h], product[1][2 * h + 1]));
    const float top = fmaxf(most[0] + offset[0], most[1] + offset[1]);
    if (!(top > -skip)) return;
    if (top > headroom) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (!(most[h] + offset[h] > headroom)) continue;
        const float shift = -most[h] - offset[h], factor = exp2_approx(shift);  // 0 where there was no weight yet
        if (FULL) e[h] = factor > 0.0f ? factor * fmaf(s[h], shift, e[h]) : 0.0f;
        s[h] *= factor;
#pragma unroll
        for (int c = 0; c < YC; ++c) y[c][h] *= factor;
        offset[h] = -most[h];
      }
    }
#pragma unroll
    for (int u = 0; u < 2; ++u)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int h = i / 2;
        const float log_w = product[u][i] + offset[h], weight = exp2_approx(log_w);
        weights[u][i] = weight;
        s[h] += weight;
        if (FULL) {
          e[h] = fmaf(weight, fmaxf(log_w, nothing), e[h]);
          const std::int32_t own = number(u, i % 2);
          const bool heavier = product[u][i] > heaviest[h] || (product[u][i] == heaviest[h] && own < source[h]);
          heaviest[h] = heavier ? product[u][i] : heaviest[h];
          source[h] = heavier ? own : source[h];
        }
      }
#pragma unroll
    for (int c = 0; c < YC; ++c)
      if (c < channel_count) {
#pragma unroll
        for (int u = 0; u < 2; ++u)
#pragma unroll
          for (int v = 0; v < 2; ++v) {
            const float value = centre(c, u, v);
            y[c][0] = fmaf(weights[u][v], value, y[c][0]);
            y[c][1] = fmaf(weights[u][2 + v], value, y[c][1]);
          }
      }
  }

  // Moves the sums of pixel h to `total`, of which m and nearest are to base 2 and lack -scale |x|^2.
  __device__ void flush(int h, Total<YC>& total) {
    if (!(s[h] > 0.0f)) return;
    const double m = -static_cast<double>(offset[h]);
    if (total.m != m) total.raise(m);
    total.s += s[h];
    if (FULL) total.e += e[h];
    for (int c = 0; c < YC; ++c) total.y[c] += y[c][h];
  }
};

template <int STEPS, int YC, bool FULL>
__global__ void __launch_bounds__(product_threads, STEPS <= 4 ? 2 : 1) products(const __grid_constant__ Task t) {
  const Query& query = t.query[blockIdx.z];
  const int segment = static_cast<int>(blockIdx.y);
  if (segment >= query.segments || !query.by_products) return;
  const Span rows = t.rows.span[0], columns = t.columns.span[0];
  const int k = t.rows.window, r = k / 2, values = t.channels * k * k;
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int group = lane / 4, member = lane % 4;
  const double scale = query.weighing.scale;

  // Pixels first_pixel + group and 8 more, counted row by row through the span.
  const int pixels = rows.count * columns.count;
  const int first_pixel = static_cast<int>(blockIdx.x) * product_pixels + warp * 16;
  int p_row[2], p_column[2];
  for (int h = 0; h < 2; ++h) {
    const int i = min(first_pixel + group + 8 * h, pixels - 1);
    p_row[h] = rows.first + i / columns.count, p_column[h] = columns.first + i % columns.count;
  }
  const auto window_value = [&](int h, int c, int y, int z) {
    int row = p_row[h] - r + y, column = p_column[h] - r + z;
    row += row < 0 ? t.height : row >= t.height ? -t.height : 0;  // never beyond where windows do not wrap around
    column += column < 0 ? t.width : column >= t.width ? -t.width : 0;
    return t.x[((query.b * t.channels + c) * t.height + row) * t.width + column];
  };
  float high[STEPS][4], low[STEPS][4];  // parts of the windows, 8 values a step
  int place[STEPS][2];                  // of the values of this thread in a window in shared memory
  const int plane = (tile_side + k - 1) * product_pitch;
#pragma unroll
  for (int step = 0; step < STEPS; ++step)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int value = 8 * step + 4 * half + member;  // beyond the last ones, that of a factor of 0
      const int c = value < values ? value / (k * k) : 0, y = value < values ? value / k % k : 0;
      const int z = value < values ? value % k : 0;
      place[step][half] = c * plane + y * product_pitch + z;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float factor =
            value < values ? static_cast<float>(2.0 * scale * query.alpha * window_value(h, c, y, z)) : 0.0f;
        high[step][2 * half + h] = tf32(factor);
        low[step][2 * half + h] = tf32(factor - high[step][2 * half + h]);
      }
    }

  static_assert(sizeof(Total<YC>) == total_bytes(YC));
  Total<YC>* const totals = dynamic_shared<Total<YC>>();
  Total<YC>* const own = totals + threadIdx.x * 2;
  own[0].clear(), own[1].clear();
  float* const phi = reinterpret_cast<float*>(totals + 2 * product_threads);
  float* const norms = phi + t.channels * plane;  // -scale |alpha phi|^2, (32, 32)
  const auto norm_scale = static_cast<float>(-scale * query.alpha * query.alpha);
  ProductSums<YC, FULL> sums;
  sums.clear();

  const std::int64_t images = query.end - query.begin, first = first_of(segment, query.segments, images);
  const std::int64_t last = first_of(segment + 1, query.segments, images);
  const int size = t.height * t.width, row_tiles = ceil_div(rows.source_count, tile_side);
  const int column_tiles = ceil_div(columns.source_count, tile_side);
  for (std::int64_t n = first; n < last; ++n) {
    const std::int64_t base = image_number(t, query.begin + n) * t.channels * size;
    const auto image_pixel = [&](std::int64_t at) { return bank_pixel(t, base + at); };
    for (int tile = 0; tile < row_tiles * column_tiles; ++tile) {
      // Sources of the tile, and how many there are with those that fill up pairs of rows and eights of columns.
      const int q_row = rows.source_first + tile / column_tiles * tile_side;
      const int q_column = columns.source_first + tile % column_tiles * tile_side;
      const int tall = min(tile_side, rows.source_first + rows.source_count - q_row);
      const int wide = min(tile_side, columns.source_first + columns.source_count - q_column);
      const int filled_rows = ceil_div(tall, 2) * 2, filled_columns = ceil_div(wide, 8) * 8;
      __syncthreads();
      copy_rectangle(t, image_pixel, q_row - r, q_column - r, filled_rows + k - 1, filled_columns + k - 1,
                     product_pitch, plane, phi);
      __syncthreads();
      for (int i = static_cast<int>(threadIdx.x); i < filled_rows * filled_columns; i += product_threads) {
        const int row = i / filled_columns, column = i % filled_columns;
        float norm = 0.0f;
        for (int c = 0; c < t.channels; ++c)
          for (int y = row; y < row + k; ++y)
            for (int z = column; z < column + k; ++z) {
              const float value = phi[c * plane + y * product_pitch + z];
              norm = fmaf(value, value, norm);
            }
        norms[row * tile_side + column] = row < tall && column < wide ? norm_scale * norm : no_source;
      }
      __syncthreads();
      if (first_pixel >= pixels) continue;

      int terms = 0;
      for (int row = 0; row < filled_rows; row += 2) {
        for (int column = 0; column < filled_columns; column += 8) {
          const float* const window = phi + row * product_pitch + column + group;
          const float* const norm = norms + row * tile_side + column + 2 * member;
          float product[2][4];
          __syncwarp();
#pragma unroll
          for (int u = 0; u < 2; ++u) {
            // From the smallest terms to the largest, of which fewer then are cut off.
            float value[STEPS][2];
#pragma unroll
            for (int step = 0; step < STEPS; ++step)
#pragma unroll
              for (int half = 0; half < 2; ++half) value[step][half] = window[u * product_pitch + place[step][half]];
#pragma unroll
            for (int i = 0; i < 4; ++i) product[u][i] = 0.0f;
#pragma unroll
            for (int step = 0; step < STEPS; ++step) multiply_add(product[u], low[step], value[step]);
#pragma unroll
            for (int step = 0; step < STEPS; ++step) multiply_add(product[u], high[step], value[step]);
#pragma unroll
            for (int i = 0; i < 4; ++i) product[u][i] += norm[u * tile_side + i % 2];
          }
          const auto centre = [&](int c, int u, int v) {
            return phi[(t.first_channel + c) * plane + (row + u + r) * product_pitch + column + r + 2 * member + v];
          };
          const auto number = [&](int u, int v) {
            return static_cast<std::int32_t>(n - first) * size + (q_row + row + u) * t.width + q_column + column +
                   2 * member + v;
          };
          sums.add(product, query.weighing.skip, t.channel_count, centre, number);
        }
        terms += filled_columns / 2;  // of a thread and pixel: 2 of 8 columns, of two rows
        if (terms + tile_side / 2 > max_float_terms || row + 2 >= filled_rows) {
          sums.flush(0, own[0]), sums.flush(1, own[1]);
          sums.clear_sums();
          terms = 0;
        }
      }
    }
  }

  // Threads that share a pixel are neighbours.
  if (FULL)
    for (int h = 0; h < 2; ++h) own[h].note(-static_cast<double>(sums.heaviest[h]), sums.source[h]);
  __syncthreads();
  if (member > 0) return;
  const PartialAt part = partial_at(t, query, segment);
  for (int h = 0; h < 2; ++h) {
    if (first_pixel + group + 8 * h >= pixels) continue;
    Total<YC> total = own[h];
    for (int other = 1; other < 4; ++other) total.add(own[2 * other + h]);
    double norm = 0.0;
    for (int c = 0; c < t.channels; ++c)
      for (int y = 0; y < k; ++y)
        for (int z = 0; z < k; ++z) {
          const double value = window_value(h, c, y, z);
          norm += value * value;
        }
    const std::int64_t p = std::int64_t{p_row[h]} * t.width + p_column[h];
    part.m(p) = total.m - scale * norm, part.s(p) = total.s;
    for (int c = 0; c < YC; ++c)
      if (c < t.channel_count) part.y(t.first_channel + c, p) = total.y[c];
    if (FULL) part.e(p) = total.e, part.nearest(p) = norm + total.nearest / scale, part.source(p) = total.source;
  }
}

}  // namespace
}  // namespace pyels::cuda
