#include "cpu/plan.h"

namespace pyels {

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

Plan::Plan(const Problem& problem, unsigned regions, std::int64_t pixel_bytes)
    : a(problem),
      kernel(kernel_in_use()),
      row_axis(source_axis(a, a.height)),
      column_axis(source_axis(a, a.width)),
      pixels(a.height * a.width),
      answer_channels(a.others_answer() ? a.response_channels : a.channels),
      panel_margin(column_axis.window / 2),
      panel_width(a.width + 2 * panel_margin),
      x_margin(panel_margin + (wraps() ? a.width - 1 : 0)),
      x_width(x_margin + a.width + panel_margin),
      partial_bytes(pixels * pixel_bytes),
      max_segments(std::clamp<std::int64_t>(partials_bytes / partial_bytes, 8, 64)) {
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
  // Rows for which the same columns are asked for go together.
  for (unsigned across = 1; across < 8; ++across) {
    unsigned down = 0;
    for (int i = 0; i < 3; ++i) down |= unsigned{(regions >> 3 * i & 7) == across} << i;
    if (down > 0) add(spans_of(row_axis, down), spans_of(column_axis, across));
  }
}

// ---- Lanes -------------------------------------------------------------------------------------------------------

std::vector<double> taps_of(const Problem& a, const double* taps, std::int64_t window) {
  if (!taps) return std::vector<double>(static_cast<std::size_t>(window), 1.0);
  return std::vector<double>(taps + (a.patch_size - window) / 2, taps + (a.patch_size + window) / 2);
}

Lanes::Lanes(const Plan& plan)
    : unit(plan.a.pixels_uint8 ? 1 / 127.5 : 1.0),
      answer_unit(!plan.a.others_answer()  ? unit
                  : plan.a.responses_uint8 ? 1 / 127.5
                                           : 1.0),
      plan_(plan),
      a_(plan.a),
      x_(aligned<float>(a_.channels * a_.height * plan.x_width)),
      precision_(aligned<float>(plan.uneven() ? a_.channels * a_.height * plan.x_width : 1)),
      panel_(aligned<float>(a_.channels * a_.height * plan.panel_width * plan.kernel.lanes)),
      answers_(aligned<float>(
          a_.others_answer() ? plan.answer_channels * a_.height * plan.panel_width * plan.kernel.lanes : 1)),
      scratch_(aligned<float>(kernel_scratch(a_.height, a_.width, plan.row_axis.window, plan.column_axis.window) *
                              plan.kernel.lanes)),
      map_rows_(aligned<const float*>(kernel_map_rows(a_.height, plan.row_axis.window))) {
  std::fill_n(map_rows_.get(), kernel_map_rows(a_.height, plan.row_axis.window), scratch_.get());
  if (!plan.uneven()) return;
  const double* taps = plan.whole_image() ? nullptr : a_.taps;
  row_taps_ = taps_of(a_, taps, plan.row_axis.window), column_taps_ = taps_of(a_, taps, plan.column_axis.window);
  float_row_taps_.assign(row_taps_.begin(), row_taps_.end());
  float_column_taps_.assign(column_taps_.begin(), column_taps_.end());
}

float Lanes::expected_noise(std::int64_t b, std::int64_t window_values, float largest) const {
  if (plan_.whole_image() || plan_.uneven() || window_values < few_values) return 0.0f;
  if (largest > float32_reach * a_.sigma[b]) return 0.0f;  // all is found again in double
  int exponent;
  const double digits = std::round(256 * std::frexp(a_.sigma[b], &exponent));
  return static_cast<float>(std::ldexp(digits, exponent - 8));
}

void Lanes::load_query(std::int64_t b, MapTask& t) {
  const std::int64_t size = a_.channels * plan_.pixels;
  const std::int64_t window_values =
      a_.channels *
      (plan_.whole_image() ? plan_.pixels : std::int64_t{plan_.row_axis.window} * plan_.column_axis.window);
  float largest = 0.0f;
  for (const float x : std::span(a_.x + b * size, static_cast<std::size_t>(size)))
    largest = std::max(largest, std::abs(x));
  const float noise = expected_noise(b, window_values, largest);
  // Rows are widened: they wrap around, or have on both sides what makes D, less the noise, nothing.
  const auto widen = [&](auto pixel, float beside, float* to) {
    for (std::int64_t row = 0; row < a_.channels * a_.height; ++row, to += plan_.x_width)
      if (plan_.wraps()) {
        for (std::int64_t i = 0; i < plan_.x_width; ++i)
          to[i] = pixel(row * a_.width + (i - plan_.x_margin + 2 * a_.width) % a_.width);
      } else {
        std::fill_n(to, plan_.x_width, beside);
        for (std::int64_t i = 0; i < a_.width; ++i) to[plan_.x_margin + i] = pixel(row * a_.width + i);
      }
  };
  const float* x = a_.x + b * size;
  const float* precision = a_.precision ? a_.precision + b * size : nullptr;
  widen([&](std::int64_t i) { return x[i]; }, noise, x_.get());
  if (plan_.uneven()) widen([&](std::int64_t i) { return precision ? precision[i] : 1.0f; }, 0.0f, precision_.get());

  t.channels = a_.channels, t.height = a_.height, t.width = a_.width;
  t.wraps = plan_.wraps();
  t.x = x_.get(), t.x_width = plan_.x_width, t.x_margin = plan_.x_margin;
  t.panel = panel_.get(), t.panel_width = plan_.panel_width, t.panel_margin = plan_.panel_margin;
  t.answers = a_.others_answer() ? answers_.get() : t.panel, t.answer_channels = plan_.answer_channels;
  t.alpha = a_.alpha[b] * unit;
  t.whole_image = plan_.whole_image();
  t.k_rows = plan_.row_axis.window, t.k_columns = plan_.column_axis.window;
  double heaviest = 1.0;
  if (plan_.uneven()) {
    t.precision = precision_.get();
    t.row_taps = float_row_taps_.data(), t.column_taps = float_column_taps_.data();
    t.exact_row_taps = row_taps_.data(), t.exact_column_taps = column_taps_.data();
    heaviest = *std::max_element(row_taps_.begin(), row_taps_.end()) *
               *std::max_element(column_taps_.begin(), column_taps_.end()) *
               (precision ? *std::max_element(precision, precision + size) : 1.0);
  }
  t.noise = static_cast<float>(a_.channels) * noise * noise;
  const double less = static_cast<double>(noise) * noise * static_cast<double>(window_values);
  const Weighing w =
      weighing(a_, b, static_cast<double>(plan_.images(b) * plan_.terms()), window_values, largest, heaviest, less);
  place_noise_ = w.scale * t.noise;
  t.scale = w.scale, t.least_scale = w.least_scale, t.skip = w.skip, t.slack = w.slack;
  t.wide_above = w.wide_above, t.exact_above = w.exact_above, t.always_exact_above = w.always_exact_above;
  t.scratch = scratch_.get(), t.map_rows = map_rows_.get();
}

double Lanes::noise_of_window(std::int64_t p) const {
  const Reach rows = reach_of(plan_.row_axis, static_cast<std::int32_t>(p / a_.width));
  const Reach columns = reach_of(plan_.column_axis, static_cast<std::int32_t>(p % a_.width));
  return place_noise_ * (rows.last - rows.first + 1) * (columns.last - columns.first + 1);
}

void Lanes::load_block(std::int64_t b, std::int64_t block) {
  if (a_.pixels_uint8)
    spread(a_.pixels_uint8, a_.channels, b, block, plan_.kernel.spread_uint8, panel_.get());
  else
    spread(a_.pixels_float, a_.channels, b, block, plan_.kernel.spread_float, panel_.get());
  if (a_.responses_uint8)
    spread(a_.responses_uint8, plan_.answer_channels, b, block, plan_.kernel.spread_uint8, answers_.get());
  else if (a_.responses_float)
    spread(a_.responses_float, plan_.answer_channels, b, block, plan_.kernel.spread_float, answers_.get());
}

template <class Pixel>
void Lanes::spread(const Pixel* pixels, std::int64_t channels, std::int64_t b, std::int64_t block,
                   void (*spread_row)(const Pixel* const*, std::int64_t, float*), float* panel) const {
  const std::int64_t lanes = plan_.kernel.lanes, live = plan_.images(b) - block * lanes;
  const Pixel* rows[64];
  for (std::int64_t lane = 0; lane < lanes; ++lane)
    rows[lane] = pixels + plan_.image(b, block, std::min(lane, live - 1)) * channels * plan_.pixels;
  for (std::int64_t row = 0; row < channels * a_.height; ++row) {
    float* to = panel + (row * plan_.panel_width + plan_.panel_margin) * lanes;
    spread_row(rows, a_.width, to);
    for (std::int64_t lane = 0; lane < lanes; ++lane) rows[lane] += a_.width;
    if (!plan_.wraps()) continue;
    const std::int64_t margin = plan_.panel_margin * lanes, width = a_.width * lanes;
    std::copy_n(to + width - margin, margin, to - margin);
    std::copy_n(to, margin, to + width);
  }
}

}  // namespace pyels
