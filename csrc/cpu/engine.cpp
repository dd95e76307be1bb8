// The exact CPU engine: cuts the bank into fixed segments, lets threads work through them,
// and merges their partial posteriors in the order of the bank. Neither the segments nor the order of any sum depends
// on the number of threads or on the other queries, so the result does not either.
#include "cpu/engine.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/maps.h"
#include "sources.h"
#include "threads.h"
#include "weighing.h"

namespace pyels {
namespace {

// ---- Source sets as displacements --------------------------------------------------------------------------------

// The displacements d along an axis, ascending, and the pixels p that meet p + d there.
std::vector<Axis> displacements(const SourceAxis& axis) {
  const std::int32_t n = axis.length, r = axis.window / 2;
  std::vector<Axis> all;
  for (std::int32_t d = axis.wraps ? 0 : 1 - n; d < n; ++d) {
    std::vector<std::pair<std::int32_t, std::int32_t>> stretches;  // of pixels, first and behind the last
    for (std::int32_t i = 0; i < axis.spans; ++i) {
      const Span& s = axis.span[i];
      if (s.meets == Meets::itself && d != 0) continue;
      std::int32_t first = s.source_first - d, last = first + s.source_count;  // around the image, where it wraps
      if (!axis.wraps) first = std::max(first, s.first), last = std::min(last, s.first + s.count);
      if (first < last) stretches.emplace_back(first, last);
    }
    std::sort(stretches.begin(), stretches.end());
    std::int32_t end = -n - 1;
    for (const auto& [first, last] : stretches) {  // neighbours are one
      if (first == end)
        all.back().outputs += last - first;
      else
        all.push_back({last - first, first - r, first - r + d});
      end = last;
    }
  }
  return all;
}

struct Plan {
  const Problem& a;
  const Kernel& kernel;
  SourceAxis row_axis, column_axis;
  // Displacements of which the products together are the source sets: of rows and columns, side by side in both.
  std::vector<std::vector<Axis>> rows, columns;
  std::int64_t pixels;
  // Rows of the panel are widened by what windows reach over, rows of a query also by what displacements do.
  std::int64_t panel_margin, panel_width, x_margin, x_width;
  std::int64_t row_terms = 0, column_terms = 0;  // of a pixel's sum
  // So many of the rows' displacements, with all of the columns', are one call of the kernel.
  struct Call {
    const Axis *rows, *columns;
    std::int64_t n_rows, n_columns, terms;
  };
  std::vector<Call> calls;

  static constexpr std::int64_t max_terms = max_float_terms;

  Plan(const Problem& problem, bool rim)
      : a(problem),
        kernel(kernel_in_use()),
        row_axis(source_axis(a, a.height)),
        column_axis(source_axis(a, a.width)),
        pixels(a.height * a.width),
        panel_margin(column_axis.window / 2),
        panel_width(a.width + 2 * panel_margin),
        x_margin(panel_margin + (wraps() ? a.width - 1 : 0)),
        x_width(x_margin + a.width + panel_margin) {
    const auto add = [&](const SourceAxis& along_rows, const SourceAxis& along_columns) {
      rows.push_back(displacements(along_rows)), columns.push_back(displacements(along_columns));
      if (rows.back().empty() || columns.back().empty()) return;
      const std::int64_t down = most_sources(along_rows), across = most_sources(along_columns);
      row_terms = std::max(row_terms, down), column_terms = std::max(column_terms, across);
      const std::int64_t n = std::ssize(rows.back()), step = std::clamp<std::int64_t>(max_terms / across, 1, n);
      for (std::int64_t row = 0; row < n; row += step) {
        const std::int64_t some = std::min(step, n - row);
        calls.push_back(
            {rows.back().data() + row, columns.back().data(), some, std::ssize(columns.back()), some * across});
      }
    };
    if (rim) {
      add(part_of(row_axis, Part::themselves), column_axis);
      add(part_of(row_axis, Part::others), part_of(column_axis, Part::themselves));
    } else {
      add(row_axis, column_axis);
    }
  }

  bool wraps() const { return row_axis.wraps; }
  std::int64_t terms() const { return row_terms * column_terms; }
  bool whole_image() const { return a.window == Window::image; }
  std::int64_t images(std::int64_t b) const { return a.end[b] - a.begin[b]; }
  std::int64_t blocks(std::int64_t b) const { return (images(b) + kernel.lanes - 1) / kernel.lanes; }

