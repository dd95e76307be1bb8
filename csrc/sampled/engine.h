// The approximate engine: the posterior by importance sampling of windows that an index sorts into lists.
#pragma once

#include <span>

#include "cpu/engine.h"
#include "pyels.h"

namespace pyels {

// The windows of a region's pixels (sources.h), of some images of the bank, in lists of similar ones, each with a short
// description that tells about how far a query is from it: its coordinates along the principal directions of all windows,
// the leading ones in 8 bits and the others, which vary less, in 2.
//
// Windows that overhang a side of the image, by 1 .. r = k / 2 rows or columns, are clipped. The lists have those that
// overhang by 1; those that overhang by more are parts of them, and have some of their directions.
struct Lists {
  std::int64_t region = 0;  // not a corner
  std::int64_t count = 0;
  // Members are numbered through all lists; a list begins at a multiple of list_block, and is filled up behind `end`.
  const std::int64_t* begin = nullptr;   // (lists) first member of each list
  const std::int64_t* end = nullptr;     // (lists) behind its last
  const std::int32_t* window = nullptr;  // (members) image * H * W + row * W + column of its centre
  float* mean = nullptr;                 // (lists, directions) of the coordinates of the windows
  float* spread = nullptr;               // (overhangs, lists) mean squared distance of the windows from that point
  // Descriptions. A window less `origin` has coordinates along `directions` of about `lead` * step, all steps alike, and
  // then of about (code - 1.5) * step, with a code of 2 bits, four in a byte of `tail`, the first in the lowest bits.
  std::int64_t directions_count = 0;  // `leading`, and a multiple of 4
  const std::int32_t* usable =
      nullptr;                        // (overhangs) how many of them are on the image; inside there is one "overhang"
  const float* origin = nullptr;      // (C, rows, columns), those of a window
  const float* directions = nullptr;  // (directions, C, rows, columns), orthonormal; rows of zeros fill up
  const float* step = nullptr;        // (directions)
  std::int8_t* lead = nullptr;        // (members / list_block, leading / 2, list_block, 2)
  std::uint8_t* tail = nullptr;       // (members / list_block, (directions - leading) / 4, list_block)
};
constexpr std::int64_t list_block = 32, leading = 16;

// Describes every member: fills in mean, spread, lead and tail. Of `problem`, the bank and the window size count.
void describe_lists(const Problem& problem, const CpuOptions& options, const Lists& lists);

// Standard errors to either side that make an interval of 95%. 1.96 would do for a normal distribution; sums of few
// heavy weights have longer tails, and a search that ends when its error seems small ends too early more often than too
// late.
constexpr double interval = 2.5;

struct SampledOptions {
  int threads = 1;
  double tolerance = 0.01;  // looks on until the error of every pixel's mean, `interval` standard errors, is below
  std::uint32_t dice = 0;   // which of independent draws
};

// The lists are of the images order[begin[b]] .. order[end[b] - 1] for every query b, each of another region. Exact, by
// cpu_engine, where there are none (the corners), and for all of a query's region where that costs less.
void sampled_engine(const Problem& problem, const SampledOptions& options, std::span<const Lists> lists, Sink& sink);

}  // namespace pyels
