// What the kernels of the CUDA engine share: their argument, the partial posteriors they fill, and what of CUDA C++ is
// no function. Where there is no GPU, the tests supply a <cuda_runtime.h> of their own, which works off blocks and
// threads one after the other, and these few things with it.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "cuda/plan.h"

namespace pyels::cuda {

#if defined(__CUDACC__)
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ double pyels_shared[];
  return reinterpret_cast<T*>(pyels_shared);
}

// 2^x, relative error 2^-22; 0 far below.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

namespace {

struct Query {
  std::int64_t b, begin, end;
  std::int64_t partials;  // where its segments begin
  std::int32_t segments;
  double alpha;      // times the value of one unit of the bank
  bool by_products;  // the pixels that can be (products.cuh)
  Weighing weighing;
};

struct Task {
  const std::uint8_t* bytes;  // (N, C, H, W), one of the two; uint8 v is taken as v - 127.5, in units of 1 / 127.5
  const float* floats;
  const std::int64_t* order;
  const float* x;     // (B, C, H, W)
  double* partials;   // (segments of all queries, fields, H, W)
  double* distances;  // (queries, most) of whole images
  std::int64_t distances_most;
  double unit;
  std::int32_t channels, height, width;
  std::int32_t first_channel, channel_count;  // of y in this launch
  bool full;
  std::int32_t moves;
  SourceAxis rows, columns;
  Layout layout;
  std::int32_t queries;
  Query query[most_queries];
};

__device__ int wrapped(int i, int n) {
  i %= n;
  return i < 0 ? i + n : i;
}

__device__ float bank_pixel(const Task& t, std::int64_t at) {
  return t.bytes ? static_cast<float>(t.bytes[at]) - 127.5f : t.floats[at];
}

__device__ std::int64_t image_number(const Task& t, std::int64_t n) { return t.order ? t.order[n] : n; }

// Copies a rectangle of each channel's plane to shared memory: rows first_row .. + rows - 1, columns likewise, which
// wrap around, or are zero beyond the border.
template <class Pixel>
__device__ void copy_rectangle(const Task& t, Pixel pixel, int first_row, int first_column, int rows, int columns,
                               int pitch, int plane, float* to) {
  const int lane = threadIdx.x % 32, warps = blockDim.x / 32;
  for (int line = threadIdx.x / 32; line < t.channels * rows; line += warps) {
    const int c = line / rows, i = line % rows;
    int row = first_row + i;
    if (t.rows.wraps) row = wrapped(row, t.height);
    const bool inside = row >= 0 && row < t.height;
    for (int j = lane; j < columns; j += 32) {
      int column = first_column + j;
      if (t.columns.wraps) column = wrapped(column, t.width);
      const bool there = inside && column >= 0 && column < t.width;
      to[c * plane + i * pitch + j] =
          there ? pixel((static_cast<std::int64_t>(c) * t.height + row) * t.width + column) : 0.0f;
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
constexpr float headroom = 43.0f;  // log2 of what a weight may exceed its exponent by; far from overflow
constexpr float nothing = -1e4f;   // log-weight far below any that matters

__device__ void clear_partial(const PartialAt& to, std::int64_t p, int first_channel, int channel_count, bool full) {
  to.m(p) = -infinite, to.s(p) = 0.0;
  for (int c = 0; c < channel_count; ++c) to.y(first_channel + c, p) = 0.0;
  if (full) to.e(p) = 0.0, to.nearest(p) = infinite, to.source(p) = -1;
}

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

}  // namespace
}  // namespace pyels::cuda
