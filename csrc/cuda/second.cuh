// The second pass. For a displacement the weights W = w / (sum of all w) are a map over the pixels, as the squared
// distances are, and an answer by windows is sums over windows of such a map, times what the image has there. A block
// has a segment of the images, each with every displacement of rows, and the maps of one displacement after the other:
//
//     squared differences -> over k rows -> and columns: distances -> W -> sums over k columns -> and rows
//
// each step by all of its threads. Sums over displacements are float32 for about 128 terms, then double in the
// segment's part of the workspace, and those of the segments are added in the order of the bank. Logarithms are to
// base 2.
#pragma once

#include "cuda/maps.cuh"

namespace pyels::cuda {
namespace {

struct SecondTask : Task {
  Second second;
  float* prepared;  // (queries, prepared_size) each laid out as Prepared
  std::int64_t prepared_size;
  float* maps;  // (queries, segments, floats); null: in shared memory
  std::int64_t floats;
  std::int32_t patch_size, pitch, most_segments, values;
};

// What is known of a query. Units are those of the bank; R = C.
struct Prepared {
  float *row_taps, *column_taps;  // of the fold, the last first, those of the places that a window has on the axis
  float *mean, *cotangent;        // (R, H, W)
  float* shift;                   // (H, W) what A is to be less than by `mean`, where that is rounded
};
__device__ Prepared prepared_at(const SecondTask& t, int query) {
  const std::int64_t pixels = std::int64_t{t.height} * t.width, values = t.channels * pixels;
  float* const taps = t.prepared + query * t.prepared_size;
  float* const mean = taps + t.rows.window + t.columns.window;
  return {taps, taps + t.rows.window, mean, mean + values, mean + 2 * values};
}

__device__ double fold_tap(const SecondTask& t, const SourceAxis& axis, int i) {
  return t.second.fold_taps[t.patch_size - 1 - (t.patch_size - axis.window) / 2 - i];
}

__global__ void __launch_bounds__(most_threads) prepare_second(const __grid_constant__ SecondTask t) {
  const Query& query = t.query[blockIdx.z];
  const Second& s = t.second;
  const Prepared to = prepared_at(t, static_cast<int>(blockIdx.z));
  const std::int64_t i = std::int64_t{blockIdx.x} * most_threads + threadIdx.x;
  const std::int64_t pixels = std::int64_t{t.height} * t.width, first = query.b * t.channels * pixels;
  if (s.folded && i < t.rows.window) to.row_taps[i] = static_cast<float>(fold_tap(t, t.rows, static_cast<int>(i)));
  if (s.folded && i < t.columns.window)
    to.column_taps[i] = static_cast<float>(fold_tap(t, t.columns, static_cast<int>(i)));
  if (i >= pixels || !(s.variance || s.derivative)) return;
  double shift = 0.0;
  for (std::int64_t at = i; at < t.channels * pixels; at += pixels) {
    const double mean = s.mean[first + at] / t.unit;
    to.mean[at] = static_cast<float>(mean);
    if (!s.derivative) continue;
    to.cotangent[at] = static_cast<float>(s.cotangent[first + at] * t.unit);
    shift += to.cotangent[at] * (mean - to.mean[at]);
  }
  if (s.derivative) to.shift[i] = static_cast<float>(shift);
}

// Sums of 8 windows side by side of k terms each, `step` apart, which weigh alike or as taps say.
template <int K>
__device__ void strip_sums(const float* v, int step, int k, const float* taps, float (&sums)[strip]) {
  if (!taps && (K > 0 || k >= strip)) {
    row_sums<K>(v, step, k, sums);
    return;
  }
#pragma unroll
  for (int u = 0; u < strip; ++u) sums[u] = 0.0f;
  for (int i = 0; i < k; ++i) {
    const float tap = taps ? taps[i] : 1.0f;
#pragma unroll
    for (int u = 0; u < strip; ++u) sums[u] = fmaf(tap, v[(i + u) * step], sums[u]);
  }
}

// A place of the query and the one of the image that it meets.
struct Place {
  std::int64_t z, q;
};

// A displacement of an image.
struct Displaced {
  Shift rows, columns;
  std::int64_t base;  // of the image's pixels

  // Of places that windows reach.
  __device__ static bool beyond(const Task& t, int row, int column) {
    return !t.rows.wraps && (row < 0 || row >= t.height || column < 0 || column >= t.width);
  }
  __device__ Place place(const Task& t, int row, int column) const {
    const auto wrapped = [](int i, int n) { return i < 0 ? i + n : i < n ? i : i - n; };  // nothing is two turns away
    row = wrapped(row, t.height), column = wrapped(column, t.width);
    return {std::int64_t{row} * t.width + column,
            std::int64_t{wrapped(row + rows.by, t.height)} * t.width + wrapped(column + columns.by, t.width)};
  }
};

// All that a thread's steps share.
struct Block {
  const SecondTask& t;
  const Query& query;
  float *differences, *columns, *weights, *offset, *rest, *along, *along_sums, *sums;
  Prepared prepared;
  const float *row_taps, *column_taps;  // null: all are 1

