// Whole images (IS, ES): the distance of each image in each place, once more in double where float32 may not be good
// enough, and then the weights, which all pixels share.
#pragma once

#include <type_traits>

#include "cuda/device.cuh"

namespace pyels::cuda {
namespace {

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
      const std::int64_t from =
          entry.base + (std::int64_t{c} * t.height + (row < t.height ? row : row - t.height)) * t.width;
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
    if (static_cast<int>(threadIdx.x) < half)
      shared[threadIdx.x] = fmin(shared[threadIdx.x], shared[threadIdx.x + half]);
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

}  // namespace
}  // namespace pyels::cuda
