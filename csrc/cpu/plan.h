// How both passes of the CPU engine go through a bank: source sets as displacements, fixed segments of the bank for
// threads to share, and images spread over lanes block by block.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/maps.h"
#include "sources.h"
#include "threads.h"
#include "weighing.h"

namespace pyels {

// The displacements d along an axis, ascending, and the pixels p that meet p + d there.
std::vector<Axis> displacements(const SourceAxis& axis);

struct Plan {
  const Problem& a;
  const Kernel& kernel;
  SourceAxis row_axis, column_axis;
  // Displacements of which the products together are the source sets: of rows and columns, side by side in both.
  std::vector<std::vector<Axis>> rows, columns;
  std::int64_t pixels, answer_channels;
  // Rows of the panel are widened by what windows reach over, rows of a query also by what displacements do.
  std::int64_t panel_margin, panel_width, x_margin, x_width;
  std::int64_t row_terms = 0, column_terms = 0;  // of a pixel's sum
  // So many of the rows' displacements, with all of the columns', are one call of the kernel.
  struct Call {
    const Axis *rows, *columns;
    std::int64_t n_rows, n_columns, terms;
  };
  std::vector<Call> calls;
  // Segments are what threads share out. Their number must not depend on the number of threads. Every segment of a
  // group of queries has its partial result in memory; these take about `partials_bytes` whatever the image size.
  static constexpr std::int64_t partials_bytes = std::int64_t{64} << 20;
  std::int64_t partial_bytes, max_segments;

  static constexpr std::int64_t max_terms = max_float_terms;

  // A pixel's partial result takes `pixel_bytes`. regions: see CpuOptions.
  Plan(const Problem& problem, unsigned regions, std::int64_t pixel_bytes);

  bool wraps() const { return row_axis.wraps; }
  bool uneven() const { return a.taps || a.precision; }
  std::int64_t terms() const { return row_terms * column_terms; }
  bool whole_image() const { return a.window == Window::image; }
  std::int64_t images(std::int64_t b) const { return a.end[b] - a.begin[b]; }
  std::int64_t blocks(std::int64_t b) const { return (images(b) + kernel.lanes - 1) / kernel.lanes; }
  // The image in a lane of a block of query b.
  std::int64_t image(std::int64_t b, std::int64_t block, std::int64_t lane) const {
    const std::int64_t n = a.begin[b] + block * kernel.lanes + lane;
    return a.order ? a.order[n] : n;
  }

  // None so short that its merging takes longer than its sums.
  std::int64_t segments(std::int64_t b) const {
    return std::max<std::int64_t>(1, std::min({blocks(b), max_segments, 4 * blocks(b) * terms() / max_terms}));
  }
  std::int64_t queries_in_group() const {
    return std::clamp<std::int64_t>(partials_bytes / (max_segments * partial_bytes), 1, 64);
  }
};

// The weights of a window's places along one axis, where the window is no larger than what holds all of the axis wherever
// it stands; ones where there are none.
std::vector<double> taps_of(const Problem& a, const double* taps, std::int64_t window);

// A query and a block of images, as kernels take them.
class Lanes {
 public:
  explicit Lanes(const Plan& plan);

  // What the task is told of the query, which is loaded.
  void load_query(std::int64_t b, MapTask& task);
  // Lanes without an image repeat the last; what is found in them is to be left out.
  void load_block(std::int64_t b, std::int64_t block);
  // log2 of what the weights of pixel p's windows are too large by, as their distances are less by MapTask::noise.
  double noise_of_window(std::int64_t p) const;

  const double unit;         // of the panel: uint8 v is v - 127.5, exactly, in units of 1 / 127.5
  const double answer_unit;  // of what answers, likewise

 private:
  // The root mean square of the noise in a value of query b, so rounded that squares of it and their sums are exact; 0
  // where distances are to be what they are.
  float expected_noise(std::int64_t b, std::int64_t window_values, float largest) const;

