// Merging of partial posteriors.
#include "partial.h"

namespace pyels {

void merge(Partial& into, const Partial& from) {
  const auto sums = [](const Partial& of, std::int64_t p) {
    return of.full ? Sums{of.m[p], of.s[p], of.e[p], of.top[p], of.source[p]} : Sums{of.m[p], of.s[p], 0.0, 0.0, 0};
  };
  for (std::int64_t p = 0; p < into.pixels; ++p) {
    if (from.s[p] == 0.0) continue;  // empty: m is -inf, and -inf - -inf would be NaN
    Sums merged = sums(into, p);
    const auto [a, b] = merge_sums(merged, sums(from, p), into.full, into.pixels);
    into.m[p] = merged.m, into.s[p] = merged.s;
    if (into.full) into.e[p] = merged.e, into.top[p] = merged.top, into.source[p] = merged.source;
    if (into.sampled) {
      into.chance[p] += from.sampled ? from.chance[p] : 0.0;
      into.ss[p] = a * a * into.ss[p] + (from.sampled ? b * b * from.ss[p] : 0.0);
      for (std::int64_t i = p; i < into.channels * into.pixels; i += into.pixels) {
        into.sy[i] = a * a * into.sy[i] + (from.sampled ? b * b * from.sy[i] : 0.0);
        into.yy[i] = a * a * into.yy[i] + (from.sampled ? b * b * from.yy[i] : 0.0);
      }
    }
    for (std::int64_t c = 0; c < into.channels; ++c) {
      double& y = into.y[c * into.pixels + p];
      y = a * y + b * from.y[c * into.pixels + p];
    }
  }
}

}  // namespace pyels
