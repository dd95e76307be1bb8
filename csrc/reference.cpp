// The definition in double precision, with no cleverness: for every query pixel, every source patch, every window
// pixel. Slow on purpose; see pyels.h for the formula.
#include <algorithm>
#include <cmath>

#include "pyels.h"

namespace pyels {
namespace {

struct Place {
  std::int64_t row, column;
};

double bank_pixel(const Problem& a, std::int64_t image, std::int64_t c, Place at) {
  const std::int64_t i = ((image * a.channels + c) * a.height + at.row) * a.width + at.column;
  return a.pixels_uint8 ? a.pixels_uint8[i] / 127.5 - 1.0 : static_cast<double>(a.pixels_float[i]);
}

std::int64_t wrap(std::int64_t i, std::int64_t n) { return i < 0 ? i + n : i >= n ? i - n : i; }

// Does the window of radius r at q overhang an axis of length n by the same two amounts as the window at p?
bool same_overhang(std::int64_t p, std::int64_t q, std::int64_t r, std::int64_t n) {
  const auto before = [&](std::int64_t i) { return std::max<std::int64_t>(0, r - i); };
  const auto after = [&](std::int64_t i) { return std::max<std::int64_t>(0, i + r - (n - 1)); };
  return before(p) == before(q) && after(p) == after(q);
}

bool is_source(const Problem& a, Place p, Place q) {
  const std::int64_t r = a.patch_size / 2;
  switch (a.sources) {
    case Sources::same_position: return p.row == q.row && p.column == q.column;
    case Sources::circular: return true;
    case Sources::interior: return q.row >= r && q.row < a.height - r && q.column >= r && q.column < a.width - r;
    case Sources::zeros:
      return same_overhang(p.row, q.row, r, a.height) && same_overhang(p.column, q.column, r, a.width);
  }
  return false;
}

// || x[window(p)] - alpha * phi ||^2 for the patch of `image` around q, the window reaching from `first` to `last`.
double squared_distance(const Problem& a, std::int64_t b, Place p, std::int64_t image, Place q, Place first,
                        Place last) {
  const float* x = a.x + b * a.channels * a.height * a.width;
  double sum = 0.0;
  for (std::int64_t c = 0; c < a.channels; ++c)
    for (std::int64_t i = first.row; i <= last.row; ++i)
      for (std::int64_t j = first.column; j <= last.column; ++j) {
        const Place at_p{wrap(p.row + i, a.height), wrap(p.column + j, a.width)};
        const Place at_q{wrap(q.row + i, a.height), wrap(q.column + j, a.width)};
        const double difference =
            x[(c * a.height + at_p.row) * a.width + at_p.column] - a.alpha[b] * bank_pixel(a, image, c, at_q);
        sum += difference * difference;
      }
  return sum;
}

// Adds one source patch to pixel p by the textbook online log-sum-exp: whenever the maximum grows, what was summed so
// far is scaled down to it.
void add(const Problem& a, Partial& total, std::int64_t p, double log_w, std::int64_t image, Place q) {
  const std::int64_t source = (image * a.height + q.row) * a.width + q.column;
  if (log_w > total.m[p]) {
    const double scale = std::exp(total.m[p] - log_w);
    if (a.full() && total.s[p] > 0.0) total.e[p] = scale * (total.e[p] + total.s[p] * (total.m[p] - log_w));
    total.s[p] *= scale;
    for (std::int64_t c = 0; c < a.channels; ++c) total.y[c * total.pixels + p] *= scale;
    total.m[p] = log_w;
  }
  const double w = std::exp(log_w - total.m[p]);
  total.s[p] += w;
  for (std::int64_t c = 0; c < a.channels; ++c) total.y[c * total.pixels + p] += w * bank_pixel(a, image, c, q);
  if (!a.full()) return;
  total.e[p] += w * (log_w - total.m[p]);
  if (log_w > total.top[p]) {  // the first of equals
    total.top[p] = log_w;
    total.source[p] = source;
  }
}

// One mask for every pixel p: the weights of the squared differences from the image at the same position.
void masked_windows(const Problem& a, std::int64_t b, Partial& total) {
  const std::int64_t size = a.channels * total.pixels;
  const float* x = a.x + b * size;
  for (std::int64_t p = 0; p < total.pixels; ++p) {
    if (a.interrupted && a.interrupted()) throw Interrupted();
    const double* mask = a.masks + p * size;
    for (std::int64_t n = a.begin[b]; n < a.end[b]; ++n) {
      const std::int64_t image = a.order ? a.order[n] : n;
      double distance = 0.0;
      for (std::int64_t z = 0; z < size; ++z) {
        const Place at{z / a.width % a.height, z % a.width};
        const double difference = x[z] - a.alpha[b] * bank_pixel(a, image, z / total.pixels, at);
        distance += mask[z] * difference * difference;
      }
      add(a, total, p, -distance / (2.0 * a.sigma[b] * a.sigma[b]), image, {p / a.width, p % a.width});
    }
  }
}

// IS and ES: one weight for an image moved by (dy, dx), shared by all pixels p, with centre p + (dy, dx).
void whole_image_windows(const Problem& a, std::int64_t b, Partial& total) {
  const std::int64_t moves_y = a.sources == Sources::circular ? a.height : 1;
  const std::int64_t moves_x = a.sources == Sources::circular ? a.width : 1;
  for (std::int64_t n = a.begin[b]; n < a.end[b]; ++n) {
    if (a.interrupted && a.interrupted()) throw Interrupted();
    const std::int64_t image = a.order ? a.order[n] : n;
    for (std::int64_t dy = 0; dy < moves_y; ++dy)
      for (std::int64_t dx = 0; dx < moves_x; ++dx) {
        const double log_w = -squared_distance(a, b, {0, 0}, image, {dy, dx}, {0, 0}, {a.height - 1, a.width - 1}) /
                             (2.0 * a.sigma[b] * a.sigma[b]);
        for (std::int64_t p = 0; p < total.pixels; ++p)
          add(a, total, p, log_w, image, {wrap(p / a.width + dy, a.height), wrap(p % a.width + dx, a.width)});
      }
  }
}

// LS and ELS: a k x k window around each pixel.
void square_windows(const Problem& a, std::int64_t b, Partial& total) {
  const std::int64_t r = a.patch_size / 2;
  const bool clipped = a.sources == Sources::same_position || a.sources == Sources::zeros;
  for (std::int64_t p = 0; p < total.pixels; ++p) {
    if (a.interrupted && a.interrupted()) throw Interrupted();
    const Place at_p{p / a.width, p % a.width};
    Place first{-r, -r}, last{r, r};
    if (clipped) {  // at q just as at p, since both overhang alike
      first = {std::max(-r, -at_p.row), std::max(-r, -at_p.column)};
      last = {std::min(r, a.height - 1 - at_p.row), std::min(r, a.width - 1 - at_p.column)};
    }
    for (std::int64_t n = a.begin[b]; n < a.end[b]; ++n) {
      const std::int64_t image = a.order ? a.order[n] : n;
      for (std::int64_t q = 0; q < total.pixels; ++q) {
        const Place at_q{q / a.width, q % a.width};
        if (!is_source(a, at_p, at_q)) continue;
        const double distance = squared_distance(a, b, at_p, image, at_q, first, last);
        add(a, total, p, -distance / (2.0 * a.sigma[b] * a.sigma[b]), image, at_q);
      }
    }
  }
}

}  // namespace

void reference_engine(const Problem& a, Sink& sink) {
  for (std::int64_t b = 0; b < a.queries; ++b) {
    Partial total(a.height * a.width, a.channels, a.full());
    switch (a.window) {
      case Window::image: whole_image_windows(a, b, total); break;
      case Window::square: square_windows(a, b, total); break;
      case Window::masks: masked_windows(a, b, total); break;
    }
    sink.take(b, total);
  }
}

}  // namespace pyels