  template <class Pixel>
  void spread(const Pixel* pixels, std::int64_t channels, std::int64_t b, std::int64_t block,
              void (*spread_row)(const Pixel* const*, std::int64_t, float*), float* panel) const;

  const Plan& plan_;
  const Problem& a_;
  double place_noise_ = 0.0;  // of a window's place, as log2 of a weight
  std::vector<double> row_taps_, column_taps_;
  std::vector<float> float_row_taps_, float_column_taps_;
  Aligned<float> x_, precision_, panel_, answers_, scratch_;
  Aligned<const float*> map_rows_;
};

// A segment of query b, call by call: work.load(block), work.add(call, at) for all calls, and, before long sums could
// round and before a last block with fewer images than lanes, work.flush(first block, lanes that have an image).
template <class Work, class Stop>
void work_off(const Plan& plan, std::int64_t b, std::int64_t segment, Work& work, Stop stop) {
  const std::int64_t blocks = plan.blocks(b), segments = plan.segments(b), lanes = plan.kernel.lanes;
  const std::int64_t first = segment * blocks / segments, last = (segment + 1) * blocks / segments;
  std::int64_t terms = 0, first_block = first;
  for (std::int64_t block = first; block < last; ++block) {
    work.load(block);
    for (std::size_t i = 0; i < plan.calls.size(); ++i) {
      if (stop()) return;
      work.add(plan.calls[i], static_cast<std::int32_t>((block - first_block) * plan.pixels));
      terms += plan.calls[i].terms;
      const bool block_ends = i + 1 == plan.calls.size();
      const bool numbers_end = (block + 2 - first_block) * plan.pixels > std::numeric_limits<std::int32_t>::max();
      // A last block with fewer images than lanes is by itself.
      const bool next_is_last = block_ends && block + 2 >= last;
      if (terms < Plan::max_terms && !next_is_last && !numbers_end) continue;
      work.flush(first_block, std::min(lanes, plan.images(b) - block * lanes));
      terms = 0;
      first_block = block;  // sources are numbered from here, whether this block is done or not
    }
  }
}

inline void tell(MapTask& task, const Plan::Call& call) {
  task.rows = call.rows, task.n_rows = static_cast<std::int32_t>(call.n_rows);
  task.columns = call.columns, task.n_columns = static_cast<std::int32_t>(call.n_columns);
}

// Partial results of all segments, by threads, each from a copy of `empty` by make_worker().run(b, segment, part, stop);
// and then take(b, its parts), in the order of the bank, whichever thread did what.
template <class Part, class MakeWorker, class Take>
void in_segments(const Plan& plan, int threads, const Part& empty, MakeWorker make_worker, Take take_parts) {
  const std::int64_t group = plan.queries_in_group();
  struct Unit {
    std::int64_t query, segment;
  };
  for (std::int64_t b0 = 0; b0 < plan.a.queries; b0 += group) {
    std::vector<Unit> units;
    std::vector<Part> parts;
    for (std::int64_t b = b0; b < std::min(plan.a.queries, b0 + group); ++b)
      for (std::int64_t segment = 0; segment < plan.segments(b); ++segment)
        units.push_back({b, segment}), parts.push_back(empty);

    in_threads(threads, static_cast<std::int64_t>(units.size()), plan.a.interrupted, [&](auto take) {
      auto worker = make_worker();
      take([&](std::int64_t i, auto stop) {
        const Unit unit = units[static_cast<std::size_t>(i)];
        worker.run(unit.query, unit.segment, parts[static_cast<std::size_t>(i)], stop);
      });
    });

    for (std::size_t i = 0; i < units.size();) {
      const std::int64_t b = units[i].query;
      const auto count = static_cast<std::size_t>(plan.segments(b));
      take_parts(b, std::span<Part>(parts).subspan(i, count));
      i += count;
    }
  }
}

}  // namespace pyels
