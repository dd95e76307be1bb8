// The second pass. The weight of every pair is known now, W = w / (sum of all w), and for one displacement these are a map
// over the pixels p, as the distances are. A window that answers, or through which x moves an answer, spreads the value of
// its pixel over its places: sums over windows of the map of values, the same sums as distances are of squared
// differences. What the image has at a place is then met once for all windows around it.
#include "cpu/second.h"

#include "cpu/distances.h"

namespace pyels::PYELS_ISA_NAME {
namespace {

// ---- Weights -----------------------------------------------------------------------------------------------------

// W of one output, or of the whole image; false where it is nothing.
template <class Wide>
PYELS_INLINE bool weigh(const SecondTask& t, std::int64_t p, DoubleVec distances, Wide wide, const MapWindow& window,
                        Vec& w) {
  w = Vec{};
  const Vec distance = narrow(distances);
  IntVec matters = t.skip + t.slack - static_cast<float>(t.reference[p]) > t.least_scale * distance;
  if (!any(matters)) return false;
  const IntVec far = matters & beyond(distance, t.wide_above);
  if (any(far)) {
    distances = choose(far, wide(), distances);
    const IntVec exact = far & beyond(distance, t.exact_above);
    if (any(exact)) distances = choose(exact, exact_distance(t, window), distances);
  }
  const Vec relative = narrow(-t.scale * distances - t.reference[p]);
  matters &= relative > -t.skip;
  if (!any(matters)) return false;
  w = matters ? exp2(relative) : w;
  return true;
}

// W of outputs j .. j + n - 1, where all that matters is near enough for float32; false where all are nothing.
template <int n>
PYELS_INLINE bool weigh_near(const float* offset, const float* distances, Vec scale, Vec least_weight, float* weights) {
  Vec relative[n];
  for (int u = 0; u < n; ++u) relative[u] = offset[u] - scale * load(distances + u * kLanes);
  Vec top = relative[0];
  for (int u = 1; u < n; ++u) top = top > relative[u] ? top : relative[u];
  const bool found = any_above(top, least_weight);
  for (int u = 0; u < n; ++u) store(weights + u * kLanes, found ? exp2(relative[u]) : Vec{});
  return found;
}

// W of `count` outputs; false where all are nothing.
bool weigh_run(const SecondTask& t, const Run& run, std::int64_t count, float* weights) {
  const float* offset = t.offset + run.p;
  bool found = false;
  if (any_beyond(t, &t.most_offset, 1) && any_beyond(t, offset, count)) {
    for (std::int64_t j = 0; j < count; ++j) {
      const auto wide = [&]() __attribute__((always_inline)) { return wide_distance(t, run, j); };
      const MapWindow window = window_of(run, static_cast<std::int32_t>(j));
      Vec w;
      found |= weigh(t, run.p + j, widen(load(run.distances + j * kLanes)), wide, window, w);
      store(weights + j * kLanes, w);
    }
    return found;
  }
  const Vec scale = Vec{} + static_cast<float>(t.scale), least_weight = Vec{} - t.skip;
  std::int64_t j = 0;
  for (; j + 4 <= count; j += 4)
    found |= weigh_near<4>(offset + j, run.distances + j * kLanes, scale, least_weight, weights + j * kLanes);
  if (count - j >= 2) {
    found |= weigh_near<2>(offset + j, run.distances + j * kLanes, scale, least_weight, weights + j * kLanes);
    j += 2;
  }
  if (j < count)
    found |= weigh_near<1>(offset + j, run.distances + j * kLanes, scale, least_weight, weights + j * kLanes);
  if (found && t.most_offset > 64.0f)
    for (j = 0; j < count; ++j) store(weights + j * kLanes, t.rest[run.p + j] * load(weights + j * kLanes));
  return found;
}

// ---- Answers by pixels -------------------------------------------------------------------------------------------

// `count` pixels p side by side and their sources' answers, with W of each.
struct Pixels {
  std::int64_t p, count;
  const float* answers;  // (count)[L] of channel 0
};

// A, what the cotangent is to the answer's difference from the mean. R = 0: any number of channels.
template <int R>
PYELS_INLINE Vec along_cotangent(const SecondTask& t, const Pixels& at, std::int64_t j) {
  const std::int64_t pixels = t.height * t.width;
  const float *mean = t.mean + at.p + j, *cotangent = t.cotangent + at.p + j, *answer = at.answers + j * kLanes;
  Vec sum = Vec{} - t.shift[at.p + j];
  const std::int64_t channels = R ? R : t.answer_channels;
  for (std::int64_t c = 0; c < channels; ++c) {
    sum += *cotangent * (load(answer) - *mean);
    mean += pixels, cotangent += pixels, answer += t.height * t.panel_width * kLanes;
  }
  return sum;
}

template <class Weight>
PYELS_INLINE void add_variance(const SecondTask& t, const Pixels& at, Weight weight) {
  const std::int64_t pixels = t.height * t.width;
  for (std::int64_t c = 0; c < t.answer_channels; ++c) {
    const float *mean = t.mean + c * pixels + at.p, *answer = at.answers + c * t.height * t.panel_width * kLanes;
    float* variance = t.variance + (c * pixels + at.p) * kLanes;
    for (std::int64_t j = 0; j < at.count; ++j) {
      const Vec difference = load(answer + j * kLanes) - mean[j];
      store(variance + j * kLanes, load(variance + j * kLanes) + weight(j) * (difference * difference));
    }
  }
}

void add_influence(const SecondTask& t, DoubleVec weight) {
  DoubleVec& influence = *reinterpret_cast<DoubleVec*>(t.influence);
  influence = influence + weight;
}

void note(const SecondTask& t, std::int64_t p, std::int64_t q, Vec w) {
  if (!any_above(w, Vec{} + t.noted[p])) return;
  float lanes[kLanes];
  __builtin_memcpy(lanes, &w, sizeof lanes);
  t.note(t.notes, p, q, lanes);
}

// ---- Answers by windows ------------------------------------------------------------------------------------------

// Places along an axis that the windows of `outputs` pixels reach. Around an axis that wraps each is met once.
std::int32_t reached(const MapTask& t, std::int32_t outputs, std::int32_t k, std::int64_t length) {
  return t.wraps ? least(outputs + k - 1, static_cast<std::int32_t>(length)) : outputs + k - 1;
}

// Sums along a row of the map, one for each place that windows reach.
using AlongRow = void (*)(int k, const float* taps, const float* map, std::int64_t places, float* out);
template <int K, int band>
void along_row(int k, const float* taps, const float* map, std::int64_t places, float* out) {
  for (std::int64_t j = 0; j < places; j += band)
    sum_windows<K, band>(
        k, taps, [&](int i) __attribute__((always_inline)) { return load(map + (j + i) * kLanes); },
        [&](int u, Vec sum) __attribute__((always_inline)) { store(out + (j + u) * kLanes, sum); });
}

// Sums of those over k rows.
using OverRows = void (*)(const float* const* rows, int k, const float* taps, std::int32_t outputs, float* out,
                          std::int64_t row_size);

// Adds `count` sums, times what the image has there, channel by channel, to the answer.
template <bool centred>
PYELS_INLINE void meet_image(const SecondTask& t, const Spread& spread, std::int64_t count, const float* sums,
                             std::int64_t image_at, std::int64_t z) {
  for (std::int64_t c = 0; c < spread.channels; ++c) {
    const float* image = spread.image + image_at + c * t.height * t.panel_width * kLanes;
    const float* centre = centred ? spread.centre + c * t.height * t.width + z : nullptr;
    float* out = spread.out + (c * t.height * t.width + z) * kLanes;
#pragma GCC unroll 4
    for (std::int64_t j = 0; j < count; ++j) {
      Vec value = load(image + j * kLanes);
      if (centred) value -= centre[j];
      store(out + j * kLanes, load(out + j * kLanes) + load(sums + j * kLanes) * value);
    }
  }
}

// By the size of windows, as `fitting` has it for the distances.
template <int K>
constexpr int band_of = K == weighted              ? 4
                        : K > 0 && K < kernel_band ? K
                                                   : kernel_band;
template <class Pick>
auto by_size(std::int32_t k, const float* taps, Pick pick) {
  if (taps) return pick.template operator()<weighted, band_of<weighted>>();
  switch (k) {
    case 1: return pick.template operator()<1, 1>();
    case 3: return pick.template operator()<3, band_of<3>>();
    case 5: return pick.template operator()<5, band_of<5>>();
    case 7: return pick.template operator()<7, band_of<7>>();
    case 9: return pick.template operator()<9, kernel_band>();
    case 11: return pick.template operator()<11, kernel_band>();
    case 13: return pick.template operator()<13, kernel_band>();
    case 15: return pick.template operator()<15, kernel_band>();
    case 17: return pick.template operator()<17, kernel_band>();
    default: return pick.template operator()<any_size, kernel_band>();
  }
}

// How an answer by windows is summed up.
struct Summing {
  AlongRow along;
  OverRows over;
  int band;  // rows that `over` takes at once

