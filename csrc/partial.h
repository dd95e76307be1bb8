// Partial posteriors and the one way they merge, on the host and on the device.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#if defined(__CUDACC__)
#define PYELS_BOTH __host__ __device__
#else
#define PYELS_BOTH
#endif

namespace pyels {

// The partial posterior of each pixel over a part of the bank. It is a monoid: `merge` below is associative, and the
// neutral element is what `Partial(pixels, channels, full)` makes. Posterior mean = y / s.
struct Partial {
  std::int64_t pixels = 0, channels = 0;  // pixels = H * W
  bool full = false;                      // want_posterior: e, top and source as well
  std::vector<double> m;                  // (H, W)    exponent of s, y and e: near the largest log w, -inf when empty
  std::vector<double> s;                  // (H, W)    sum of exp(log w - m)
  std::vector<double> y;                  // (C, H, W) sum of exp(log w - m) * centre; C = 0: not wanted
  std::vector<double> e;                  // (H, W)    sum of exp(log w - m) * (log w - m)
  std::vector<double> top;                // (H, W)    largest log w
  std::vector<std::int64_t> source;       // (H, W)    its patch: image * H * W + row * W + column, -1 when empty

  // Of an approximation (`sampled`), where s and y are estimates; relative to exp(2 m).
  bool sampled = false;
  std::vector<double> ss, sy, yy;  // (H, W), (C, H, W), (C, H, W) variance of s, covariance of s and y, variance of y
  std::vector<double> chance;      // (H, W) number of patches of which chance decided whether to weigh them

  Partial(std::int64_t pixels_, std::int64_t channels_, bool full_, bool sampled_ = false)
      : pixels(pixels_), channels(channels_), full(full_), sampled(sampled_) {
    clear();
  }

  void clear() {
    const double none = -std::numeric_limits<double>::infinity();
    const auto n = static_cast<std::size_t>(pixels);
    m.assign(n, none);
    s.assign(n, 0.0);
    y.assign(n * static_cast<std::size_t>(channels), 0.0);
    if (full) {
      e.assign(n, 0.0);
      top.assign(n, none);
      source.assign(n, -1);
    }
    if (sampled) {
      for (auto* one : {&ss, &chance}) one->assign(n, 0.0);
      for (auto* one : {&sy, &yy}) one->assign(n * static_cast<std::size_t>(channels), 0.0);
    }
  }
};

// Receives the finished partial posterior of query b; called from the calling thread, b ascending.
struct Sink {
  virtual ~Sink() = default;
  virtual void take(std::int64_t b, const Partial& partial) = 0;
};

// Where the arrays of all queries are to be written, as in Partial with the queries in front: (B, H, W) or
// (B, C, H, W). Null where Partial would be empty.
struct Out {
  double *m = nullptr, *s = nullptr, *y = nullptr, *e = nullptr, *top = nullptr;
  std::int64_t* source = nullptr;
  double *ss = nullptr, *sy = nullptr, *yy = nullptr, *chance = nullptr;
};

// A pixel's part of Partial, but for y.
struct Sums {
  double m, s;
  double e, top;  // these and the next only of a full posterior
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

// into := into + from, by merge_sums, pixel by pixel.
void merge(Partial& into, const Partial& from);

}  // namespace pyels
