// The interface of the hot loop, compiled once per instruction set from kernel.cpp and chosen at run time by cpu.cpp.
// No std templates here: inline functions of units built for different instruction sets would be merged by the linker.
#pragma once

#include <cstdint>

namespace pyels {

// One axis of one displacement d = q - p of query pixels p against source pixels q. A map of squared differences has
// `map_size` places along this axis; place i compares query coordinate map_query[i] with source coordinate
// map_source[i]; places outside [map_begin, map_end) lie outside a clipped window and count as zero. The window sum
// over places i .. i + k - 1 is the distance of output i, whose pixels are p[i] and q[i].
struct Axis {
  std::int32_t map_size, map_begin, map_end, outputs;
  const std::int32_t *map_query, *map_source;  // (map_size)
  const std::int32_t *p, *q;                   // (outputs)
};

// One query against `lanes` bank images at all displacements. Lanes are images: every array that ends in [L] holds one
// float for each of them, so no step ever shuffles. The state is carried from call to call.
struct KernelTask {
  std::int64_t channels, height, width;
  const float* x;      // (C, H, W)
  double alpha;        // signal level, times the value of one panel unit
  double scale;        // log w = bias - scale * squared distance; 1 / (2 sigma^2)
  float least_scale;   // the same, less what a float32 distance may be too large by
  float skip;          // weights below exp(-skip) of the running maximum are taken as zero
  float exact_above;         // squared distances beyond this are found again in double where the weight stands out,
  float always_exact_above;  // and beyond this wherever the weight may matter
  const float* panel;  // (C, H, W)[L] bank pixels, in units that make them exact
  const float* bias;   // [L] 0, or -inf for a lane without an image

  bool whole_image;    // one weight for all outputs of a displacement, from the sum over the whole map
  std::int32_t k_rows, k_columns;
  const Axis *rows, *columns;
  std::int32_t n_rows, n_columns;  // displacements along each axis; all combinations are evaluated

  bool full;           // also keep entropy and heaviest source
  std::int32_t at;     // number of this panel's first source pixel, for `best_at`

  // State: weights refer to exp(reference). With whole_image, all but y have a single entry instead of (H, W).
  double* reference;       // (H, W)
  float* s;                // (H, W)[L]
  float* y;                // (C, H, W)[L]
  float* e;                // (H, W)[L] sum of w * (log w - reference)
  double* best;            // (H, W)[L] largest log w
  std::int32_t* best_at;   // (H, W)[L] its source pixel, counted from the panel where `at` was 0

  float* scratch;      // kernel_scratch(...)[L]
};

// Longest axis of a map: the image, and a window's overhang (less than the image) on both sides.
constexpr std::int64_t map_limit(std::int64_t size) { return 3 * size; }
constexpr std::int64_t kernel_scratch(std::int64_t height, std::int64_t width) {
  return map_limit(width) + map_limit(height) * width + height * width;
}

struct Kernel {
  const char* isa;
  int lanes;
  void (*accumulate)(const KernelTask&);
};

#if defined(__x86_64__)
namespace x86_64_v2 { extern const Kernel kernel; }
namespace x86_64_v3 { extern const Kernel kernel; }
namespace x86_64_v4 { extern const Kernel kernel; }
#else
namespace generic { extern const Kernel kernel; }
#endif

}  // namespace pyels
