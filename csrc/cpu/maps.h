// The interface of the hot loops, compiled once per instruction set from maps.cpp (the first pass) and second.cpp, and
// chosen at run time by dispatch.cpp.
// No std templates here: inline functions of units built for different instruction sets would be merged by the linker.
#pragma once

#include <cstdint>

namespace pyels {

// One axis of one displacement d = q - p of query pixels p against source pixels q, for windows of k = 2 r + 1 places.
// The map of squared differences has outputs + 2 r places; place i compares query coordinate query + i with source
// coordinate source + i. Output j is the window of places j .. j + 2 r: pixels p = query + r + j, q = source + r + j.
// Coordinates beyond the image wrap around, or lie outside a clipped window and count as zero (KernelTask::wraps).
struct Axis {
  std::int32_t outputs, query, source;
};

// A query has half a nat for each value of a window: of so few not what float32 sums would have to be spared.
static constexpr std::int64_t few_values = 900;

// One query against `lanes` bank images at all displacements. Lanes are images: every array that ends in [L] holds one
// float for each of them, so no step ever shuffles. Logarithms are to base 2.
struct MapTask {
  std::int64_t channels, height, width;
  bool wraps;

  // Rows are widened so that places of a map lie side by side in memory: by what wraps around, or by zeros.
  const float* x;      // (C, H, x_width), column 0 at x_margin
  const float* panel;  // (C, H, panel_width)[L] bank pixels in units that make them exact, column 0 at panel_margin
  std::int64_t x_width, x_margin, panel_width, panel_margin;
  double alpha;          // signal level, times the value of one panel unit
  const float* answers;  // (R, H, panel_width)[L] pixels of what answers, often the panel
  std::int64_t answer_channels;
  // Where the places of a window do not weigh alike, else null: factors at each place of the query, laid out as x, and
  // of squares, weights of a window's rows and columns.
  const float *precision, *row_taps, *column_taps;
  const double *exact_row_taps, *exact_column_taps;

  double scale;              // log w = -scale * squared distance; log2(e) / (2 sigma^2)
  float least_scale;         // the same, less what a float32 distance may be too large by
  float skip;                // weights below 2^-skip of the running maximum are taken as zero
  float slack;               // what else a float32 distance may be too large by, as log2 of a weight
  float noise;               // D is less by this at every place, about what noise makes it; 0 below few_values a window
  float wide_above;          // squared distances, so much less, beyond this either way are summed over rows in double,
  float exact_above;         // beyond this found again in double where the weight stands out,
  float always_exact_above;  // and beyond this wherever the weight may matter

  bool whole_image;                // one weight for all outputs of a displacement, from the sum over the whole map
  std::int32_t k_rows, k_columns;  // odd; they differ only where a window reaches beyond the image
  const Axis *rows, *columns;
  std::int32_t n_rows, n_columns;  // displacements along each axis; all combinations are evaluated

  std::int32_t at;  // number of this panel's first source pixel

  float* scratch;          // kernel_scratch(...)[L], zero at first
  const float** map_rows;  // (kernel_map_rows(...)), each of which may be read
};

// The first pass. The state is carried from call to call.
struct KernelTask : MapTask {
  bool full;  // also keep entropy and heaviest source
  bool
      all_exact;  // distances that float32 may be too coarse for are found again in double whether they stand out or not

  // State: weights refer to 2^reference. With whole_image, all but y have a single entry instead of (H, W).
  double* reference;  // (H, W)
  float* offset;      // (H, W) -reference, as it enters log-weights in float32
  float* s;           // (H, W)[L]
  float* y;           // (R, H, W)[L]; null: not wanted, or in double
  double* wide_s;     // (H, W)[L] both in double, so that the mean is that of these weights to the last digit; or null
  double* wide_y;     // (R, H, W)[L]
  float* e;           // (H, W)[L] sum of w * (log w - reference)
  // The least squared distance, and its source pixel counted from the panel where `at` was 0: of those that were good
  // enough in float32, and of the others.
  float* near;            // (H, W)[L]
  std::int32_t* near_at;  // (H, W)[L]
  double* far;            // (H, W)[L]
  std::int32_t* far_at;   // (H, W)[L]
};

// Windows are summed in bands of so many neighbours, of which those at an end may lie outside.
static constexpr std::int32_t kernel_band = 8;
static constexpr std::int64_t kernel_row(std::int64_t width) { return width + kernel_band; }
static constexpr std::int64_t kernel_map_rows(std::int64_t height, std::int64_t k_rows) {
  return height + k_rows - 1 + 2 * kernel_band;
}
// A band of distances, a row of zeros, the sums of the last rows of the map or of all, and a row of the map.
static constexpr std::int64_t kernel_scratch(std::int64_t height, std::int64_t width, std::int64_t k_rows,
                                             std::int64_t k_columns) {
  const std::int64_t last = k_rows + kernel_band - 1, kept = height > last ? height : last;
  return (kernel_band + 1 + kept) * kernel_row(width) + width + k_columns - 1 + 3 * kernel_band;
}

struct Kernel {
  const char* isa;
  int lanes;
  void (*accumulate)(const KernelTask&);
  // Spreads a row of `width` pixels of L images, `images`, over the lanes. uint8 v becomes v - 127.5.
  void (*spread_uint8)(const std::uint8_t* const* images, std::int64_t width, float* panel);
  void (*spread_float)(const float* const* images, std::int64_t width, float* panel);
  // Sums the first `live` lanes of each of n vectors, in double.
  void (*sum_lanes)(const float* v, std::int64_t n, int live, double* sums);
};

const Kernel& kernel_in_use();

#if defined(__x86_64__)
namespace x86_64_v2 {
extern const Kernel kernel;
}
namespace x86_64_v3 {
extern const Kernel kernel;
}
namespace x86_64_v4 {
extern const Kernel kernel;
}
#else
namespace generic {
extern const Kernel kernel;
}
#endif

}  // namespace pyels
