// Source sets as spans of axes, against their definition pixel by pixel.
#include <algorithm>

#include "checks.h"
#include "sources.h"

using namespace checks;
using namespace pyels;

namespace {

// How far the window of radius r around p overhangs an axis of n pixels, before and after.
std::pair<int, int> overhang(int p, int r, int n) { return {std::max(0, r - p), std::max(0, p + r - (n - 1))}; }

bool is_source(Sources sources, int p, int q, int r, int n) {
  switch (sources) {
    case Sources::same_position: return p == q;
    case Sources::circular: return true;
    case Sources::interior: return overhang(q, r, n) == std::pair(0, 0);
    case Sources::zeros: return overhang(p, r, n) == overhang(q, r, n);
  }
  return false;
}

// body(axis, sources, r): on axes of any length, with windows that fit and that do not.
void on_every_axis(const std::function<void(const SourceAxis&, Sources, int)>& body) {
  for (const Sources sources : {Sources::same_position, Sources::circular, Sources::interior, Sources::zeros})
    for (int n = 1; n <= 12; ++n)
      for (int k = 1; k <= 2 * n + 5; k += 2) {
        Problem a;
        a.sources = sources, a.patch_size = k;
        if (k > n && wraps(sources)) continue;
        context = "sources " + std::to_string(static_cast<int>(sources)) + " n " + std::to_string(n) + " k " +
                  std::to_string(k);
        body(source_axis(a, n), sources, k / 2);
      }
}

void spans_are_the_definition() {
  on_every_axis([](const SourceAxis& axis, Sources sources, int r) {
    const int n = axis.length;
    check(axis.wraps == (sources == Sources::circular || sources == Sources::interior), "wraps");
    check(axis.window == std::min(2 * r + 1, 2 * n - 1), "window");
    int most = 0;
    for (int p = 0; p < n; ++p) {
      int holding = 0, met = 0;
      for (int i = 0; i < axis.spans; ++i) {
        const Span& s = axis.span[i];
        if (p < s.first || p >= s.first + s.count) continue;
        ++holding;
        const Span own = span_of(axis, p);
        check(own.first == p && own.count == 1 && own.source_count == sources_of(s), "the span of a pixel");
        for (int q = 0; q < n; ++q) {
          const bool expected = is_source(sources, p, q, r, n);
          check((q >= own.source_first && q < own.source_first + own.source_count) == expected, "sources");
          met += expected;
        }
        check(met == sources_of(s), "the number of sources");
      }
      check(holding == 1, "a pixel in no span, or in several");
      most = std::max(most, met);
    }
    check(most_sources(axis) == most, "the most sources");
  });
}

void pixels_that_meet_others_come_first() {
  on_every_axis([](const SourceAxis& axis, Sources, int) {
    for (int i = 1; i < axis.spans; ++i) {
      check(axis.span[i].meets == Meets::itself, "pixels that meet others are in several spans, or not in the first");
      check(i == 1 ? axis.span[i].first == 0 : axis.span[i].first > axis.span[1].first,
            "not the low end, then the high");
    }
  });
}

void regions_are_products_of_spans() {
  on_every_axis([](const SourceAxis& axis, Sources, int) {
    for (unsigned numbers = 0; numbers < 8; ++numbers) {
      const SourceAxis some = spans_of(axis, numbers);
      int taken = 0;
      for (int i = 0; i < axis.spans; ++i)
        if (numbers >> i & 1) check(some.span[taken++].first == axis.span[i].first, "another span");
      check(some.spans == taken, "the number of spans");
    }
    const unsigned regions = regions_of(axis, axis);
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j)
        check((regions >> region_of(i, j) & 1) == (i < axis.spans && j < axis.spans), "a region that is not there");
  });
}

void windows_reach_to_the_border() {
  on_every_axis([](const SourceAxis& axis, Sources, int r) {
    for (int p = 0; p < axis.length; ++p) {
      int first = r, last = -r;
      for (int z = -r; z <= r; ++z)
        if (axis.wraps || (p + z >= 0 && p + z < axis.length)) first = std::min(first, z), last = std::max(last, z);
      const Reach reach = reach_of(axis, p);
      check(reach.first == first && reach.last == last, "the reach of a window");
    }
  });
}

// Of Window::image the first pixel stands for all.
void whole_images_move() {
  for (const Sources sources : {Sources::same_position, Sources::circular}) {
    Problem a;
    a.window = Window::image, a.sources = sources, a.patch_size = 7;
    const SourceAxis axis = source_axis(a, 9);
    context = "whole images";
    check(axis.window == 1 && most_sources(axis) == (sources == Sources::circular ? 9 : 1), "moves");
  }
}

}  // namespace

int main(int count, char** arguments) {
  return run_tests(count, arguments,
                   {{"spans are the definition", spans_are_the_definition},
                    {"pixels that meet others come first", pixels_that_meet_others_come_first},
                    {"regions are products of spans", regions_are_products_of_spans},
                    {"windows reach to the border", windows_reach_to_the_border},
                    {"whole images move", whole_images_move}});
}
