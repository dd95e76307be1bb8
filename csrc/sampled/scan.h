// The interface of what reads the index and the windows, compiled once per instruction set from scan.cpp and chosen at
// run time by cpu/dispatch.cpp. No std templates here, as in cpu/maps.h.
#pragma once

#include <cstdint>

namespace pyels {

// A query against the descriptions of blocks of windows (Lists in engine.h): about
// log2 w = -lead_scale * |z - lead|^2 - tail_scale * min(255, sum of what the tables have for every 4 bits of the tail).
struct ScanQuery {
  const std::int16_t* z;  // (leading)
  float lead_scale, tail_scale;
  const std::uint8_t* tables;  // (2 tail_bytes, 16)
  std::int64_t tail_bytes;     // of every window's, that the query is compared with
  float rate;                  // log2 of how often a window of log2 w = 0 is to be picked
  float least;                 // log2 of how often every window is at least
  std::uint32_t seed;
  // The sum of these w, and of their squares, relative to 2^top, where top is the largest so far.
  float top;
  double sum, squares;
};
struct Pick {
  std::int32_t member;  // of the blocks
  float probability;
};
struct ScanTask {
  const std::int8_t* lead;   // (blocks, leading / 2, list_block, 2)
  const std::uint8_t* tail;  // (blocks, tail_block / list_block, list_block)
  std::int64_t tail_block;   // bytes
  std::int64_t members;      // of the blocks, those behind are not there
  std::uint32_t first;       // number of the first member, for the dice
};

// Two windows in memory: of x, and of a bank. Rows are read in steps of up to 16 pixels.
struct WindowPair {
  std::int64_t channels, rows, columns, x_row, x_channel, row, channel;
};

struct Scan {
  int lanes;
  void (*scan_sum)(const ScanTask&, ScanQuery&);
  // Returns the number of picks, up to `members` of them.
  std::int64_t (*scan_pick)(const ScanTask&, const ScanQuery&, Pick* picks);
  // z = x, (dims), times a matrix (dims, n); n is a multiple of 4.
  void (*project)(const float* x, std::int64_t dims, const float* matrix, std::int64_t n, float* z);
  // Squared distances of x, (dims), to L points, (dims)[L].
  void (*point_distances)(const float* panel, const float* x, std::int64_t dims, float* distances);
  // The squared distance of two windows.
  float (*distance_uint8)(const WindowPair&, const float* x, const std::uint8_t* window);
  float (*distance_float)(const WindowPair&, const float* x, const float* window);
};

const Scan& scan_in_use();

#if defined(__x86_64__)
namespace x86_64_v2 {
extern const Scan scan;
}
namespace x86_64_v3 {
extern const Scan scan;
}
namespace x86_64_v4 {
extern const Scan scan;
}
#else
namespace generic {
extern const Scan scan;
}
#endif

}  // namespace pyels