  // Segments are what threads share out. Their number must not depend on the number of threads. Every segment of a
  // group of queries has its partial posterior in memory; these take about `partials_bytes` whatever the image size.
  static constexpr std::int64_t partials_bytes = std::int64_t{64} << 20;
  std::int64_t partial_bytes() const { return pixels * (a.channels + (a.full() ? 5 : 2)) * 8; }
  std::int64_t max_segments() const { return std::clamp<std::int64_t>(partials_bytes / partial_bytes(), 8, 64); }
  // None so short that its merging takes longer than its sums.
  std::int64_t segments(std::int64_t b) const {
    return std::max<std::int64_t>(1, std::min({blocks(b), max_segments(), 4 * blocks(b) * terms() / max_terms}));
  }
  std::int64_t queries_in_group() const {
    return std::clamp<std::int64_t>(partials_bytes / (max_segments() * partial_bytes()), 1, 64);
  }
};

// ---- One thread's work -------------------------------------------------------------------------------------------

class Worker {
 public:
  explicit Worker(const Plan& plan)
      : plan_(plan),
        a_(plan.a),
        lanes_(plan.kernel.lanes),
        states_(plan.whole_image() ? 1 : plan.pixels),
        unit_(a_.pixels_uint8 ? 1 / 127.5 : 1.0),
        x_(aligned<float>(a_.channels * a_.height * plan.x_width)),
        panel_(aligned<float>(a_.channels * a_.height * plan.panel_width * lanes_)),
        reference_(aligned<double>(states_)),
        offset_(aligned<float>(states_)),
        s_(aligned<float>(states_ * lanes_)),
        y_(aligned<float>(a_.channels * plan.pixels * lanes_)),
        e_(aligned<float>(a_.full() ? states_ * lanes_ : 1)),
        near_(aligned<float>(a_.full() ? states_ * lanes_ : 1)),
        near_at_(aligned<std::int32_t>(a_.full() ? states_ * lanes_ : 1)),
        far_(aligned<double>(a_.full() ? states_ * lanes_ : 1)),
        far_at_(aligned<std::int32_t>(a_.full() ? states_ * lanes_ : 1)),
        scratch_(aligned<float>(kernel_scratch(a_.height, a_.width, plan.row_axis.window, plan.column_axis.window) *
                                lanes_)),
        map_rows_(aligned<const float*>(kernel_map_rows(a_.height, plan.row_axis.window))),
        flushed_(plan.pixels, a_.channels, a_.full()) {
    std::fill_n(map_rows_.get(), kernel_map_rows(a_.height, plan.row_axis.window), scratch_.get());
  }

  // Adds the images of one segment of query b to `total`.
  template <class Stop>
  void run(std::int64_t b, std::int64_t segment, Partial& total, Stop stop) {
    const std::int64_t blocks = plan_.blocks(b), segments = plan_.segments(b);
    const std::int64_t first = segment * blocks / segments, last = (segment + 1) * blocks / segments;
    KernelTask task = make_task(b);
    fill_query(b);
    // The reference stays from flush to flush, so that weights are measured against the whole segment's maximum.
    std::fill_n(reference_.get(), states_, -std::numeric_limits<double>::infinity());
    std::fill_n(offset_.get(), states_, std::numeric_limits<float>::infinity());
    clear();
    std::int64_t terms = 0, first_block = first;
    for (std::int64_t block = first; block < last; ++block) {
      fill_panel(b, block);
      for (std::size_t i = 0; i < plan_.calls.size(); ++i) {
        if (stop()) return;
        const Plan::Call& call = plan_.calls[i];
        task.rows = call.rows, task.n_rows = static_cast<std::int32_t>(call.n_rows);
        task.columns = call.columns, task.n_columns = static_cast<std::int32_t>(call.n_columns);
        task.at = static_cast<std::int32_t>((block - first_block) * plan_.pixels);
        plan_.kernel.accumulate(task);
        terms += call.terms;
        const bool block_ends = i + 1 == plan_.calls.size();
        const bool numbers_end = (block + 2 - first_block) * plan_.pixels > std::numeric_limits<std::int32_t>::max();
        // A last block with fewer images than lanes is by itself.
        const bool next_is_last = block_ends && block + 2 >= last;
        if (terms < Plan::max_terms && !next_is_last && !numbers_end) continue;
        flush(b, first_block, std::min(lanes_, plan_.images(b) - block * lanes_));
        merge(total, flushed_);
        clear();
        terms = 0;
        first_block = block;  // sources are numbered from here, whether this block is done or not
      }
    }
  }

