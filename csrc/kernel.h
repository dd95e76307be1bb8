// The interface of the hot loop, compiled once per instruction set from kernel.cpp and chosen at run time by cpu.cpp.
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

// One query against `lanes` bank images at all displacements. Lanes are images: every array that ends in [L] holds one
// float for each of them, so no step ever shuffles. The state is carried from call to call. Logarithms are to base 2.
struct KernelTask {
  std::int64_t channels, height, width;
  bool wraps;

  // Rows are widened so that places of a map lie side by side in memory: by what wraps around, or by zeros.
  const float* x;      // (C, H, x_width), column 0 at x_margin
  const float* panel;  // (C, H, panel_width)[L] bank pixels in units that make them exact, column 0 at panel_margin
  std::int64_t x_width, x_margin, panel_width, panel_margin;
  double alpha;  // signal level, times the value of one panel unit

  double scale;              // log w = -scale * squared distance; log2(e) / (2 sigma^2)
  float least_scale;         // the same, less what a float32 distance may be too large by
  float skip;                // weights below 2^-skip of the running maximum are taken as zero
  float wide_above;          // squared distances beyond this are summed over rows in double,
  float exact_above;         // beyond this found again in double where the weight stands out,
  float always_exact_above;  // and beyond this wherever the weight may matter

  bool whole_image;                // one weight for all outputs of a displacement, from the sum over the whole map
  std::int32_t k_rows, k_columns;  // odd; they differ only where a window reaches beyond the image
  const Axis *rows, *columns;
  std::int32_t n_rows, n_columns;  // displacements along each axis; all combinations are evaluated

  bool full;        // also keep entropy and heaviest source
  std::int32_t at;  // number of this panel's first source pixel, for `near_at` and `far_at`

  // State: weights refer to 2^reference. With whole_image, all but y have a single entry instead of (H, W).
  double* reference;      // (H, W)
  float* offset;          // (H, W) -reference, as it enters log-weights in float32
  float* s;               // (H, W)[L]
  float* y;               // (C, H, W)[L]
  float* e;               // (H, W)[L] sum of w * (log w - reference)
  // The least squared distance, and its source pixel counted from the panel where `at` was 0: of those that were good
  // enough in float32, and of the others.
  float* near;            // (H, W)[L]
  std::int32_t* near_at;  // (H, W)[L]
  double* far;            // (H, W)[L]
  std::int32_t* far_at;   // (H, W)[L]

  float* scratch;          // kernel_scratch(...)[L], zero at first
  const float** map_rows;  // (kernel_map_rows(...)), each of which may be read
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

// Windows of the bank against windows of the query, one by one: for lists of windows (lists.cpp). A panel holds blocks
// of L windows, (blocks, dims)[L], pixel by pixel in the same units as x.
static constexpr int list_blocks = 4;  // the most in a panel

// A query pixel that looks into a list, and what has been summed for it. Weights are relative to 2^m, centres in units
// of the panel. `sums` holds s = sum w, ss = sum w^2, sum d and sum d^2 of d = log2 w - expected, then for every channel
// y = sum w c, sy = sum w^2 c, yy = sum w^2 c^2, and for the full posterior e = sum w (log2 w - m).
struct ListQuery {
  const float* x;            // (dims)
  std::int32_t first, last;  // members of the panel to look at, counted from 0: first <= member < last
  float scale;               // log2 w = -scale * squared distance
  float expected;
  float* m;                  // -inf when empty
  float* sums;               // (list_sums(channels, full))
  float* top;                // largest log2 w
  std::int32_t* top_member;  // its place in the list
};
static constexpr std::int64_t list_sums(std::int64_t channels, bool full) { return 4 + 3 * channels + (full ? 1 : 0); }
static constexpr std::int64_t list_channels = 16;  // the most

struct ListTask {
  const float* panel;
  std::int64_t dims, channels;
  const std::int64_t* centres;  // (C) where among the dims the centre is
  std::int64_t first_member;    // of the panel, in the list
  bool full;
  const ListQuery* queries;
  std::int64_t n_queries;
};

struct Kernel {
  const char* isa;
  int lanes;
  void (*accumulate)(const KernelTask&);
  // Spreads a row of `width` pixels of L images, `images`, over the lanes. uint8 v becomes v - 127.5.
  void (*spread_uint8)(const std::uint8_t* const* images, std::int64_t width, float* panel);
  void (*spread_float)(const float* const* images, std::int64_t width, float* panel);
  // Sums the first `live` lanes of each of n vectors, in double.
  void (*sum_lanes)(const float* v, std::int64_t n, int live, double* sums);
  void (*weigh_list)(const ListTask&);
  // Squared distances of x, (dims), to the windows of one block of a panel: L of them.
  void (*list_distances)(const float* panel, const float* x, std::int64_t dims, float* distances);
};

const Kernel& kernel_in_use();

#if defined(PYELS_ISA_NAME)
namespace PYELS_ISA_NAME {  // from lists_kernel.cpp into kernel.cpp
void weigh_list(const ListTask&);
void list_distances(const float* panel, const float* x, std::int64_t dims, float* distances);
}
#endif

#if defined(__x86_64__)
namespace x86_64_v2 { extern const Kernel kernel; }
namespace x86_64_v3 { extern const Kernel kernel; }
namespace x86_64_v4 { extern const Kernel kernel; }
#else
namespace generic { extern const Kernel kernel; }
#endif

}  // namespace pyels
