// Merging of partial posteriors.
#include <algorithm>
#include <cmath>

#include "pyels.h"

namespace pyels {

void merge(Partial& into, const Partial& from) {
  for (std::int64_t p = 0; p < into.pixels; ++p) {
    if (from.s[p] == 0.0) continue;  // empty: m is -inf, and -inf - -inf below would be NaN
    const double m = std::max(into.m[p], from.m[p]);
    // exp(-inf) = 0 when into is empty; most often both are 1.
    const double a = into.m[p] == m ? 1.0 : std::exp(into.m[p] - m), b = from.m[p] == m ? 1.0 : std::exp(from.m[p] - m);
    if (into.full) {
      // e refers to m as well: moving m to m' turns (log w - m) into (log w - m) + (m - m').
      const double shift_a = into.s[p] == 0.0 ? 0.0 : into.m[p] - m, shift_b = from.m[p] - m;
      into.e[p] = a * (into.e[p] + into.s[p] * shift_a) + b * (from.e[p] + from.s[p] * shift_b);
      const bool lower = from.source[p] / from.pixels < into.source[p] / into.pixels;  // image
      if (from.top[p] > into.top[p] || (from.top[p] == into.top[p] && lower)) {
        into.top[p] = from.top[p];
        into.source[p] = from.source[p];
      }
    }
    if (into.sampled) {
      into.chance[p] += from.sampled ? from.chance[p] : 0.0;
      into.ss[p] = a * a * into.ss[p] + (from.sampled ? b * b * from.ss[p] : 0.0);
      for (std::int64_t i = p; i < into.channels * into.pixels; i += into.pixels) {
        into.sy[i] = a * a * into.sy[i] + (from.sampled ? b * b * from.sy[i] : 0.0);
        into.yy[i] = a * a * into.yy[i] + (from.sampled ? b * b * from.yy[i] : 0.0);
      }
    }
    into.s[p] = a * into.s[p] + b * from.s[p];
    for (std::int64_t c = 0; c < into.channels; ++c) {
      double& y = into.y[c * into.pixels + p];
      y = a * y + b * from.y[c * into.pixels + p];
    }
    into.m[p] = m;
  }
}

}  // namespace pyels
