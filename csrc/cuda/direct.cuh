// Windows that reach beyond the image, or are too large for shared memory: from the definition, all in double.
#pragma once

#include "cuda/device.cuh"

namespace pyels::cuda {
namespace {

// A block has one pixel and a segment, and its threads share the sources: for each the distance, from the definition.
template <int YC>
__global__ void __launch_bounds__(most_threads) direct(const __grid_constant__ Task t) {
  const Query& query = t.query[blockIdx.z];
  const int segment = static_cast<int>(blockIdx.y);
  if (segment >= query.segments) return;
  const int p_row = static_cast<int>(blockIdx.x) / t.width, p_column = static_cast<int>(blockIdx.x) % t.width;
  const Span rows = span_of(t.rows, p_row), columns = span_of(t.columns, p_column);
  const std::int64_t size = std::int64_t{t.height} * t.width, images = query.end - query.begin;
  const std::int64_t first = first_of(segment, query.segments, images);
  const std::int64_t places = std::int64_t{rows.source_count} * columns.source_count;
  const std::int64_t pairs = (first_of(segment + 1, query.segments, images) - first) * places;

  // The window's rows and columns around p and q, those inside the image where it is clipped.
  const Reach down = reach_of(t.rows, p_row), across = reach_of(t.columns, p_column);

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
      for (int y = down.first; y <= down.last; ++y) {
        const std::int64_t x_line =
            (query.b * t.channels + c) * size + std::int64_t{wrapped(p_row + y, t.height)} * t.width;
        const std::int64_t line = image + c * size + std::int64_t{wrapped(q_row + y, t.height)} * t.width;
        for (int z = across.first; z <= across.last; ++z) {
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

}  // namespace
}  // namespace pyels::cuda