 private:
  KernelTask make_task(std::int64_t b) const {
    KernelTask t{};
    t.channels = a_.channels, t.height = a_.height, t.width = a_.width;
    t.wraps = plan_.wraps();
    t.x = x_.get(), t.x_width = plan_.x_width, t.x_margin = plan_.x_margin;
    t.panel = panel_.get(), t.panel_width = plan_.panel_width, t.panel_margin = plan_.panel_margin;
    t.alpha = a_.alpha[b] * unit_;
    t.whole_image = plan_.whole_image();
    t.k_rows = plan_.row_axis.window, t.k_columns = plan_.column_axis.window;
    const std::int64_t window_values =
        a_.channels * (plan_.whole_image() ? plan_.pixels : std::int64_t{t.k_rows} * t.k_columns);
    float largest = 0.0f;
    const std::int64_t size = a_.channels * plan_.pixels;
    for (std::int64_t i = 0; i < size; ++i) largest = std::max(largest, std::abs(a_.x[b * size + i]));
    const Weighing w = weighing(a_, b, static_cast<double>(plan_.images(b) * plan_.terms()), window_values, largest);
    t.scale = w.scale, t.least_scale = w.least_scale, t.skip = w.skip, t.slack = w.slack;
    t.wide_above = w.wide_above, t.exact_above = w.exact_above, t.always_exact_above = w.always_exact_above;
    t.full = a_.full();
    t.reference = reference_.get(), t.offset = offset_.get(), t.s = s_.get(), t.y = y_.get();
    t.e = e_.get();
    t.near = near_.get(), t.near_at = near_at_.get(), t.far = far_.get(), t.far_at = far_at_.get();
    t.scratch = scratch_.get(), t.map_rows = map_rows_.get();
    return t;
  }

  double scale(std::int64_t b) const { return 0.5 / (a_.sigma[b] * a_.sigma[b]) / ln2; }

  void clear() {
    std::fill_n(s_.get(), states_ * lanes_, 0.0f);
    std::fill_n(y_.get(), a_.channels * plan_.pixels * lanes_, 0.0f);
    if (!a_.full()) return;
    std::fill_n(e_.get(), states_ * lanes_, 0.0f);
    std::fill_n(near_.get(), states_ * lanes_, std::numeric_limits<float>::infinity());
    std::fill_n(near_at_.get(), states_ * lanes_, 0);
    std::fill_n(far_.get(), states_ * lanes_, std::numeric_limits<double>::infinity());
    std::fill_n(far_at_.get(), states_ * lanes_, 0);
  }

  std::int64_t image(std::int64_t b, std::int64_t block, std::int64_t lane) const {
    const std::int64_t n = a_.begin[b] + block * lanes_ + lane;
    return a_.order ? a_.order[n] : n;
  }

  // Widens the rows of the query: they wrap around, or have zeros on both sides.
  void fill_query(std::int64_t b) {
    const float* from = a_.x + b * a_.channels * plan_.pixels;
    float* to = x_.get();
    for (std::int64_t row = 0; row < a_.channels * a_.height; ++row, from += a_.width, to += plan_.x_width)
      if (plan_.wraps())
        for (std::int64_t i = 0; i < plan_.x_width; ++i) to[i] = from[(i - plan_.x_margin + 2 * a_.width) % a_.width];
      else
        std::copy_n(from, a_.width, to + plan_.x_margin);
  }

  // Spreads the pixels of the block's images over the lanes. Lanes without an image repeat the last; `flush` leaves
  // them out.
  void fill_panel(std::int64_t b, std::int64_t block) {
    const std::int64_t size = a_.channels * plan_.pixels, live = plan_.images(b) - block * lanes_;
    const auto spread = [&](const auto* pixels, auto spread_row) {
      const std::remove_reference_t<decltype(*pixels)>* rows[64];
      for (std::int64_t lane = 0; lane < lanes_; ++lane)
        rows[lane] = pixels + image(b, block, std::min(lane, live - 1)) * size;
      for (std::int64_t row = 0; row < a_.channels * a_.height; ++row) {
        float* to = panel_.get() + (row * plan_.panel_width + plan_.panel_margin) * lanes_;
        spread_row(rows, a_.width, to);
        for (std::int64_t lane = 0; lane < lanes_; ++lane) rows[lane] += a_.width;
        if (!plan_.wraps()) continue;
        const std::int64_t margin = plan_.panel_margin * lanes_, width = a_.width * lanes_;
        std::copy_n(to + width - margin, margin, to - margin);
        std::copy_n(to, margin, to + width);
      }
    };
    if (a_.pixels_uint8)
      spread(a_.pixels_uint8, plan_.kernel.spread_uint8);
    else
      spread(a_.pixels_float, plan_.kernel.spread_float);
  }