  __device__ Block(const SecondTask& task, float* maps)
      : t(task), query(task.query[blockIdx.z]), prepared(prepared_at(task, static_cast<int>(blockIdx.z))) {
    const SecondMaps at = second_maps(t.rows, t.pitch, t.second.derivative != nullptr);
    differences = maps, columns = maps + at.columns, weights = maps + at.weights, offset = maps + at.offset;
    rest = maps + at.rest, along = maps + at.along, along_sums = maps + at.along_sums, sums = maps + at.sums;
    const auto weigh_alike = [](const float* taps, int k) {
      bool alike = true;
      for (int i = 0; i < k; ++i) alike = alike && taps[i] == 1.0f;
      return alike;
    };
    row_taps = column_taps = nullptr;
    if (!t.second.folded) return;
    if (!weigh_alike(prepared.row_taps, t.rows.window)) row_taps = prepared.row_taps;
    if (!weigh_alike(prepared.column_taps, t.columns.window)) column_taps = prepared.column_taps;
  }

  __device__ std::int64_t pixels() const { return std::int64_t{t.height} * t.width; }
  // Sums over displacements, (values, H, W): folded, variance, derivative.
  __device__ float* variance() const { return sums + (t.second.folded ? t.channels * pixels() : 0); }
  __device__ float* derivative() const { return variance() + (t.second.variance ? t.channels * pixels() : 0); }

  // Shares body(row, column) out among the threads, neighbouring columns to neighbouring ones.
  template <class Body>
  __device__ void for_each(int rows, int columns, Body body) const {
    int row = static_cast<int>(threadIdx.x) / columns, column = static_cast<int>(threadIdx.x) % columns;
    const int down = static_cast<int>(blockDim.x) / columns, across = static_cast<int>(blockDim.x) % columns;
    while (row < rows) {
      body(row, column);
      row += down, column += across;
      if (column >= columns) column -= columns, ++row;
    }
  }

  // -log2 of the sum of all weights, as it enters log-weights in float32, less what float32 makes of the scale, and the
  // rest of its digits.
  __device__ void load_offsets() const {
    const double scale = query.weighing.scale, rounded = static_cast<float>(scale);
    for_each(t.height, t.width, [&](int row, int column) {
      const double log_sum = t.second.log_sum[query.b * pixels() + std::int64_t{row} * t.width + column];
      const bool none = fabs(log_sum) == infinite;
      const double exact = none ? -infinite : -log_sum / ln2 * (rounded > 1e-37 ? rounded / scale : 1.0);
      const int at = row * t.pitch + column;
      offset[at] = static_cast<float>(exact), rest[at] = none ? 0.0f : static_cast<float>(exact - offset[at]);
    });
  }

  __device__ void find_differences(const Displaced& d) const {
    const int reach_rows = d.rows.count + t.rows.window - 1, reach = d.columns.count + t.columns.window - 1;
    const float alpha = static_cast<float>(query.alpha);
    const float* const x = t.x + query.b * t.channels * pixels();
    for_each(reach_rows, reach, [&](int i, int j) {
      const int row = d.rows.first - t.rows.window / 2 + i, column = d.columns.first - t.columns.window / 2 + j;
      float sum = 0.0f;
      if (!d.beyond(t, row, column)) {
        const Place at = d.place(t, row, column);
        for (int c = 0; c < t.channels; ++c)
          add_squared<false>(x[c * pixels() + at.z], alpha, bank_pixel(t, d.base + c * pixels() + at.q), sum);
      }
      differences[i * t.pitch + j] = sum;
    });
  }

  template <int K>
  __device__ void sum_rows(const Displaced& d) const {
    const int reach = d.columns.count + t.columns.window - 1;
    for_each(ceil_div(d.rows.count, strip), reach, [&](int band, int j) {
      const int at = band * strip * t.pitch + j;
      float sum[strip];
      strip_sums<K>(differences + at, t.pitch, t.rows.window, nullptr, sum);
#pragma unroll
      for (int u = 0; u < strip; ++u) columns[at + u * t.pitch] = sum[u];
    });
  }