  Summing(const MapTask& t, const Spread& s)
      : along(by_size(t.k_columns, s.column_taps, []<int K, int band>() -> AlongRow { return along_row<K, band>; })),
        over(by_size(t.k_rows, s.row_taps, []<int K, int band>() -> OverRows { return sums_over_rows<K, band>; })),
        band(by_size(t.k_rows, s.row_taps, []<int K, int band>() { return band; })) {}
};

struct Prepared : SecondTask {
  Summing fold_summing, derivative_summing;
  explicit Prepared(const SecondTask& t) : SecondTask(t), fold_summing(t, fold), derivative_summing(t, derivative) {}
};

float* sums_of(const SecondTask& t, const Spread& spread, std::int64_t row) {
  return spread.sums + (1 + row) * spread_row(t.width, t.k_columns) * kLanes;
}

// Zeros around a row of a map of `outputs` pixels; where that is the whole axis, what lies before it is yet to come.
void clear_around(const SecondTask& t, const Spread& spread, std::int64_t outputs) {
  const std::int64_t before = t.k_columns - 1;
  for (std::int64_t j = 0; j < before; ++j) store(spread.map + j * kLanes, Vec{});
  for (std::int64_t j = 0; j < before + kernel_band; ++j) store(spread.map + (before + outputs + j) * kLanes, Vec{});
}

// Row `row` of a map is in spread.map, or is nothing.
void spread_row_of(const SecondTask& t, const Spread& spread, const Summing& summing, std::int32_t row,
                   std::int32_t outputs, bool nothing) {
  float* sums = nothing ? spread.sums : sums_of(t, spread, row);
  spread.sums_at[t.k_rows - 1 + row] = sums;
  if (nothing) return;
  if (t.wraps && outputs == t.width)
    for (std::int32_t j = 0; j < t.k_columns - 1; ++j)
      store(spread.map + j * kLanes, load(spread.map + (outputs + j) * kLanes));
  summing.along(t.k_columns, spread.column_taps, spread.map, reached(t, outputs, t.k_columns, t.width), sums);
}

// A few rows of places, of which `first` to before `last` are on the image: where column 0 of each is in the answer, and
// its first place in a panel.
struct Rows {
  std::int32_t count, first, last;
  std::int64_t z[kernel_band], image[kernel_band];
};

// Of n columns of places from j on, where the answer's are from z on: adds rows of the map to a running sum, and each
// time the sum, times what the image has there, to the answer.
template <bool centred, int n>
PYELS_INLINE void run_and_meet(const SecondTask& t, const Spread& spread, const float* const* rows, std::int32_t step,
                               const Rows& at, std::int64_t j, std::int64_t z, float* running) {
  const std::int64_t pixels = t.height * t.width, image_size = t.height * t.panel_width * kLanes;
  Vec sum[n];
  for (int i = 0; i < n; ++i) sum[i] = load(running + (j + i) * kLanes);
  for (std::int32_t u = 0; u < at.count; ++u) {
    const float* row = rows[u * step] + j * kLanes;
    for (int i = 0; i < n; ++i) sum[i] += load(row + i * kLanes);
    if (u < at.first || u >= at.last) continue;
    const float* image = spread.image + at.image[u] + j * kLanes;
    const float* centre = centred ? spread.centre + at.z[u] + z : nullptr;
    float* out = spread.out + (at.z[u] + z) * kLanes;
    for (std::int64_t c = 0; c < spread.channels; ++c) {
      for (int i = 0; i < n; ++i) {
        Vec value = load(image + i * kLanes);
        if (centred) value -= centre[i];
        store(out + i * kLanes, load(out + i * kLanes) + sum[i] * value);
      }
      image += image_size, out += pixels * kLanes;
      if (centred) centre += pixels;
    }
  }
  for (int i = 0; i < n; ++i) store(running + (j + i) * kLanes, sum[i]);
}

template <bool centred>
void run_and_meet(const SecondTask& t, const Spread& spread, const float* const* rows, std::int32_t step,
                  const Rows& at, std::int64_t j, std::int64_t z, std::int64_t count, float* running) {
  std::int64_t i = 0;
  for (; i + 4 <= count; i += 4) run_and_meet<centred, 4>(t, spread, rows, step, at, j + i, z + i, running);
  for (; i < count; ++i) run_and_meet<centred, 1>(t, spread, rows, step, at, j + i, z + i, running);
}

// When all rows are summed: over rows, and to the answer.
void spread_map(const SecondTask& t, const Spread& spread, const Summing& summing, const Axis& row,
                const Axis& column) {
  const std::int32_t k = t.k_rows, rows = reached(t, row.outputs, k, t.height);
  const std::int32_t columns = reached(t, column.outputs, t.k_columns, t.width);
  const std::int64_t row_size = spread_row(t.width, t.k_columns) * kLanes;
  const float** sums_at = spread.sums_at;
  const bool around = t.wraps && row.outputs == t.height;
  for (std::int32_t i = 0; i < k - 1; ++i) sums_at[i] = around ? sums_at[row.outputs + i] : spread.sums;
  for (std::int32_t i = 0; i < k - 1 + kernel_band; ++i) sums_at[k - 1 + row.outputs + i] = spread.sums;
  // Of clipped windows there is only what lies on the image.
  const auto clip = [&](const Axis& axis, std::int32_t places, std::int64_t length, std::int32_t& first) {
    first = t.wraps ? 0 : -least(least(axis.query, axis.source), 0);
    const std::int32_t room = static_cast<std::int32_t>(length) + least(-axis.query, -axis.source);
    return t.wraps ? places : least(places, room);
  };
  std::int32_t first_row, first_column;
  const std::int32_t last_row = clip(row, rows, t.height, first_row);
  const std::int32_t last_column = clip(column, columns, t.width, first_column);
  const auto rows_at = [&](std::int32_t i, std::int32_t count, std::int32_t step) {
    Rows at{count, count, 0, {}, {}};
    for (std::int32_t u = 0; u < count; ++u, i += step) {
      if (i < first_row || i >= last_row) continue;
      at.first = least(at.first, u), at.last = u + 1;
      at.z[u] = (t.wraps ? wrapped(row.query + i, t.height) : row.query + i) * t.width;
      at.image[u] = map_row(t, row.query + i, row.source + i, column).phi - t.panel;
    }
    return at;
  };
  // body(column, where it is in the answer, columns) for columns that lie side by side there.
  const auto for_columns = [&](auto body) {
    for (std::int32_t j = first_column, n; j < last_column; j += n) {
      const std::int32_t z = t.wraps ? wrapped(column.query + j, t.width) : column.query + j;
      n = least(last_column - j, static_cast<std::int32_t>(t.width) - z);
      body(j, z, n);
    }
  };
  const auto all_nothing = [&](std::int32_t i, std::int32_t count) {
    bool nothing = true;
    for (std::int32_t u = 0; u < count; ++u) nothing &= sums_at[i + u] == spread.sums;
    return nothing;
  };
  // Windows that begin at the first row of the map, or before, are sums of more and more rows; and so are from the other
  // end those that end at the last, or behind it. Those between, all of them where the map is the whole axis or rows weigh
  // differently, are summed in bands.
  const bool in_bands = around || spread.row_taps;
  const std::int32_t from = in_bands ? 0 : least(k, rows), to = in_bands             ? rows
                                                                : from > row.outputs ? from
                                                                                     : row.outputs;
  float* running = spread.band + kernel_band * row_size;
  const auto run = [&](std::int32_t i, std::int32_t count, std::int32_t step, const float* const* sums) {
    const Rows at = rows_at(i, count, step);
    for_columns([&](std::int64_t j, std::int64_t z, std::int64_t n) {
      if (spread.centre)
        run_and_meet<true>(t, spread, sums, step, at, j, z, n, running);
      else
        run_and_meet<false>(t, spread, sums, step, at, j, z, n, running);
    });
  };
  __builtin_memset(running, 0, static_cast<std::size_t>(columns) * kLanes * sizeof(float));
  bool nothing = true;
  for (std::int32_t i = 0, count; i < from; i += count) {
    count = least(kernel_band, from - i);
    nothing &= all_nothing(k - 1 + i, count);
    if (!nothing) run(i, count, 1, sums_at + k - 1 + i);
  }
  for (std::int32_t i = from, count; i < to; i += count) {
    count = least(summing.band, to - i);
    if (all_nothing(i, count + k - 1)) continue;
    summing.over(sums_at + i, k, spread.row_taps, columns, spread.band, row_size);
    const Rows at = rows_at(i, count, 1);
    for_columns([&](std::int64_t j, std::int64_t z, std::int64_t n) {
      for (std::int32_t u = at.first; u < at.last; ++u) {
        const float* sums = spread.band + u * row_size + j * kLanes;
        if (spread.centre)
          meet_image<true>(t, spread, n, sums, at.image[u] + j * kLanes, at.z[u] + z);
        else
          meet_image<false>(t, spread, n, sums, at.image[u] + j * kLanes, at.z[u] + z);
      }
    });
  }
  __builtin_memset(running, 0, static_cast<std::size_t>(columns) * kLanes * sizeof(float));
  nothing = true;
  for (std::int32_t end = rows, count; end > to; end -= count) {
    count = least(kernel_band, end - to);
    nothing &= all_nothing(end - count, count);
    if (!nothing) run(end - 1, count, -1, sums_at + end - 1);
  }
}

// ---- Displacements -----------------------------------------------------------------------------------------------

template <bool aligned>
struct Weigh {
  using Task = Prepared;

