// The definition in double precision, with no cleverness: for every query pixel, every source patch, every window
// pixel. Slow on purpose; see pyels.h for the formula.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

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

double response(const Problem& a, std::int64_t image, std::int64_t c, Place at) {
  if (!a.others_answer()) return bank_pixel(a, image, c, at);
  const std::int64_t i = ((image * a.response_channels + c) * a.height + at.row) * a.width + at.column;
  return a.responses_uint8 ? a.responses_uint8[i] / 127.5 - 1.0 : static_cast<double>(a.responses_float[i]);
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

bool clipped(const Problem& a) { return a.sources == Sources::same_position || a.sources == Sources::zeros; }

std::int64_t image_number(const Problem& a, std::int64_t n) { return a.order ? a.order[n] : n; }

// Calls f(place z of the query, place of the patch around q that is compared with it, o) for every place o of the window
// of pixel p; o counts from the window's first row and column, on and beyond the border.
template <class F>
void for_window(const Problem& a, Place p, Place q, F f) {
  const std::int64_t r = a.patch_size / 2;
  Place first{-r, -r}, last{r, r};
  if (a.window != Window::square) {
    first = {-p.row, -p.column}, last = {a.height - 1 - p.row, a.width - 1 - p.column};
  } else if (clipped(a)) {  // at q just as at p, since both overhang alike
    first = {std::max(-r, -p.row), std::max(-r, -p.column)};
    last = {std::min(r, a.height - 1 - p.row), std::min(r, a.width - 1 - p.column)};
  }
  for (std::int64_t i = first.row; i <= last.row; ++i)
    for (std::int64_t j = first.column; j <= last.column; ++j)
      f(Place{wrap(p.row + i, a.height), wrap(p.column + j, a.width)},
        Place{wrap(q.row + i, a.height), wrap(q.column + j, a.width)}, Place{i + r, j + r});
}

// L_p(z) sigma^2 of one channel.
double precision(const Problem& a, std::int64_t b, Place p, std::int64_t c, Place z, Place o) {
  const std::int64_t at = (c * a.height + z.row) * a.width + z.column, size = a.channels * a.height * a.width;
  double weight = a.precision ? static_cast<double>(a.precision[b * size + at]) : 1.0;
  if (a.window == Window::square && a.taps) weight *= a.taps[o.row] * a.taps[o.column];
  if (a.window == Window::masks) weight *= a.mask((p.row * a.width + p.column) * size + at);
  return weight;
}

double query_pixel(const Problem& a, std::int64_t b, std::int64_t c, Place z) {
  return a.x[((b * a.channels + c) * a.height + z.row) * a.width + z.column];
}

double log_weight(const Problem& a, std::int64_t b, Place p, std::int64_t image, Place q) {
  double sum = 0.0;
  for (std::int64_t c = 0; c < a.channels; ++c)
    for_window(a, p, q, [&](Place z, Place at_q, Place o) {
      const double difference = query_pixel(a, b, c, z) - a.alpha[b] * bank_pixel(a, image, c, at_q);
      sum += precision(a, b, p, c, z, o) * difference * difference;
    });
  return -sum / (2.0 * a.sigma[b] * a.sigma[b]);
}

// Calls f(p, image, q, log w) for every pixel p and every patch that it is compared with, of which q is the centre.
template <class F>
void for_pairs(const Problem& a, std::int64_t b, F f) {
  const std::int64_t pixels = a.height * a.width;
  const auto place = [&](std::int64_t p) { return Place{p / a.width, p % a.width}; };
  const auto stop = [&] {
    if (a.interrupted && a.interrupted()) throw Interrupted();
  };
  if (a.window == Window::image) {  // one weight for an image moved by d, shared by all pixels
    for (std::int64_t n = a.begin[b]; n < a.end[b]; ++n) {
      stop();
      for (std::int64_t d = 0; d < (a.sources == Sources::circular ? pixels : 1); ++d) {
        const double log_w = log_weight(a, b, {0, 0}, image_number(a, n), place(d));
        for (std::int64_t p = 0; p < pixels; ++p)
          f(p, image_number(a, n),
            Place{wrap(place(p).row + place(d).row, a.height), wrap(place(p).column + place(d).column, a.width)},
            log_w);
      }
    }
    return;
  }
  for (std::int64_t p = 0; p < pixels; ++p) {
    stop();
    for (std::int64_t n = a.begin[b]; n < a.end[b]; ++n)
      for (std::int64_t q = 0; q < pixels; ++q)
        if (is_source(a, place(p), place(q)))
          f(p, image_number(a, n), place(q), log_weight(a, b, place(p), image_number(a, n), place(q)));
  }
}

// Adds one source patch to pixel p by the textbook online log-sum-exp: whenever the maximum grows, what was summed so
// far is scaled down to it.
void add(const Problem& a, Partial& total, std::int64_t p, double log_w, std::int64_t image, Place q) {
  if (log_w > total.m[p]) {
    const double scale = std::exp(total.m[p] - log_w);
    if (a.full() && total.s[p] > 0.0) total.e[p] = scale * (total.e[p] + total.s[p] * (total.m[p] - log_w));
    total.s[p] *= scale;
    for (std::int64_t c = 0; c < total.channels; ++c) total.y[c * total.pixels + p] *= scale;
    total.m[p] = log_w;
  }
  const double w = std::exp(log_w - total.m[p]);
  total.s[p] += w;
  for (std::int64_t c = 0; c < total.channels; ++c) total.y[c * total.pixels + p] += w * response(a, image, c, q);
  if (!a.full()) return;
  total.e[p] += w * (log_w - total.m[p]);
  if (log_w > total.top[p]) {  // the first of equals
    total.top[p] = log_w;
    total.source[p] = (image * a.height + q.row) * a.width + q.column;
  }
}

// Of one pixel, in descending order, and as many as asked for.
using Heaviest = std::vector<std::pair<double, std::int64_t>>;

// The second pass over query b. Arrays of `to` are those of all queries.
void add_answers(const Problem& a, const Second& to, std::int64_t b, std::vector<Heaviest>& heaviest) {
  const std::int64_t pixels = a.height * a.width, channels = a.answer_channels();
  const auto at = [&](std::int64_t of, std::int64_t c, Place z) {
    return (b * of + c) * pixels + z.row * a.width + z.column;
  };
  for_pairs(a, b, [&](std::int64_t p, std::int64_t image, Place q, double log_w) {
    const Place here{p / a.width, p % a.width};
    const double w = std::exp(log_w - to.log_sum[b * pixels + p]);
    if (to.influence) to.influence[b * a.images + image] += w;
    if (to.top > 0) {
      Heaviest& of = heaviest[static_cast<std::size_t>(p)];
      const std::pair one{-w, (image * a.height + q.row) * a.width + q.column};
      of.insert(std::upper_bound(of.begin(), of.end(), one), one);
      if (std::ssize(of) > to.top) of.pop_back();
    }
    double projected = 0.0;  // of the response, less the mean, on the cotangent
    for (std::int64_t c = 0; c < channels; ++c) {
      if (!to.variance && !to.derivative) break;
      const double off = response(a, image, c, q) - to.mean[at(channels, c, here)];
      if (to.variance) to.variance[at(channels, c, here)] += w * off * off;
      if (to.derivative) projected += to.cotangent[at(channels, c, here)] * off;
    }
    if (!to.folded && !to.derivative) return;
    for_window(a, here, q, [&](Place z, Place at_q, Place o) {
      bool answers = a.window == Window::square;
      for (std::int64_t c = 0; c < a.channels; ++c) {
        const double l = precision(a, b, here, c, z, o) / (a.sigma[b] * a.sigma[b]);
        if (to.derivative)
          to.derivative[at(a.channels, c, z)] += l * a.alpha[b] * w * projected * bank_pixel(a, image, c, at_q);
        if (a.window == Window::masks)
          answers |= a.mask((p * a.channels + c) * pixels + z.row * a.width + z.column) > 0.0;
      }
      if (!to.folded || !answers) return;
      const double r = a.window == Window::square ? to.fold_taps[o.row] * to.fold_taps[o.column] : 1.0;
      for (std::int64_t c = 0; c < channels; ++c) to.folded[at(channels, c, z)] += r * w * response(a, image, c, at_q);
    });
  });
}

}  // namespace

void reference_engine(const Problem& a, Sink& sink) {
  for (std::int64_t b = 0; b < a.queries; ++b) {
    Partial total(a.height * a.width, a.answer_channels(), a.full());
    for_pairs(a, b,
              [&](std::int64_t p, std::int64_t image, Place q, double log_w) { add(a, total, p, log_w, image, q); });
    sink.take(b, total);
  }
}

void reference_second(const Problem& a, const Second& to) {
  for (std::int64_t b = 0; b < a.queries; ++b) {
    std::vector<Heaviest> heaviest(static_cast<std::size_t>(a.height * a.width));
    add_answers(a, to, b, heaviest);
    for (std::int64_t i = 0; i < to.pixels; ++i) {
      const Heaviest& of = heaviest[static_cast<std::size_t>(to.pixel[i])];
      for (std::size_t k = 0; k < of.size(); ++k) {
        const std::int64_t put = (b * to.pixels + i) * to.top + static_cast<std::int64_t>(k);
        to.heaviest[put] = -of[k].first, to.heaviest_source[put] = of[k].second;
      }
    }
  }
}

}  // namespace pyels