  // Sums the first `live` lanes of the state in double.
  void flush(std::int64_t b, std::int64_t first_block, std::int64_t live) {
    Partial& out = flushed_;
    const auto sum = [&](const Aligned<float>& lanes, std::int64_t n, std::vector<double>& sums) {
      plan_.kernel.sum_lanes(lanes.get(), n, static_cast<int>(live), sums.data());
      for (std::int64_t p = n; p < plan_.pixels; ++p) sums[p] = sums[0];  // one weight for the whole image
    };
    sum(s_, states_, out.s);
    sum(y_, a_.channels * plan_.pixels, out.y);
    for (double& y : out.y) y *= unit_;
    if (a_.full()) sum(e_, states_, out.e);
    for (std::int64_t p = 0; p < plan_.pixels; ++p) {
      const std::int64_t state = plan_.whole_image() ? 0 : p;
      out.m[p] = reference_[state] * ln2;
      if (!a_.full()) continue;
      out.e[p] *= ln2;
      double nearest = std::numeric_limits<double>::infinity();
      out.source[p] = -1;
      std::int64_t first = 0;  // image and displacement of the nearest so far: the lower goes before its equals
      const auto consider = [&](double distance, std::int64_t at, std::int64_t lane) {
        if (distance > nearest || std::isinf(distance)) return;
        const std::int64_t number = image(b, first_block + at / plan_.pixels, lane);
        const std::int64_t candidate = number * plan_.pixels + at % plan_.pixels;
        if (distance == nearest && candidate > first) return;
        nearest = distance;
        out.source[p] = number * plan_.pixels + source_pixel(p, at % plan_.pixels);
        first = candidate;
      };
      for (std::int64_t i = state * lanes_, lane = 0; lane < live; ++i, ++lane) {
        consider(near_[i], near_at_[i], lane);
        consider(far_[i], far_at_[i], lane);
      }
      out.top[p] = -scale(b) * nearest * ln2;  // rounded as m is: they may be far from 0 and equal
    }
  }

  // With whole-image windows the kernel notes the source of pixel (0, 0), which is the displacement itself.
  std::int64_t source_pixel(std::int64_t p, std::int64_t q) const {
    if (!plan_.whole_image()) return q;
    const std::int64_t row = (p / a_.width + q / a_.width) % a_.height, column = (p + q) % a_.width;
    return row * a_.width + column;
  }

  const Plan& plan_;
  const Problem& a_;
  const std::int64_t lanes_, states_;
  const double unit_;  // of the panel: uint8 v is v - 127.5, exactly, in units of 1 / 127.5
  Aligned<float> x_, panel_;
  Aligned<double> reference_;
  Aligned<float> offset_, s_, y_, e_;
  Aligned<float> near_;
  Aligned<std::int32_t> near_at_;
  Aligned<double> far_;
  Aligned<std::int32_t> far_at_;
  Aligned<float> scratch_;
  Aligned<const float*> map_rows_;
  Partial flushed_;
};

}  // namespace

void cpu_engine(const Problem& a, const CpuOptions& options, Sink& sink) {
  const Plan plan(a, options.rim);
  const std::int64_t group = plan.queries_in_group();
  struct Unit {
    std::int64_t query, segment;
    Partial partial;
  };
  for (std::int64_t b0 = 0; b0 < a.queries; b0 += group) {
    std::vector<Unit> units;
    for (std::int64_t b = b0; b < std::min(a.queries, b0 + group); ++b)
      for (std::int64_t segment = 0; segment < plan.segments(b); ++segment)
        units.push_back({b, segment, Partial(plan.pixels, a.channels, a.full())});

    in_threads(options.threads, static_cast<std::int64_t>(units.size()), a.interrupted, [&](auto take) {
      Worker worker(plan);
      take([&](std::int64_t i, auto stop) {
        Unit& unit = units[static_cast<std::size_t>(i)];
        worker.run(unit.query, unit.segment, unit.partial, stop);
      });
    });

    // In the order of the bank, whichever thread did what.
    for (std::size_t i = 0; i < units.size();) {
      Partial total = std::move(units[i].partial);
      const std::int64_t b = units[i].query;
      for (++i; i < units.size() && units[i].query == b; ++i) merge(total, units[i].partial);
      sink.take(b, total);
    }
  }
}

}  // namespace pyels