  template <int K, int band_rows, int band_columns, int C>
  static void squares(const Task& t, const Axis& row, const Axis& column) {
    bool in_row = false, in_map = false;
    if (t.fold.out) clear_around(t, t.fold, column.outputs);
    if (t.derivative.out) clear_around(t, t.derivative, column.outputs);
    for_each_run<K, band_rows, band_columns, C, aligned>(
        t, row, column, [&](const Run& run, std::int64_t n) { answer(t, run, n, row, column, in_row, in_map); });
    if (!in_map) return;
    if (t.fold.out) spread_map(t, t.fold, t.fold_summing, row, column);
    if (t.derivative.out) spread_map(t, t.derivative, t.derivative_summing, row, column);
  }

  static void answer(const Task& t, const Run& run, std::int64_t n, const Axis& row, const Axis& column, bool& in_row,
                     bool& in_map) {
    const std::int64_t place = (t.k_columns - 1 + run.first) * kLanes;
    float* weights = t.weights + place;
    if (run.first == 0) in_row = false;
    const bool found = weigh_run(t, run, n, weights);
    in_row |= found, in_map |= found;
    const Pixels at{run.p, n, run.centres};
    const auto weight = [&](std::int64_t j) __attribute__((always_inline)) { return load(weights + j * kLanes); };
    if (t.derivative.out) {
      const auto weigh_along = [&]<int R>() {
        float* map = t.derivative.map + place;
        for (std::int64_t j = 0; j < n; ++j)
          store(map + j * kLanes, found ? weight(j) * along_cotangent<R>(t, at, j) : Vec{});
      };
      if (t.answer_channels == 1)
        weigh_along.template operator()<1>();
      else if (t.answer_channels == 3)
        weigh_along.template operator()<3>();
      else
        weigh_along.template operator()<0>();
    }
    if (found && t.variance) add_variance(t, at, weight);
    if (found && t.influence) {
      Vec sum{};
      for (std::int64_t j = 0; j < n; ++j) sum += weight(j);
      add_influence(t, widen(sum));
    }
    if (found && t.noted) {
      const float* noted = t.noted + run.p;
      constexpr std::int64_t few = 4;  // looked at together, as nearly all are passed over
      for (std::int64_t j = 0; j < n; j += few) {
        const std::int64_t end = j + few < n ? j + few : n;
        Vec above = weight(j) - noted[j];
        for (std::int64_t u = j + 1; u < end; ++u) {
          const Vec other = weight(u) - noted[u];
          above = above > other ? above : other;
        }
        if (!any_above(above, Vec{})) continue;
        for (std::int64_t u = j; u < end; ++u) note(t, run.p + u, run.at + u, weight(u));
      }
    }
    if (run.first + n < column.outputs) return;
    const std::int32_t top = run.window.query_row - row.query;
    if (t.fold.out) spread_row_of(t, t.fold, t.fold_summing, top, column.outputs, !in_row);
    if (t.derivative.out) spread_row_of(t, t.derivative, t.derivative_summing, top, column.outputs, !in_row);
  }
};

template <bool precise>
void whole_image(const Prepared& t, const Axis& row, const Axis& column) {
  const MapWindow window{row.query, row.source, row.outputs, column, column.outputs};
  // In double where equal ones, which are summed up from different places on, are to be told apart by their numbers.
  const DoubleVec total = t.noted ? exact_distance(t, window) : image_distance<precise>(t, row, column);
  const auto wide = [&]() __attribute__((always_inline)) { return total; };
  Vec w;
  if (!weigh(t, 0, total, wide, window, w)) return;
  const std::int64_t pixels = t.height * t.width;
  // body(pixels side by side, where their sources are in a panel)
  const auto for_each_stretch = [&](auto body) {
    for (std::int32_t i = 0; i < row.outputs; ++i) {
      const std::int64_t source = map_row(t, row.query + i, row.source + i, column).phi - t.panel;
      const std::int64_t p_row = wrapped(row.query + i, t.height) * t.width;
      for (std::int32_t j = 0, n; j < column.outputs; j += n) {
        const std::int32_t p = wrapped(column.query + j, t.width);
        n = least(column.outputs - j, static_cast<std::int32_t>(t.width) - p);
        body(Pixels{p_row + p, n, t.answers + source + j * kLanes}, source + j * kLanes, row.source + i,
             column.source + j);
      }
    }
  };
  if (t.influence) add_influence(t, static_cast<double>(pixels) * widen(w));
  if (t.variance)
    for_each_stretch([&](const Pixels& at, std::int64_t, std::int32_t, std::int32_t) {
      add_variance(
          t, at, [&](std::int64_t) __attribute__((always_inline)) { return w; });
    });
  if (t.noted)
    for_each_stretch([&](const Pixels& at, std::int64_t, std::int32_t q_row, std::int32_t q) {
      for (std::int64_t j = 0; j < at.count; ++j) {
        const std::int32_t q_at = wrapped(q + static_cast<std::int32_t>(j), t.width);
        note(t, at.p + j, wrapped(q_row, t.height) * t.width + q_at, w);
      }
    });
  if (!t.derivative.out) return;
  DoubleVec along{};  // A of the whole image
  for_each_stretch([&](const Pixels& at, std::int64_t, std::int32_t, std::int32_t) {
    Vec sum{};
    for (std::int64_t j = 0; j < at.count; ++j) sum += along_cotangent<0>(t, at, j);
    along = along + widen(sum);
  });
  const Vec value = w * narrow(along);
  for_each_stretch([&](const Pixels& at, std::int64_t source, std::int32_t, std::int32_t) {
    for (std::int64_t c = 0; c < t.channels; ++c) {
      const float* image = t.panel + source + c * t.height * t.panel_width * kLanes;
      const float* centre = t.derivative.centre + c * pixels + at.p;
      float* out = t.derivative.out + (c * pixels + at.p) * kLanes;
      for (std::int64_t j = 0; j < at.count; ++j)
        store(out + j * kLanes, load(out + j * kLanes) + value * (load(image + j * kLanes) - centre[j]));
    }
  });
}

Displacement<Prepared> fitting_one(const Prepared& t) {
  if (t.whole_image) return t.precision ? whole_image<true> : whole_image<false>;
  // Sources that tie are told apart by their numbers: where these are asked for, equal windows have equal distances.
  return t.noted ? fitting<Weigh<true>>(t) : fitting<Weigh<false>>(t);
}

void accumulate(const SecondTask& second) {
  const Prepared t(second);
  for_each_displacement(t, fitting_one(t));
}

}  // namespace

extern const SecondKernel second{accumulate};

}  // namespace pyels::PYELS_ISA_NAME
