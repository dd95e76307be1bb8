// Windows of one list against the query pixels that look into it.
//
//     log2 w = -scale * sum_i (x_i - phi_i)^2
//
// Layout: L windows of the bank side by side in the lanes of a vector; x is broadcast. Differences are squared before
// they are summed, so distances keep full float32 relative accuracy. Weights are summed relative to the heaviest of the
// panel, and these sums are merged into the cell of (query pixel, list).
#include "kernel.h"
#include "vec.h"

namespace pyels::PYELS_ISA_NAME {
namespace {

constexpr float kNone = -3e38f;  // log2 of a weight that is not there

PYELS_INLINE Vec square(Vec v) { return v * v; }

// Distances of `queries` windows x to `blocks` blocks; the two loops over them are unrolled.
template <int queries, int blocks>
PYELS_INLINE void distances(const float* panel, const float* const* x, std::int64_t dims, Vec* out) {
  Vec sum[queries][blocks] = {};
  for (std::int64_t i = 0; i < dims; ++i)
#pragma GCC unroll 4
    for (int b = 0; b < blocks; ++b) {
      const Vec phi = load(panel + (b * dims + i) * kLanes);
#pragma GCC unroll 2
      for (int q = 0; q < queries; ++q) sum[q][b] += square(x[q][i] - phi);
    }
  for (int q = 0; q < queries; ++q)
    for (int b = 0; b < blocks; ++b) out[q * blocks + b] = sum[q][b];
}

template <int queries>
void distances(int blocks, const float* panel, const float* const* x, std::int64_t dims, Vec* out) {
  switch (blocks) {
    case 1: return distances<queries, 1>(panel, x, dims, out);
    case 2: return distances<queries, 2>(panel, x, dims, out);
    case 3: return distances<queries, 3>(panel, x, dims, out);
    default: return distances<queries, 4>(panel, x, dims, out);
  }
}

template <class Join>
PYELS_INLINE float across(Vec v, Join join) {
  float lanes[kLanes];
  __builtin_memcpy(lanes, &v, sizeof v);
#pragma GCC unroll 4
  for (int half = kLanes / 2; half > 0; half /= 2)
#pragma GCC unroll 8
    for (int lane = 0; lane < half; ++lane) lanes[lane] = join(lanes[lane], lanes[lane + half]);
  return lanes[0];
}
PYELS_INLINE float sum(Vec v) {
  return across(v, [](float a, float b) __attribute__((always_inline)) { return a + b; });
}
PYELS_INLINE float largest(Vec v) {
  return across(v, [](float a, float b) __attribute__((always_inline)) { return a > b ? a : b; });
}

float exp2_of(float x) { return exp2(Vec{} + x)[0]; }

// Adds blocks first_block .. first_block + blocks - 1 of the panel to the cell of query i.
void weigh(const ListTask& t, const ListQuery& q, int first_block, int blocks, const Vec* distance) {
  Vec log_w[list_blocks];
  Vec most = Vec{} + kNone, d{}, dd{};
  for (int b = 0; b < blocks; ++b) {
    log_w[b] = -q.scale * distance[b];
    const std::int32_t at = (first_block + b) * kLanes;
    if (at < q.first || at + kLanes > q.last)
      for (int lane = 0; lane < kLanes; ++lane)
        if (at + lane < q.first || at + lane >= q.last) log_w[b][lane] = kNone;
    most = log_w[b] > most ? log_w[b] : most;
    const Vec from_expected = log_w[b] > kNone ? log_w[b] - q.expected : Vec{};
    d += from_expected, dd += from_expected * from_expected;
  }
  const float top = largest(most);
  q.sums[2] += sum(d), q.sums[3] += sum(dd);
  const std::int64_t n = list_sums(t.channels, t.full);
  float gathered[list_sums(list_channels, true)];
  Vec w[list_blocks], s{}, ss{}, e{};
  for (int b = 0; b < blocks; ++b) {
    const Vec relative = log_w[b] - top;
    w[b] = exp2(relative);
    w[b] = log_w[b] > kNone ? w[b] : Vec{};
    s += w[b], ss += w[b] * w[b];
    if (t.full) e += log_w[b] > kNone ? w[b] * relative : Vec{};
  }
  gathered[0] = sum(s), gathered[1] = sum(ss);
  for (std::int64_t c = 0; c < t.channels; ++c) {
    Vec y{}, sy{}, yy{};
    for (int b = 0; b < blocks; ++b) {
      const Vec centre = load(t.panel + ((first_block + b) * t.dims + t.centres[c]) * kLanes);
      const Vec part = w[b] * centre;
      y += part, sy += w[b] * part, yy += part * part;
    }
    gathered[4 + 3 * c] = sum(y), gathered[5 + 3 * c] = sum(sy), gathered[6 + 3 * c] = sum(yy);
  }
  if (t.full) gathered[n - 1] = sum(e);

  // Both parts relative to the larger maximum. Squares of weights move by the square.
  const float m = *q.m > top ? *q.m : top;
  const float down = *q.m - m, down_new = top - m;  // -inf when the cell is empty
  const float a = down > -100.0f ? exp2_of(down) : 0.0f, b = down_new > -100.0f ? exp2_of(down_new) : 0.0f;
  if (t.full) {
    q.sums[n - 1] = (down > -100.0f ? a * (q.sums[n - 1] + q.sums[0] * down) : 0.0f) +
                       b * (gathered[n - 1] + gathered[0] * down_new);
  }
  if (top > *q.top) {
    *q.top = top;
    for (int block = blocks - 1; block >= 0; --block)
      for (int lane = kLanes - 1; lane >= 0; --lane)
        if (log_w[block][lane] == top)
          *q.top_member = static_cast<std::int32_t>(t.first_member) + (first_block + block) * kLanes + lane;
  }
  q.sums[0] = a * q.sums[0] + b * gathered[0];
  q.sums[1] = a * a * q.sums[1] + b * b * gathered[1];
  for (std::int64_t c = 0; c < t.channels; ++c) {
    float* to = q.sums + 4 + 3 * c;
    const float* from = gathered + 4 + 3 * c;
    to[0] = a * to[0] + b * from[0];
    to[1] = a * a * to[1] + b * b * from[1];
    to[2] = a * a * to[2] + b * b * from[2];
  }
  *q.m = m;
}

}  // namespace

void weigh_list(const ListTask& t) {
  // Two queries at a time share the loads of the panel. A distance is the same whoever the other is.
  Vec distance[2 * list_blocks];
  for (std::int64_t i = 0; i < t.n_queries; i += 2) {
    const bool two = i + 1 < t.n_queries;
    const ListQuery &one = t.queries[i], &other = t.queries[two ? i + 1 : i];
    const std::int32_t first = other.first < one.first ? other.first : one.first;
    const std::int32_t last = other.last > one.last ? other.last : one.last;
    const int first_block = first / kLanes, blocks = (last + kLanes - 1) / kLanes - first_block;
    const float* panel = t.panel + first_block * t.dims * kLanes;
    const float* x[2] = {one.x, other.x};
    if (two)
      distances<2>(blocks, panel, x, t.dims, distance);
    else
      distances<1>(blocks, panel, x, t.dims, distance);
    weigh(t, one, first_block, blocks, distance);
    if (two) weigh(t, other, first_block, blocks, distance + blocks);
  }
}

void list_distances(const float* panel, const float* x, std::int64_t dims, float* out) {
  Vec distance[1];
  distances<1, 1>(panel, &x, dims, distance);
  __builtin_memcpy(out, distance, sizeof distance);
}

}  // namespace pyels::PYELS_ISA_NAME
