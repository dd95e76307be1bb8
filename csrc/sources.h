// The source set S(p) for windows of k x k pixels, of which this is the one home for all engines but the reference: it
// is the product of its two axes, rows and columns, and an axis is a list of spans, pixels that meet alike with the
// sources that they meet. Displacements (cpu), tiles (cuda) and the pixels that have lists (sampled) follow from these.
#pragma once

#include <algorithm>
#include <cstdint>

#include "pyels.h"

namespace pyels {

enum class Meets : std::int32_t {
  itself,  // p meets p
  all,     // every p meets every source
  around   // the same, and the sources are the whole axis, which wraps around
};

// Pixels p and sources q along an axis.
struct Span {
  std::int32_t first, count;                // p
  std::int32_t source_first, source_count;  // q
  Meets meets;
};

struct SourceAxis {
  std::int32_t length, window;  // n; k, or 2 n - 1 where a larger window too holds the whole axis wherever it stands
  bool wraps;                   // windows wrap around, else they are clipped
  std::int32_t spans;
  Span span[3];  // the one whose pixels meet others first, as the most work; then those at the low and the high end
};

constexpr bool wraps(Sources sources) { return sources == Sources::circular || sources == Sources::interior; }

// Along an axis of `length` pixels. With Window::image pixel 0 stands for all of them.
inline SourceAxis source_axis(const Problem& a, std::int64_t length) {
  const std::int64_t k = a.window == Window::image ? 1 : a.patch_size;
  const auto n = static_cast<std::int32_t>(length), r = static_cast<std::int32_t>(std::min(k, 2 * length - 1) / 2);
  SourceAxis axis{n, 2 * r + 1, wraps(a.sources), 0, {}};
  const auto add = [&](Span span) { axis.span[axis.spans++] = span; };
  switch (a.sources) {
    case Sources::same_position: add({0, n, 0, n, Meets::itself}); break;
    case Sources::circular: add({0, n, 0, n, Meets::around}); break;
    case Sources::interior: add({0, n, r, n - 2 * r, Meets::all}); break;
    case Sources::zeros:
      if (n < axis.window) {  // every window overhangs in its own way
        add({0, n, 0, n, Meets::itself});
        break;
      }
      add({r, n - 2 * r, r, n - 2 * r, Meets::all});
      if (r > 0) add({0, r, 0, r, Meets::itself}), add({n - r, r, n - r, r, Meets::itself});
      break;
  }
  return axis;
}

// How many sources each pixel of a span meets.
PYELS_BOTH constexpr std::int32_t sources_of(const Span& s) { return s.meets == Meets::itself ? 1 : s.source_count; }

inline std::int32_t most_sources(const SourceAxis& axis) {
  std::int32_t most = 1;
  for (std::int32_t i = 0; i < axis.spans; ++i) most = std::max(most, sources_of(axis.span[i]));
  return most;
}

// A region of the image: the pixels of a span of rows and a span of columns, by their numbers. Pixels of region (0, 0)
// meet others along both axes; with Sources::zeros those of (1, 0), (2, 0), (0, 1) and (0, 2) have windows that overhang
// one side, the top, the bottom, the left or the right, and the other four are the corners. As a number and as a bit:
constexpr std::int32_t region_of(std::int32_t rows, std::int32_t columns) { return 3 * rows + columns; }
constexpr unsigned bit(std::int32_t region) { return 1u << region; }
constexpr unsigned all_regions = (1u << 9) - 1;

// The regions there are.
inline unsigned regions_of(const SourceAxis& rows, const SourceAxis& columns) {
  unsigned regions = 0;
  for (std::int32_t i = 0; i < rows.spans; ++i)
    for (std::int32_t j = 0; j < columns.spans; ++j) regions |= bit(region_of(i, j));
  return regions;
}

// An axis with only those of its spans of which the bit of the number is set.
inline SourceAxis spans_of(const SourceAxis& axis, unsigned numbers) {
  SourceAxis some{axis.length, axis.window, axis.wraps, 0, {}};
  for (std::int32_t i = 0; i < axis.spans; ++i)
    if (numbers >> i & 1) some.span[some.spans++] = axis.span[i];
  return some;
}

// What pixel p meets along an axis: a span of itself.
PYELS_BOTH constexpr Span span_of(const SourceAxis& axis, std::int32_t p) {
  int i = 0;
  while (p < axis.span[i].first || p >= axis.span[i].first + axis.span[i].count) ++i;
  Span s = axis.span[i];
  s.first = p, s.count = 1;
  if (s.meets == Meets::itself) s.source_first = p, s.source_count = 1;
  return s;
}

// The places of the window around pixel p, relative to it: first and last, those on the axis where it is clipped.
struct Reach {
  std::int32_t first, last;
};
PYELS_BOTH constexpr Reach reach_of(const SourceAxis& axis, std::int32_t p) {
  const std::int32_t r = axis.window / 2, before = p, after = axis.length - 1 - p;
  if (axis.wraps) return {-r, r};
  return {before < r ? -before : -r, after < r ? after : r};
}

}  // namespace pyels
