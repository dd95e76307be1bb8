// How exactly a distance has to be known before it becomes a weight: the same for every float32 engine.
#pragma once

#include <algorithm>
#include <cmath>

#include "float_sums.h"
#include "pyels.h"

namespace pyels {

constexpr double ln2 = 0.693147180559945309417232121458;

// Float32 differences will do where the largest pixel of a query is up to so many sigma.
constexpr double float32_reach = 1000.0;

struct Weighing {
  double scale;              // log2 w = -scale * squared distance; log2(e) / (2 sigma^2)
  float least_scale;         // the same, less what a float32 distance may be too large by
  float skip;                // weights below 2^-skip of the running maximum are taken as zero
  float slack;               // what else a float32 distance may be too large by, as log2 of a weight
  float wide_above;          // squared distances beyond this are summed in double,
  float exact_above;         // beyond this found again in double where the weight stands out,
  float always_exact_above;  // and beyond this wherever the weight may matter
};

// For query b, whose pixels, up to `largest`, meet up to `sources` patches with windows of `window_values` values, of
// which none weighs more than `heaviest`; for distances that are less by up to `less`.
inline Weighing weighing(const Problem& a, std::int64_t b, double sources, std::int64_t window_values,
                         double largest = 0.0, double heaviest = 1.0, double less = 0.0) {
  Weighing w{};
  w.scale = 0.5 / (a.sigma[b] * a.sigma[b]) / ln2;
  const double nats = w.scale * ln2;
  // The rounding errors of a sum along rows, then of rows.
  w.least_scale =
      static_cast<float>(w.scale * (1 - 5e-7 - 3e-9 * static_cast<double>(a.height + a.width + a.channels)));
  // float32 distances typically err by 5e-8 of log w (rounding of sums; 2e-8 with those over rows in double) and by
  // 8e-8 * sqrt(scale * log w) (rounding of pixels); where they are random, either is kept below 3e-5. A query like
  // any other has about half as many nats as its window has values, of which `less` takes away nearly all. Far beyond
  // that no weight is left to float32, whether it stands out or not: many equal ones would err together.
  const double pixel_rounding = 1.4e5 / (nats * nats * heaviest) - less;
  const double sum_rounding = a.taps || a.precision ? 0.5 : 1.0;  // products with weights round as well
  w.wide_above = static_cast<float>(std::min(600.0 * sum_rounding / nats, pixel_rounding));
  w.exact_above = static_cast<float>(std::min(1200.0 * sum_rounding / nats, pixel_rounding));
  if (a.taps || a.precision) w.least_scale *= 0.999998f;
  w.slack = static_cast<float>(4 * (w.scale - static_cast<double>(w.least_scale)) * less);  // both parts round
  const double far = std::min(1e5, 300 * std::sqrt(static_cast<double>(window_values)));
  w.always_exact_above = static_cast<float>(far / nats);
  // All weights left out together are less than 1e-8 of the sum.
  w.skip = static_cast<float>(std::min(80.0, std::log(sources) + std::log(1e8)) / ln2);
  if (largest * std::sqrt(heaviest) > float32_reach * a.sigma[b]) {
    // Each of n differences errs by up to 2.4e-7 of the pixel, and a distance D, with e for all of them, by up to
    // 2 sqrt(D) e + e^2 <= 1e-3 D + 1001 e^2: so much is looked at, and whatever may matter is found again in double.
    const double error = 2.4e-7 * largest;
    w.slack = static_cast<float>(w.scale * 1001 * heaviest * static_cast<double>(window_values) * error * error);
    w.least_scale *= 0.998f;
    w.wide_above = w.exact_above = w.always_exact_above = -1.0f;
  }
  return w;
}

}  // namespace pyels