  // log2 W of pixel (row, column), whose sums over rows begin at v, in double.
  __device__ double far_weight(const Displaced& d, int row, int column, const float* v, float distance) const {
    double wide = 0.0;
    if (distance > query.weighing.exact_above) {
      const int r = t.rows.window / 2, s = t.columns.window / 2;
      for (int c = 0; c < t.channels; ++c)
        for (int i = -r; i <= r; ++i)
          for (int j = -s; j <= s; ++j) {
            if (d.beyond(t, row + i, column + j)) continue;
            const Place at = d.place(t, row + i, column + j);
            const double difference = static_cast<double>(t.x[(query.b * t.channels + c) * pixels() + at.z]) -
                                      query.alpha * bank_pixel(t, d.base + c * pixels() + at.q);
            wide += difference * difference;
          }
    } else {
      for (int j = 0; j < t.columns.window; ++j) wide += v[j];
    }
    const std::int64_t p = query.b * pixels() + std::int64_t{row} * t.width + column;
    return -query.weighing.scale * wide - t.second.log_sum[p] / ln2;
  }

  // W, at the place of pixels in maps that windows reach over; whether any is not nothing.
  template <int K>
  __device__ bool weigh(const Displaced& d) const {
    const Weighing& w = query.weighing;
    const float scale = static_cast<float>(w.scale);
    const int margin = d.columns.first - d.columns.reach_first + t.columns.window / 2;
    bool found = false;
    // Neighbouring threads have neighbouring rows, of an odd pitch.
    for_each(ceil_div(d.columns.count, strip), d.rows.count, [&](int own_strip, int row) {
      const int first = own_strip * strip;
      const float* const v = columns + row * t.pitch + first;
      const int at = (d.rows.first + row) * t.pitch + d.columns.first + first;
      float distance[strip];
      strip_sums<K>(v, 1, t.columns.window, nullptr, distance);
#pragma unroll
      for (int u = 0; u < strip; ++u) {
        if (first + u >= d.columns.count) continue;
        float log_w = fmaf(-scale, distance[u], offset[at + u]) + rest[at + u];
        if (distance[u] > w.wide_above && w.skip + offset[at + u] > w.least_scale * distance[u])
          log_w =
              static_cast<float>(far_weight(d, d.rows.first + row, d.columns.first + first + u, v + u, distance[u]));
        const float weight = log_w > -w.skip ? exp2_approx(log_w) : 0.0f;
        found = found || weight > 0.0f;
        weights[row * t.pitch + margin + first + u] = weight;
      }
    });
    return found;
  }

  // What the pixels' own sources answer, and the weights beside those of the pixels: none, or around an axis others.
  __device__ void answer_pixels(const Displaced& d) const {
    const Shift& across = d.columns;
    const int r = t.columns.window / 2, margin = across.first - across.reach_first + r;
    for_each(d.rows.count, across.reach + t.columns.window - 1, [&](int i, int j) {
      const int own = j - margin, pixel = across.around ? wrapped(own, t.width) : own;
      const bool there = pixel >= 0 && pixel < across.count, beside = own < 0 || own >= across.count;
      const float weight = there ? weights[i * t.pitch + margin + pixel] : 0.0f;
      if (beside) weights[i * t.pitch + j] = weight;
      float sum = 0.0f;
      if (weight > 0.0f && (t.second.derivative || (t.second.variance && !beside))) {
        const auto [p, q] = d.place(t, d.rows.first + i, across.first + pixel);
        if (t.second.derivative) sum = -prepared.shift[p];
        for (int c = 0; c < t.channels; ++c) {
          const std::int64_t at = c * pixels() + p;
          const float difference = bank_pixel(t, d.base + c * pixels() + q) - prepared.mean[at];
          if (t.second.derivative) sum = fmaf(prepared.cotangent[at], difference, sum);
          if (t.second.variance && !beside) variance()[at] = fmaf(weight, difference * difference, variance()[at]);
        }
      }
      if (t.second.derivative) along[i * t.pitch + j] = weight * sum;
    });
  }

  // Of a map that lies as the weights do, sums over columns of the windows that reach a place.
  template <int K>
  __device__ void spread_columns(const Displaced& d, const float* map, const float* taps, float* to) const {
    const int rows = d.rows.reach + t.rows.window - 1;
    const int margin = d.rows.first - d.rows.reach_first + t.rows.window / 2;
    for_each(ceil_div(d.columns.reach, strip), rows, [&](int own_strip, int row) {
      const int first = own_strip * strip;
      const int own = row - margin, pixel = d.rows.around ? wrapped(own, t.height) : own;
      float sum[strip] = {};
      if (pixel >= 0 && pixel < d.rows.count)
        strip_sums<K>(map + pixel * t.pitch + first, 1, t.columns.window, taps, sum);
#pragma unroll
      for (int u = 0; u < strip; ++u) to[row * t.pitch + first + u] = sum[u];
    });
  }

