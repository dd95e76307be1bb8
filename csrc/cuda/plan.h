// What the CUDA engine makes of a problem: which kernel, over which tiles, in how much memory. Nothing here needs CUDA,
// so it is compiled and tested everywhere; the device reads the same structs (device.cuh).
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/engine.h"
#include "sources.h"
#include "weighing.h"

namespace pyels::cuda {

constexpr int strip = 8;            // neighbouring pixels of a row that one thread weighs; rows of a band
constexpr int tile_side = 32;       // most pixels of a tile along an axis
constexpr int most_threads = 128;   // of a block: tile_side * tile_side / strip
constexpr int together = 4;         // rows' displacements that are worked off together
constexpr int most_queries = 16;    // of a launch
constexpr int most_segments = 512;  // parts of the bank, each worked off by blocks of its own
constexpr int y_channels = 4;       // whose sums a thread holds; more channels take more launches
constexpr std::int64_t most_entries = std::int64_t{1} << 18;       // distances of whole images, kept for a query
constexpr std::int64_t workspace_bytes = std::int64_t{128} << 20;  // about, for all partial posteriors together

PYELS_BOTH constexpr int ceil_div(int a, int b) { return (a + b - 1) / b; }

// Spans are cut into tiles of about the same size.
PYELS_BOTH constexpr int tiles_of(const Span& s) { return ceil_div(s.count, tile_side); }
PYELS_BOTH constexpr int tiles_of(const SourceAxis& axis) {
  int tiles = 0;
  for (int i = 0; i < axis.spans; ++i) tiles += tiles_of(axis.span[i]);
  return tiles;
}
PYELS_BOTH constexpr Span tile_of(const SourceAxis& axis, int tile) {
  int i = 0;
  for (; tile >= tiles_of(axis.span[i]); ++i) tile -= tiles_of(axis.span[i]);
  Span s = axis.span[i];
  const int tiles = tiles_of(s), begin = tile * s.count / tiles, end = (tile + 1) * s.count / tiles;
  s.first += begin, s.count = end - begin;
  return s;
}

// Strips of 8 pixels of a tile. At step e, 0 <= e < steps, that at pixel 8 i meets the 8 sources from
//     itself: its own place       around: 8 i + e       all: (8 i + e) % steps - 7, counted from the first source
// of which, where a strip meets `all`, some may lie before the first or behind the last: over all steps each pixel
// meets each source once. Strips between which nothing wraps have the same displacement, and share sums: a piece.
PYELS_BOTH constexpr int strips_of(const Span& s) { return ceil_div(s.count, strip); }
PYELS_BOTH constexpr int steps_of(const Span& s) {
  return s.meets == Meets::itself ? 1 : s.meets == Meets::around ? s.source_count : s.source_count + strip - 1;
}
PYELS_BOTH constexpr int pieces_of(const Span& s) {
  return s.meets == Meets::all ? (strip * (strips_of(s) - 1) + steps_of(s) - 1) / steps_of(s) + 1 : 1;
}
// Rows differ in that all bands of 8 meet the same sources, from e (around) or e - 7 (all), so that few rows of an
// image have to be in shared memory at a time: those of `together` steps.

// Of windows up to 7, for tiles of any size: at most two pieces.
constexpr int largest_fixed = 7;
PYELS_BOTH constexpr int x_pitch_of(int k) { return tile_side + k - 1; }
PYELS_BOTH constexpr int v_pitch_of(int k) { return (tile_side + 2 * (k - 1)) | 1; }

// Shared memory, in floats: the query's windows, the bank's, and window sums along columns.
struct Layout {
  std::int32_t x_rows, x_pitch, phi_rows, phi_pitch, v_rows, v_pitch;
  std::int64_t floats;
  std::int32_t threads;
};

// Inner products on tensor cores, of small windows of a uint8 bank, for the pixels that meet `all` or `around` along
// both axes, which are in the first spans. A warp has 16 pixels, against 8 sources of two rows at a time.
constexpr int product_threads = 256;
constexpr int product_pixels = product_threads / 32 * 16;  // of a block
constexpr int most_product_values = 80;                    // k k C; beyond, maps should be faster
constexpr double most_product_nats = 2000;                 // of a log-weight, whose error is in proportion
// Of rows of a tile of the image in shared memory: half the banks further on, since threads read from two rows at once.
constexpr int product_pitch = 48;
static_assert(tile_side + largest_fixed - 1 <= product_pitch && largest_fixed * largest_fixed <= most_product_values &&
              (largest_fixed + 2) * (largest_fixed + 2) > most_product_values);
// A thread's sums in double (struct Total).
PYELS_BOTH constexpr std::int64_t total_bytes(int channels) { return 8 * (5 + channels); }

enum class Method : std::int32_t { maps, direct, images };

struct Plan {
  Method method;
  SourceAxis rows, columns;
  Layout layout;                    // of Method::maps
  std::int64_t product_shared = 0;  // bytes of shared memory that products take; 0: not by products
  std::int32_t moves = 0;           // of Method::images: displacements of an image
  std::int64_t fields = 0;          // of a partial posterior: m, s, y (C) and, if it is full, e, nearest, source
  std::int64_t partial_size = 0;    // pixels * fields
  std::int32_t segments = 0;        // of a query, at most
  std::int32_t queries = 0;         // of a launch
  std::int64_t workspace = 0;       // bytes
};

// `shared_bytes`: what a block may have of shared memory.
Plan make_plan(const Problem& a, const CudaOptions& options, std::int64_t shared_bytes);

// Whether a query may be worked off by products: its log-weights then err by less than 2e-3, if its pixels are what
// noise of this level makes of pixels within [-1, 1].
bool by_products(const Problem& a, const Plan& plan, std::int64_t b);

// What of the bank is worked off together: the maps of all images, but distances of whole images as many as are kept.
std::int64_t images_at_once(const Problem& a, const Plan& plan);

// Parts of the images begin .. end - 1 of a query; depends on nothing else of the batch.
std::int32_t segments_of(const Problem& a, const Plan& plan, std::int64_t images);

// ---- The second pass

// Displacement i of an axis, source less pixel, the run of pixels that have a source there, and the places that their
// windows reach. Around an axis that wraps, each is met once, and what lies before the first pixel is the last.
struct Shift {
  std::int32_t by, first, count, reach_first, reach;
  bool around;
};
PYELS_BOTH constexpr int shifts_of(const SourceAxis& axis) {
  const Span& s = axis.span[0];
  return s.meets == Meets::itself ? 1 : s.meets == Meets::around ? s.count : s.count + s.source_count - 1;
}
PYELS_BOTH constexpr Shift shift_of(const SourceAxis& axis, int i) {
  const Span& s = axis.span[0];
  const int r = axis.window / 2, n = axis.length;
  int by = s.meets == Meets::itself ? 0 : i, first = 0, last = n;
  if (s.meets == Meets::all) {
    by += s.source_first - (s.first + s.count - 1);
    if (by != 0 || axis.spans == 1) {  // else those that meet themselves alone have theirs there as well
      first = s.first > s.source_first - by ? s.first : s.source_first - by;
      const int end = s.first + s.count, source_end = s.source_first + s.source_count - by;
      last = end < source_end ? end : source_end;
    }
  }
  if (s.meets == Meets::around) return {by, 0, n, 0, n, true};
  const int from = axis.wraps || first > r ? first - r : 0, to = axis.wraps || last + r < n ? last + r : n;
  return {by, first, last - first, from, to - from, false};
}

// Where the maps of a block begin, in floats, each in rows of one pitch.
struct SecondMaps {
  std::int64_t differences, columns, weights, offset, rest, along, along_sums, sums;
};
PYELS_BOTH constexpr SecondMaps second_maps(const SourceAxis& rows, std::int64_t pitch, bool derivative) {
  const std::int64_t map = ceil_div(rows.length, strip) * strip * pitch, tall = map + (rows.window - 1) * pitch;
  SecondMaps at{};
  at.columns = tall, at.weights = at.columns + map, at.offset = at.weights + map, at.rest = at.offset + map;
  at.along = at.rest + map, at.along_sums = at.along + (derivative ? map : 0);
  at.sums = at.along_sums + (derivative ? tall : 0);
  return at;
}

struct SecondPlan {
  SourceAxis rows, columns;
  std::int32_t pitch = 0;         // of the maps of a block
  std::int64_t floats = 0;        // of these and its sums
  bool shared = true;             // in shared memory, else in the workspace
  std::int64_t values = 0;        // sums of a pixel that are asked for
  std::int64_t prepared = 0;      // floats of what is known of a query
  std::int32_t segments = 0;      // of a query, at most
  std::int32_t queries = 0;       // of a launch
  std::int64_t segment_size = 0;  // bytes of the workspace
  std::int64_t workspace = 0;     // bytes
};
SecondPlan make_second_plan(const Problem& a, const Second& second, std::int64_t shared_bytes);

// Parts of the images of a query, each of which has all displacements of rows; as above.
std::int32_t segments_of(const Problem& a, const SecondPlan& plan, std::int64_t images);

// Images, or entries, of a segment are first_of(i) .. first_of(i + 1) - 1, counted from the first.
PYELS_BOTH constexpr std::int64_t first_of(std::int64_t segment, std::int64_t segments, std::int64_t count) {
  return segment * count / segments;
}

}  // namespace pyels::cuda
