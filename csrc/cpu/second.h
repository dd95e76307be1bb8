// The interface of the second pass's hot loop, as maps.h has the first one's.
#pragma once

#include "cpu/maps.h"

namespace pyels {

// An answer by whole windows: of a map over the pixels p, the sum of tap(z - p) * map(p) at every place z of their
// windows, times what the image has there less `centre`, is added to `out`.
struct Spread {
  float* out;          // (channels, H, W)[L]; null: not asked for
  const float* image;  // (channels, H, panel_width)[L], laid out as the panel
  std::int64_t channels;
  const float* centre;                  // (channels, H, W); null: 0
  const float *row_taps, *column_taps;  // weights of a window's places, the last first; null: all 1
  float* map;                           // a row of the map, between what windows reach over
  float* sums;                          // (1 + H, spread_row(...))[L]: zeros, and the sums along each row of the map
  float* band;            // (kernel_band + 1, spread_row(...))[L] sums of those over rows, and a running one
  const float** sums_at;  // (spread_map_rows(...)) where the sums of a row are, from that before the first
};
static constexpr std::int64_t spread_row(std::int64_t width, std::int64_t k_columns) {
  return width + 2 * (k_columns - 1) + 2 * kernel_band;
}
static constexpr std::int64_t spread_map_rows(std::int64_t height, std::int64_t k_rows) {
  return height + 2 * (k_rows - 1) + 2 * kernel_band;
}

// What is not asked for is null. W = 2^(log w - reference), lanes and units as in the first pass.
struct SecondTask : MapTask {
  const double* reference;  // (H, W) log of the sum of all weights; inf: no window. One entry with whole_image
  // What -reference is as it enters log-weights in float32, less what float32 makes of the scale; and, where that is many
  // digits long, what W is to be multiplied by for the rest of them. most_offset: of finite ones, whatever the sign.
  const float *offset, *rest;  // (H, W)
  float most_offset;
  float* weights;          // spread_row(...)[L] a row of W, between what windows reach over
  Spread fold;             // of W
  Spread derivative;       // of W A
  const float* mean;       // (R, H, W) in units of the answers
  const float* cotangent;  // (R, H, W) in one over these units
  const float* shift;      // (H, W) what A is to be less than by `mean`, where that is rounded
  float* variance;         // (R, H, W)[L]
  double* influence;       // [L]
  // note(notes, p, q, W) of L images where one is above `noted`.
  const float* noted;  // (H, W)
  void (*note)(void* notes, std::int64_t p, std::int64_t q, const float* weights);
  void* notes;
};

struct SecondKernel {
  void (*accumulate)(const SecondTask&);
};

const SecondKernel& second_in_use();

#if defined(__x86_64__)
namespace x86_64_v2 {
extern const SecondKernel second;
}
namespace x86_64_v3 {
extern const SecondKernel second;
}
namespace x86_64_v4 {
extern const SecondKernel second;
}
#else
namespace generic {
extern const SecondKernel second;
}
#endif

}  // namespace pyels