  // And of these over rows, times what the image has there less `centre`. Where the sum of the map over all sources is
  // nothing that may be anything: the nearer to images, the fewer digits are lost.
  template <int K>
  __device__ void meet_image(const Displaced& d, const float* map, const float* taps, const float* centre,
                             float* to) const {
    for_each(ceil_div(d.rows.reach, strip), d.columns.reach, [&](int band, int j) {
      float sum[strip];
      strip_sums<K>(map + band * strip * t.pitch + j, t.pitch, t.rows.window, taps, sum);
#pragma unroll
      for (int u = 0; u < strip; ++u) {
        if (band * strip + u >= d.rows.reach) continue;
        const auto [z, q] = d.place(t, d.rows.reach_first + band * strip + u, d.columns.reach_first + j);
        for (int c = 0; c < t.channels; ++c) {
          const std::int64_t at = c * pixels() + z;
          const float value = bank_pixel(t, d.base + c * pixels() + q) - (centre ? centre[at] : 0.0f);
          to[at] = fmaf(sum[u], value, to[at]);
        }
      }
    });
  }

  // All of one displacement.
  template <int K>
  __device__ void answer(const Displaced& d) const {
    find_differences(d);
    __syncthreads();
    sum_rows<K>(d);
    __syncthreads();
    if (!__syncthreads_or(weigh<K>(d))) return;
    answer_pixels(d);
    __syncthreads();
    if (t.second.folded) spread_columns<K>(d, weights, column_taps, differences);
    if (t.second.derivative) spread_columns<K>(d, along, nullptr, along_sums);
    __syncthreads();
    if (t.second.folded) meet_image<K>(d, differences, row_taps, nullptr, sums);
    if (t.second.derivative) meet_image<K>(d, along_sums, nullptr, prepared.mean, derivative());
    __syncthreads();
  }
};

// K for windows of that size, 0 for any.
template <int K>
__global__ void __launch_bounds__(most_threads) second_pass(const __grid_constant__ SecondTask t) {
  const Query& query = t.query[blockIdx.z];
  const int segment = static_cast<int>(blockIdx.x);
  if (segment >= query.segments) return;
  const std::int64_t number = std::int64_t{blockIdx.z} * t.most_segments + segment;
  const Block block(t, t.maps ? t.maps + number * t.floats : dynamic_shared<float>());
  const std::int64_t size = t.values * block.pixels();
  double* const total = t.partials + (query.partials + segment) * size;
  for (std::int64_t i = threadIdx.x; i < size; i += blockDim.x) total[i] = 0.0, block.sums[i] = 0.0f;
  block.load_offsets();
  __syncthreads();

  const std::int64_t row_shifts = shifts_of(t.rows), all = (query.end - query.begin) * row_shifts;
  const std::int64_t last = first_of(segment + 1, query.segments, all);
  int terms = 0;
  for (std::int64_t i = first_of(segment, query.segments, all); i < last; ++i) {
    Displaced d{};
    d.base = image_number(t, query.begin + i / row_shifts) * t.channels * block.pixels();
    d.rows = shift_of(t.rows, static_cast<int>(i % row_shifts));
    for (int shift = 0; shift < shifts_of(t.columns); ++shift) {
      d.columns = shift_of(t.columns, shift);
      block.answer<K>(d);
    }
    terms += shifts_of(t.columns);
    if (terms < max_float_terms && i + 1 < last) continue;
    for (std::int64_t j = threadIdx.x; j < size; j += blockDim.x) total[j] += block.sums[j], block.sums[j] = 0.0f;
    terms = 0;
    __syncthreads();
  }
}

// The segments of every sum, in the order of the bank, to what is there.
__global__ void __launch_bounds__(most_threads) add_segments(const __grid_constant__ SecondTask t) {
  const Query& query = t.query[blockIdx.z];
  const Second& s = t.second;
  const std::int64_t pixels = std::int64_t{t.height} * t.width, channels = t.channels * pixels;
  const std::int64_t size = t.values * pixels;
  const std::int64_t i = std::int64_t{blockIdx.x} * most_threads + threadIdx.x;
  if (i >= size) return;
  double sum = 0.0;
  for (int segment = 0; segment < query.segments; ++segment) sum += t.partials[(query.partials + segment) * size + i];
  const std::int64_t variance = s.folded ? channels : 0, derivative = variance + (s.variance ? channels : 0);
  if (i < variance)
    s.folded[query.b * channels + i] += t.unit * sum;
  else if (i < derivative)
    s.variance[query.b * channels + i - variance] += t.unit * t.unit * sum;
  else  // alpha / sigma^2, times the unit of the images
    s.derivative[query.b * channels + i - derivative] += query.alpha * 2 * ln2 * query.weighing.scale * sum;
}

}  // namespace
}  // namespace pyels::cuda
