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
    const SourceAxis themselves = part_of(axis, Part::themselves), others = part_of(axis, Part::others);
    check(themselves.spans + others.spans == axis.spans, "parts");
    check(others.spans <= 1, "pixels that meet others are in several spans");
    check(others.spans == 0 || axis.span[0].meets != Meets::itself, "not the first");
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
                    {"windows reach to the border", windows_reach_to_the_border},
                    {"whole images move", whole_images_move}});
}
