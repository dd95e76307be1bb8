// The one merge of two partial posteriors, for a pixel; for the host and for the device.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define PYELS_BOTH __host__ __device__
#else
#define PYELS_BOTH
#endif

namespace pyels {

// A pixel's part of struct Partial, but for y.
struct Sums {
  double m, s;
  double e, top;        // only of a full posterior
  std::int64_t source;
};

// What y (and, squared, variances) of the two are to be multiplied by before they are added.
struct Scales {
  double into, from;
};

// into := into + from, of which `from` is not empty. Of two equally heavy patches that in the lower image is the
// source, and within an image that of `into`.
PYELS_BOTH inline Scales merge_sums(Sums& into, const Sums& from, bool full, std::int64_t pixels) {
  const double m = into.m > from.m ? into.m : from.m;
  // exp(-inf) = 0 when into is empty; most often both are 1.
  const double a = into.m == m ? 1.0 : exp(into.m - m), b = from.m == m ? 1.0 : exp(from.m - m);
  if (full) {
    // e refers to m as well: moving m to m' turns (log w - m) into (log w - m) + (m - m').
    const double shift_a = into.s == 0.0 ? 0.0 : into.m - m, shift_b = from.m - m;
    into.e = a * (into.e + into.s * shift_a) + b * (from.e + from.s * shift_b);
    const bool lower = from.source / pixels < into.source / pixels;  // image
    if (from.top > into.top || (from.top == into.top && lower)) {
      into.top = from.top;
      into.source = from.source;
    }
  }
  into.s = a * into.s + b * from.s;
  into.m = m;
  return {a, b};
}

}  // namespace pyels
