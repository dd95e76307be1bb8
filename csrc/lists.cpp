// The approximate engine: stratified sampling of the windows of a bank, with lists of similar windows as strata.
//
// A query pixel looks at the first n_l of the N_l members of list l, and sum w is estimated by sum_l N_l / n_l * (sum of
// the w looked at), likewise sum w * centre. A list's members are in random order, so this is a simple random sample of
// each stratum, the variance of both sums follows from the scatter within lists, and a list that was looked at in whole
// adds none. How many of which list: Neyman's allocation, n_l ~ N_l * scatter_l. Before anything was looked at, scatter
// is predicted from the mean and spread of the list, later learnt from the members; in rounds, until the error of the
// mean is below the tolerance.
//
// All pixels of a query that look into a list share the windows gathered from it; what a pixel looks at depends on
// itself alone. Sums belong to a list and a pixel, and lists are shared out over threads.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <numeric>

#include "kernel.h"
#include "pyels.h"
#include "work.h"

namespace pyels {
namespace {

constexpr double ln2 = 0.693147180559945309417232121458;
constexpr float none = -std::numeric_limits<float>::infinity();

// Gathers windows into panels.
class Gather {
 public:
  Gather(const Problem& a, const Lists& lists, const Kernel& kernel)
      : a_(a), lists_(lists), kernel_(kernel), k_(a.patch_size), r_(a.patch_size / 2), dims_(a.channels * k_ * k_) {
    const std::int64_t bytes = dims_ * kernel.lanes * (a.pixels_uint8 ? 1 : 4);
    windows_ = aligned<std::uint8_t>(bytes + 64);  // transposing may read beyond the last
  }

  // The panel (blocks, dims)[L] of members first .. last - 1 of all; lanes without one repeat the last.
  void panel(std::int64_t first, std::int64_t last, float* to) {
    if (a_.pixels_uint8)
      blocks(a_.pixels_uint8, reinterpret_cast<std::uint8_t*>(windows_.get()), kernel_.spread_uint8, first, last, to);
    else
      blocks(a_.pixels_float, reinterpret_cast<float*>(windows_.get()), kernel_.spread_float, first, last, to);
  }

  // One window, (C, k, k).
  template <class Pixel>
  void window(const Pixel* pixels, std::int64_t member, Pixel* to) const {
    const std::int64_t place = lists_.place[member];
    const Pixel* image = pixels + std::int64_t{lists_.image[member]} * a_.channels * a_.height * a_.width;
    copy(image, pixels + pixels_in_bank(), place / a_.width - r_, place % a_.width - r_, to);
  }

  // Asks for the memory of a window that will be gathered soon.
  template <class Pixel>
  void prefetch(const Pixel* pixels, std::int64_t member) const {
    const std::int64_t place = lists_.place[member], size = a_.height * a_.width;
    const Pixel* image = pixels + std::int64_t{lists_.image[member]} * a_.channels * size;
    const std::int64_t first = std::max<std::int64_t>(0, place - r_ * a_.width - r_);
    const std::int64_t last = std::min<std::int64_t>(size - 1, place + r_ * a_.width + r_);
    for (std::int64_t c = 0; c < a_.channels; ++c, image += size)
      for (const Pixel* at = image + first; at <= image + last; at += 64 / sizeof(Pixel)) __builtin_prefetch(at);
  }

  // The window of `image` whose first pixel is (row, column), wrapped around where it reaches beyond. Nothing at or
  // behind `end` is read; up to 15 bytes behind the window may be written.
  template <class Pixel>
  void copy(const Pixel* image, const Pixel* end, std::int64_t row, std::int64_t column, Pixel* to) const {
    const bool inside = row >= 0 && column >= 0 && row + k_ <= a_.height && column + k_ <= a_.width;
    for (std::int64_t c = 0; c < a_.channels; ++c, image += a_.height * a_.width)
      for (std::int64_t i = 0; i < k_; ++i, to += k_) {
        if (inside) {
          const Pixel* from = image + (row + i) * a_.width + column;
          constexpr std::int64_t step = 16 / sizeof(Pixel);  // what lies behind is overwritten by the next row
          if (from + k_ + step <= end) {
            for (std::int64_t j = 0; j < k_; j += step) std::memcpy(to + j, from + j, 16);
          } else {
            std::copy_n(from, k_, to);
          }
        } else {
          const Pixel* from = image + (row + i + a_.height) % a_.height * a_.width;
          for (std::int64_t j = 0; j < k_; ++j) to[j] = from[(column + j + a_.width) % a_.width];
        }
      }
  }

  std::int64_t dims() const { return dims_; }

 private:
  std::int64_t pixels_in_bank() const { return a_.images * a_.channels * a_.height * a_.width; }

  template <class Pixel, class Spread>
  void blocks(const Pixel* pixels, Pixel* windows, Spread spread, std::int64_t first, std::int64_t last, float* to) {
    const std::int64_t lanes = kernel_.lanes;
    const Pixel* rows[64];
    for (; first < last; first += lanes, to += dims_ * lanes) {
      for (std::int64_t lane = 0; lane < lanes; ++lane) {
        Pixel* at = windows + std::min(lane, last - 1 - first) * dims_;
        rows[lane] = at;
        if (first + lane < last) window(pixels, first + lane, at);
        if (first + lane + lanes < last) prefetch(pixels, first + lane + lanes);
      }
      spread(rows, dims_, to);
    }
  }

  const Problem& a_;
  const Lists& lists_;
  const Kernel& kernel_;
  const std::int64_t k_, r_, dims_;
  Aligned<std::uint8_t> windows_;
};

struct Place {
  std::int64_t row, column;
};

// The pixels whose sources are in lists.
std::vector<Place> listed_pixels(const Problem& a) {
  const std::int64_t r = a.sources == Sources::zeros ? a.patch_size / 2 : 0;
  std::vector<Place> pixels;
  for (std::int64_t row = r; row < a.height - r; ++row)
    for (std::int64_t column = r; column < a.width - r; ++column) pixels.push_back({row, column});
  return pixels;
}

constexpr double first_round = 4096;  // windows that a pixel looks at in the first round
static double TR=std::getenv("TR")?atof(std::getenv("TR")):0.5, DI=std::getenv("DI")?atof(std::getenv("DI")):1000;
constexpr double growth = 3;          // a round at most so many times what was spent before it
constexpr double interval = 1.96;     // standard errors: 95%
// A prediction counts as so many members looked at.
constexpr double prior_members = 16;
// The model of a list before anything was looked at: its windows spread alike in so many directions.
constexpr double directions = 32;
// Lists whose weights are predicted to be below 2^-reach of the heaviest list are never looked at.
static double reach = std::getenv("RE")?atof(std::getenv("RE")):20;
// An image is left to the exact engine when more than a quarter of its pixels would look at more than an eighth of all
// windows: a pair costs about four times as much here.
constexpr double most_of_windows = 1.0 / 8, most_of_pixels = 1.0 / 4;
// Beyond so many nats float32 distances spoil the weights.
constexpr double most_nats = 3000;

// So many query pixels share what is gathered; their entries take up to some 100 MB.
constexpr std::int64_t pixels_together = 4096;
constexpr std::int32_t generous = 4;

// What a query pixel knows of a list.
struct Entry {
  std::int32_t list, looked = 0, wanted = 0, top_member = -1;
  float distance;  // squared, from the list's mean
  float m = none, top = none;
};

struct Pixel {
  std::int64_t b;  // query
  Place place;
  double scale;  // log2 w = -scale * squared distance, in units of the bank's pixels
  bool done = false, hard = false, beyond = false;  // hard, beyond: the exact engine would be better; is needed
  std::vector<Entry> entries;
  std::vector<float> sums;  // (entries, list_sums)
  // The estimate, relative to 2^m.
  double m = 0, s = 0, ss = 0, tail = 0, seen = 0, left = 0;
  double out_of_reach = -std::numeric_limits<double>::infinity();  // log2 of a bound on the lists without an entry
  std::vector<double> y, sy, yy;  // (C)
};

class Search {
 public:
  Search(const Problem& a, const Lists& lists, double tolerance)
      : a_(a),
        lists_(lists),
        kernel_(kernel_in_use()),
        places_(listed_pixels(a)),
        n_sums_(list_sums(a.channels, a.full)),
        dims_(a.channels * a.patch_size * a.patch_size),
        unit_(a.pixels_uint8 ? 127.5 : 1.0),
        tolerance_(tolerance),
        windows_(static_cast<double>(lists.begin[lists.count] - lists.begin[0])) {
    spread_means();
  }

  std::int64_t pixels_of_a_query() const { return std::ssize(places_); }

  // Looks for the pixels of queries b0 .. b1 - 1.
  void run(std::int64_t b0, std::int64_t b1) {
    b0_ = b0;
    pixels_.clear(), exact_.assign(static_cast<std::size_t>(b1 - b0), false);
    for (std::int64_t b = b0; b < b1; ++b)
      for (const Place& place : places_) pixels_.push_back({.b = b, .place = place, .scale = scale(b)});
    fill_queries();
    for (int round = 0; next_round(round); ++round) look();
  }

  // Fills `out` where the listed pixels of query b are; false when the exact engine is to be used.
  bool put(std::int64_t b, Partial& out) const {
    if (exact_[static_cast<std::size_t>(b - b0_)]) return false;
    for (const Pixel& q : pixels_)
      if (q.b == b) put(q, out);
    return true;
  }

 private:
  std::int64_t size(std::int64_t l) const { return lists_.begin[l + 1] - lists_.begin[l]; }
  double alpha(std::int64_t b) const { return std::max(a_.alpha[b], 1e-9); }  // at 0, x / alpha would be infinite
  double scale(std::int64_t b) const {
    const double ratio = alpha(b) / (a_.sigma[b] * unit_);
    return 0.5 * ratio * ratio / ln2;
  }
  std::int64_t centre(std::int64_t c) const {
    return (c * a_.patch_size + a_.patch_size / 2) * a_.patch_size + a_.patch_size / 2;
  }
  double list_centre(std::int64_t l, std::int64_t c) const {
    return unit_ * static_cast<double>(lists_.mean[l * dims_ + centre(c)]);
  }
  double spread(std::int64_t l) const { return static_cast<double>(lists_.spread[l]) * unit_ * unit_; }

  // The queries' windows over alpha, in units of the bank's pixels: distances are then between these and the bank's.
  void fill_queries() {
    const std::int64_t size = a_.channels * a_.height * a_.width, r = a_.patch_size / 2;
    const Gather gather(a_, lists_, kernel_);
    queries_.resize(static_cast<std::size_t>(std::ssize(pixels_) * dims_ + 16));
    float* x = queries_.data();
    for (const Pixel& q : pixels_) {
      gather.copy(a_.x + q.b * size, a_.x + (q.b + 1) * size, q.place.row - r, q.place.column - r, x);
      const double factor = unit_ / alpha(q.b);
      for (std::int64_t i = 0; i < dims_; ++i, ++x) *x = static_cast<float>(factor * static_cast<double>(*x));
    }
  }
  const float* window(const Pixel& q) const { return queries_.data() + (&q - pixels_.data()) * dims_; }

  // The means of the lists as panels, (blocks, dims)[L].
  void spread_means() {
    const std::int64_t lanes = kernel_.lanes;
    means_ = aligned<float>((lists_.count + lanes - 1) / lanes * lanes * dims_);
    for (std::int64_t l = 0; l < lists_.count; ++l)
      for (std::int64_t i = 0; i < dims_; ++i)
        means_[(l / lanes * dims_ + i) * lanes + l % lanes] = static_cast<float>(unit_ * lists_.mean[l * dims_ + i]);
  }

  // ---- What to expect of a list --------------------------------------------------------------------------------

  // Squared distances of a query window to the windows of a list have the mean D + spread, D being that to the list's
  // mean, and are close to normal, so weights are close to log-normal. This is the mean of log2 w, and its variance if
  // the list's windows spread alike in some directions.
  double expected(const Pixel& q, std::int64_t l, double distance) const { return -q.scale * (distance + spread(l)); }
  double expected_variance(const Pixel& q, std::int64_t l, double distance) const {
    const double v = spread(l), n = std::min<double>(directions, static_cast<double>(dims_));
    return q.scale * q.scale * (4 * distance / std::min<double>(DI, dims_) * v + 2 * v * v / std::min<double>(DI,n));
  }

  // log2 of the mean of w^p over n windows, for normal log2 w. It is carried by windows p standard deviations (in nats)
  // above the mean, or by the furthest of them, at `furthest` standard deviations.
  static double log_moment(double p, double mean, double variance, double n, double furthest) {
    const double sd = std::sqrt(variance) * ln2;
    const double carried = furthest < p * sd ? p * sd * furthest - std::log(n + 1) : p * sd * p * sd / 2;
    return p * mean + carried / ln2;
  }
  static double normal_reach(double n) { return std::sqrt(2 * std::log(n + 1)); }

  // log2 of the mean and the mean square of the weights of those members that were not looked at, and how many standard
  // deviations out the latter lies.
  struct Moments {
    double weight, square, out;
  };
  Moments moments(const Pixel& q, const Entry& e) const {
    const double n = e.looked, distance = static_cast<double>(e.distance);
    double mean = expected(q, e.list, distance), variance = expected_variance(q, e.list, distance);
    if (n > 0) {
      const float* v = sums(q, e);
      const double shift = static_cast<double>(v[2]) / n, seen = static_cast<double>(v[3]) - n * shift * shift;
      mean += n / (n + 2) * shift;
      variance = (prior_members * variance + std::max(0.0, seen)) / (prior_members + n);
    }
    const double left = static_cast<double>(size(e.list)) - n;
    double furthest = normal_reach(left);
    if (n >= 16) {  // the tail may be shorter than a normal one: as far beyond what was seen as a normal one would be
      const double seen = (static_cast<double>(e.top) - mean) / std::sqrt(variance);
      furthest = std::min(furthest, std::max(seen, TR * normal_reach(n)) * normal_reach(left) / normal_reach(n));
    }
    return {log_moment(1, mean, variance, left, furthest), log_moment(2, mean, variance, left, furthest),
            2 * std::sqrt(variance) * ln2};
  }

  const float* sums(const Pixel& q, const Entry& e) const { return q.sums.data() + (&e - q.entries.data()) * n_sums_; }

  // Sum over the members looked at of (w (centre - mean))^2, relative to 2^(2 q.m).
  double seen_scatter(const Pixel& q, const Entry& e) const {
    if (e.m == none) return 0;
    const float* v = sums(q, e);
    double sum = 0;
    for (std::int64_t c = 0; c < a_.channels; ++c) {
      const double mean = q.y[c] / q.s;
      sum += v[6 + 3 * c] - 2 * mean * v[5 + 3 * c] + mean * mean * v[1];
    }
    return std::max(sum, 0.0) * std::exp2(2 * (static_cast<double>(e.m) - q.m));
  }

  // Mean square of w (centre - mean) over the members of a list, relative to 2^(2 q.m): as seen, unless it is carried by
  // members further out than those that were looked at are likely to be.
  double scatter(const Pixel& q, const Entry& e) const {
    const Moments model = moments(q, e);
    double deviation = (1e-4 + static_cast<double>(lists_.centre_spread[e.list])) * unit_ * unit_;
    for (std::int64_t c = 0; c < a_.channels; ++c) deviation += std::pow(list_centre(e.list, c) - q.y[c] / q.s, 2);
    const double predicted = std::exp2(std::min(1000.0, model.square - 2 * q.m)) * deviation, n = e.looked;
    if (n == 0) return predicted;
    const double seen = seen_scatter(q, e);
    if (model.out < std::sqrt(2 * std::log(n))) return (seen + prior_members * predicted) / (n + prior_members);
    return std::max(seen / n, predicted);
  }

  // ---- Rounds ---------------------------------------------------------------------------------------------------

  // Decides what every pixel looks at next; false when all are done.
  bool next_round(int round) {
    if (std::getenv("PYELS_DEBUG")) {
      static auto T0 = std::chrono::steady_clock::now();
      auto t = std::chrono::steady_clock::now();
      double looked = 0, cells = 0, entries = 0; int active = 0, hard = 0;
      for (auto& q : pixels_) { active += !q.done; hard += q.hard && !q.done; entries += q.entries.size(); for (auto& e : q.entries) looked += e.looked, cells += e.looked > 0; }
      std::fprintf(stderr, "round %d %.3f s, active %d hard %d looked/px %.3g lists/px %.3g entries/px %.3g gathered %.3g\n", round, std::chrono::duration<double>(t - T0).count(), active, hard, looked / pixels_.size(), cells / pixels_.size(), entries / pixels_.size(), (double)gathered_);
      T0 = t;
    }
    in_threads(a_.threads, std::ssize(pixels_), a_.interrupted, [&](auto take) {
      std::vector<float> distances(static_cast<std::size_t>(lists_.count + kernel_.lanes));
      Options options;
      take([&](std::int64_t i, auto) {
        Pixel& q = pixels_[static_cast<std::size_t>(i)];
        if (q.done || exact_[static_cast<std::size_t>(q.b - b0_)]) return;
        if (round == 0)
          begin(q, distances);
        else if (estimate(q) <= tolerance_)
          q.done = true;
        if (!q.done && !q.beyond) allocate(q, round, options);
      });
    });
    bool more = false;
    const std::int64_t n = pixels_of_a_query();
    for (std::size_t i = 0; i < exact_.size(); ++i) {
      const auto first = pixels_.begin() + static_cast<std::ptrdiff_t>(i) * n, last = first + n;
      const auto hard = std::count_if(first, last, [](const Pixel& q) { return !q.done && q.hard; });
      if (static_cast<double>(hard) > most_of_pixels * static_cast<double>(n)) exact_[i] = true;
      if (std::any_of(first, last, [](const Pixel& q) { return q.beyond; })) exact_[i] = true;
      if (exact_[i]) continue;
      share(first, last);
      more = more || std::any_of(first, last, [](const Pixel& q) { return !q.done; });
    }
    return more;
  }

  // Finds the lists that matter to a pixel, and makes a first estimate of them.
  void begin(Pixel& q, std::vector<float>& distances) {
    const std::int64_t lanes = kernel_.lanes;
    for (std::int64_t l = 0; l < lists_.count; l += lanes)
      kernel_.list_distances(means_.get() + l * dims_, window(q), dims_, distances.data() + l);
    const auto distance = [&](std::int64_t l) { return static_cast<double>(distances[static_cast<std::size_t>(l)]); };
    const double nearest = static_cast<double>(*std::min_element(distances.begin(), distances.begin() + lists_.count));
    q.beyond = q.scale * nearest * ln2 > most_nats;
    if (q.beyond) return;
    const auto weight = [&](std::int64_t l) {
      return log_moment(1, expected(q, l, distance(l)), expected_variance(q, l, distance(l)),
                        static_cast<double>(size(l)), normal_reach(static_cast<double>(size(l))));
    };
    // There is at least so much: the mean of weights is above the weight of the mean.
    double least = -std::numeric_limits<double>::infinity(), most = least;
    std::vector<double> weights(static_cast<std::size_t>(lists_.count));
    for (std::int64_t l = 0; l < lists_.count; ++l)
      if (size(l) > 0) {
        most = std::max(most, weights[l] = weight(l));
        least = std::max(least, expected(q, l, distance(l)) + std::log2(static_cast<double>(size(l))));
      }
    q.m = most, q.s = 0, q.tail = 0;
    q.y.assign(static_cast<std::size_t>(a_.channels), 0.0), q.sy = q.yy = q.y;
    for (std::int64_t l = 0; l < lists_.count; ++l) {
      if (size(l) == 0) continue;
      const double w = std::exp2(weights[l] - most) * static_cast<double>(size(l));
      q.s += w;
      for (std::int64_t c = 0; c < a_.channels; ++c) q.y[c] += w * list_centre(l, c);
      const double farthest = bound(q, l, distance(l));
      if (weights[l] + std::log2(static_cast<double>(size(l))) <= least - reach)
        q.out_of_reach = log2_sum(q.out_of_reach, farthest + std::log2(static_cast<double>(size(l))));
      else
        q.entries.push_back({.list = static_cast<std::int32_t>(l), .distance = static_cast<float>(distance(l))});
    }
    q.sums.assign(q.entries.size() * static_cast<std::size_t>(n_sums_), 0.0f);
  }

  struct Options {
    std::vector<double> size, looked, scatter;
    std::vector<Entry*> entry;
  };

  // How many members of each list to look at next.
  void allocate(Pixel& q, int round, Options& t) {
    t.size.clear(), t.looked.clear(), t.scatter.clear(), t.entry.clear();
    double spent = 0, weight = 0;
    for (Entry& e : q.entries) {
      spent += e.looked;
      e.wanted = e.looked;
      const auto n = static_cast<double>(size(e.list));
      if (e.looked == size(e.list)) continue;
      const double square = scatter(q, e) / (q.s * q.s);
      if (square * n < 1e-14) continue;
      t.entry.push_back(&e), t.size.push_back(n), t.looked.push_back(e.looked), t.scatter.push_back(std::sqrt(square));
      weight += n * t.scatter.back();
    }
    // n_l = rate * N_l * scatter_l: the least rate that brings the variance down to the target, within the budget.
    const double budget = growth * spent + first_round;
    const double target = 0.5 / (1 + round) * std::pow(tolerance_ * unit_ / interval, 2);
    double low = 1e-3 * first_round / weight, high = 1e3 * windows_ / weight, cost = 0;
    for (int step = 0; step < 20; ++step) {
      const double rate = std::sqrt(low * high);
      double variance = 0;
      cost = 0;
      for (std::size_t i = 0; i < t.entry.size(); ++i) {
        const double n = t.size[i], members = std::clamp(rate * n * t.scatter[i], std::max(t.looked[i], 1.0), n);
        cost += members - t.looked[i];
        variance += t.scatter[i] * t.scatter[i] * n * (n / members - 1);
      }
      (cost > budget || variance < target ? high : low) = rate;
    }
    q.hard = spent + cost > most_of_windows * windows_;
    const std::int64_t lanes = kernel_.lanes;
    std::int64_t added = 0;
    for (double least = 0.25; added == 0 && !t.entry.empty(); high *= 4)
      for (std::size_t i = 0; i < t.entry.size(); ++i) {
        const double members = std::min(high * t.size[i] * t.scatter[i], t.size[i]);
        if (members < least) continue;
        Entry& e = *t.entry[i];
        const auto whole = static_cast<std::int64_t>(std::ceil(members / static_cast<double>(lanes))) * lanes;
        e.wanted = std::max(e.looked, static_cast<std::int32_t>(std::min(size(e.list), whole)));
        added += e.wanted - e.looked;
      }
    if (added == 0) q.done = true;  // nothing is left that could change the estimate
  }

  // Gathering a window costs as much as many pairs: of what one pixel of a query wants of a list, another that wants
  // less looks at up to `generous` times its own.
  template <class Iterator>
  void share(Iterator first, Iterator last) const {
    std::vector<std::int32_t> most(static_cast<std::size_t>(lists_.count), 0);
    for (auto q = first; q != last; ++q)
      for (const Entry& e : q->entries)
        if (!q->done) most[static_cast<std::size_t>(e.list)] = std::max(most[static_cast<std::size_t>(e.list)], e.wanted);
    for (auto q = first; q != last; ++q)
      for (Entry& e : q->entries)
        if (!q->done && e.wanted > e.looked)
          e.wanted = std::max(e.wanted, std::min(generous * e.wanted, most[static_cast<std::size_t>(e.list)]));
  }

  // Evaluates the members that are wanted and were not looked at yet, list by list.
  void look() {
    struct Visit {
      Pixel* pixel;
      Entry* entry;
    };
    std::vector<std::int64_t> begin(static_cast<std::size_t>(lists_.count + 1), 0);
    const auto each = [&](auto visit) {
      for (Pixel& q : pixels_) {
        if (q.done || exact_[static_cast<std::size_t>(q.b - b0_)]) continue;
        for (Entry& e : q.entries)
          if (e.wanted > e.looked) visit(q, e);
      }
    };
    each([&](Pixel&, Entry& e) { ++begin[static_cast<std::size_t>(e.list + 1)]; });
    std::partial_sum(begin.begin(), begin.end(), begin.begin());
    std::vector<Visit> visits(static_cast<std::size_t>(begin.back()));
    std::vector<std::int64_t> at(begin.begin(), begin.end() - 1);
    each([&](Pixel& q, Entry& e) {
      visits[static_cast<std::size_t>(at[static_cast<std::size_t>(e.list)]++)] = {&q, &e};
    });

    std::vector<std::int64_t> centres;
    for (std::int64_t c = 0; c < a_.channels; ++c) centres.push_back(centre(c));
    in_threads(a_.threads, lists_.count, a_.interrupted, [&](auto take) {
      Gather gather(a_, lists_, kernel_);
      const std::int64_t step = list_blocks * kernel_.lanes;
      const auto panel = aligned<float>(step * dims_);
      std::vector<ListQuery> queries;
      take([&](std::int64_t l, auto stop) {
        const auto first = visits.begin() + begin[static_cast<std::size_t>(l)];
        const auto last = visits.begin() + begin[static_cast<std::size_t>(l + 1)];
        std::int64_t from = size(l), to = 0;
        for (auto v = first; v != last; ++v)
          from = std::min<std::int64_t>(from, v->entry->looked), to = std::max<std::int64_t>(to, v->entry->wanted);
        for (from = from / step * step; from < to; from += step) {
          if (stop()) return;
          queries.clear();
          std::int64_t until = from;
          for (auto v = first; v != last; ++v) {
            Entry& e = *v->entry;
            const std::int64_t own_from = std::max<std::int64_t>(e.looked, from);
            const std::int64_t own_to = std::min<std::int64_t>(e.wanted, from + step);
            if (own_from >= own_to) continue;
            until = std::max(until, own_to);
            const Pixel& q = *v->pixel;
            queries.push_back({.x = window(q), .first = static_cast<std::int32_t>(own_from - from),
                               .last = static_cast<std::int32_t>(own_to - from),
                               .scale = static_cast<float>(q.scale),
                               .expected = static_cast<float>(expected(q, l, static_cast<double>(e.distance))),
                               .m = &e.m, .sums = const_cast<float*>(sums(q, e)), .top = &e.top, .top_member = &e.top_member});
          }
          if (queries.empty()) continue;
          gathered_ += until - from;
          gather.panel(lists_.begin[l] + from, lists_.begin[l] + until, panel.get());
          kernel_.weigh_list({.panel = panel.get(), .dims = dims_, .channels = a_.channels, .centres = centres.data(),
                              .first_member = from, .full = a_.full, .queries = queries.data(),
                              .n_queries = std::ssize(queries)});
        }
        for (auto v = first; v != last; ++v) v->entry->looked = v->entry->wanted;
      });
    });
  }

  // Joins the lists of a pixel, and returns the error of its mean.
  double estimate(Pixel& q) const {
    const auto channels = static_cast<std::size_t>(a_.channels);
    q.m = none;
    for (const Entry& e : q.entries) q.m = std::max(q.m, static_cast<double>(e.m));
    q.s = q.ss = q.tail = q.seen = 0;
    q.left = std::exp2(std::min(1000.0, q.out_of_reach - q.m));
    q.y.assign(channels, 0.0), q.sy.assign(channels, 0.0), q.yy.assign(channels, 0.0);
    for (const Entry& e : q.entries) {
      const double N = static_cast<double>(size(e.list)), n = e.looked;
      if (n < N) q.left += (N - n) * std::exp2(std::min(1000.0, bound(q, e.list, static_cast<double>(e.distance)) - q.m));
      if (n == 0) q.tail += N * std::exp2(moments(q, e).weight - q.m);
      if (e.m == none) continue;
      const float* v = sums(q, e);
      const double w = std::exp2(static_cast<double>(e.m) - q.m), s = w * static_cast<double>(v[0]), share = N / n;
      q.seen += s, q.s += share * s;
      const double factor = n == N || n < 2 ? 0.0 : N * (N - n) / (n * (n - 1));
      q.ss += factor * (w * w * static_cast<double>(v[1]) - s * s / n);
      for (std::size_t c = 0; c < channels; ++c) {
        const double y = w * static_cast<double>(v[4 + 3 * c]);
        q.y[c] += share * y;
        q.sy[c] += factor * (w * w * static_cast<double>(v[5 + 3 * c]) - s * y / n);
        q.yy[c] += factor * (w * w * static_cast<double>(v[6 + 3 * c]) - y * y / n);
      }
    }
    // Where what was seen of a list says less of its scatter than is to be expected, the variance of y makes up for it.
    double excess = 0;
    for (const Entry& e : q.entries) {
      const double N = static_cast<double>(size(e.list)), n = e.looked;
      if (n > 0 && n < N) excess += N * (N - n) / n * std::max(0.0, scatter(q, e) - seen_scatter(q, e) / n);
    }
    for (double& yy : q.yy) yy += excess / static_cast<double>(channels);
    return error(q);
  }

  static double log2_sum(double a, double b) {
    return std::max(a, b) + std::log2(1 + std::exp2(-std::abs(a - b)));
  }

  // log2 of the largest weight that a member of a list can have: the triangle inequality.
  double bound(const Pixel& q, std::int64_t l, double distance) const {
    const double apart = std::sqrt(distance) * (1 - 1e-5) - static_cast<double>(lists_.radius[l]) * unit_;
    return apart > 0 ? -q.scale * apart * apart : 0.0;
  }

  // Of the mean, in [-1, 1].
  double error(const Pixel& q) const {
    double largest = 0;
    for (std::int64_t c = 0; c < a_.channels; ++c) {
      const double mean = q.y[c] / q.s;
      largest = std::max(largest, q.yy[c] - 2 * mean * q.sy[c] + mean * mean * q.ss);
    }
    const double estimated = interval * std::sqrt(largest) / q.s / unit_ + 2 * q.tail / (q.s + q.tail);
    const double ratio = q.left / q.seen;
    return std::min(estimated, 2 * ratio / (1 + ratio));
  }

  void put(const Pixel& q, Partial& out) const {
    const std::int64_t p = q.place.row * a_.width + q.place.column;
    out.m[p] = q.m * ln2, out.s[p] = q.s;
    out.ss[p] = q.ss, out.tail[p] = q.tail, out.seen[p] = q.seen, out.left[p] = q.left;
    for (std::int64_t c = 0; c < a_.channels; ++c) {
      const std::int64_t i = c * out.pixels + p;
      out.y[i] = q.y[c] / unit_, out.sy[i] = q.sy[c] / unit_, out.yy[i] = q.yy[c] / (unit_ * unit_);
    }
    if (!a_.full) return;
    out.e[p] = 0, out.top[p] = -std::numeric_limits<double>::infinity(), out.source[p] = -1;
    for (const Entry& e : q.entries) {
      if (e.m == none) continue;
      const float* v = sums(q, e);
      const double down = static_cast<double>(e.m) - q.m, share = static_cast<double>(size(e.list)) / e.looked;
      out.e[p] += share * std::exp2(down) * (static_cast<double>(v[n_sums_ - 1]) + static_cast<double>(v[0]) * down) * ln2;
      const std::int64_t member = lists_.begin[e.list] + e.top_member;
      const std::int64_t source = std::int64_t{lists_.image[member]} * out.pixels + lists_.place[member];
      const double top = static_cast<double>(e.top) * ln2;
      if (top > out.top[p] || (top == out.top[p] && source < out.source[p])) out.top[p] = top, out.source[p] = source;
    }
  }

  const Problem& a_;
  const Lists& lists_;
  const Kernel& kernel_;
  const std::vector<Place> places_;
  const std::int64_t n_sums_, dims_;
  const double unit_, tolerance_, windows_;
  Aligned<float> means_;
  std::int64_t b0_ = 0;
  std::vector<Pixel> pixels_;
  std::vector<float> queries_;  // (pixels, dims)
  std::vector<char> exact_;     // (queries)
  std::atomic<std::int64_t> gathered_{0};
};

// The problem of query b alone.
Problem only(const Problem& a, std::int64_t b) {
  Problem one = a;
  one.queries = 1;
  one.x += b * a.channels * a.height * a.width;
  one.alpha += b, one.sigma += b, one.begin += b, one.end += b;
  return one;
}

struct Into : Sink {
  Partial& to;
  explicit Into(Partial& partial) : to(partial) {}
  void take(std::int64_t, const Partial& from) override { merge(to, from); }
};

}  // namespace

void list_statistics(const Problem& a, const Lists& lists, float* mean, float* spread, float* centre_spread,
                     float* radius) {
  const Kernel& kernel = kernel_in_use();
  in_threads(a.threads, lists.count, a.interrupted, [&](auto take) {
    const Gather gather(a, lists, kernel);
    const std::int64_t dims = gather.dims(), k = a.patch_size;
    std::vector<double> sum(static_cast<std::size_t>(dims));
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(dims + 16));
    std::vector<float> window(static_cast<std::size_t>(dims + 16));
    const auto read = [&](std::int64_t member) {
      if (!a.pixels_uint8) return gather.window(a.pixels_float, member, window.data());
      gather.window(a.pixels_uint8, member, bytes.data());
      for (std::int64_t i = 0; i < dims; ++i) window[i] = static_cast<float>(bytes[i] / 127.5 - 1.0);
    };
    take([&](std::int64_t l, auto stop) {
      const std::int64_t begin = lists.begin[l], end = lists.begin[l + 1];
      float* own = mean + l * dims;
      std::fill(sum.begin(), sum.end(), 0.0);
      for (std::int64_t i = begin; i < end; ++i) {
        if (i % 1024 == 0 && stop()) return;
        read(i);
        for (std::int64_t j = 0; j < dims; ++j) sum[j] += static_cast<double>(window[j]);
      }
      for (std::int64_t j = 0; j < dims; ++j)
        own[j] = begin < end ? static_cast<float>(sum[j] / static_cast<double>(end - begin)) : 0.0f;
      double total = 0, centres = 0, largest = 0;
      for (std::int64_t i = begin; i < end; ++i) {
        if (i % 1024 == 0 && stop()) return;
        read(i);
        float apart = 0;
        for (std::int64_t j = 0; j < dims; ++j) apart += (window[j] - own[j]) * (window[j] - own[j]);
        for (std::int64_t c = 0; c < a.channels; ++c) {
          const std::int64_t j = (c * k + k / 2) * k + k / 2;
          centres += static_cast<double>((window[j] - own[j]) * (window[j] - own[j]));
        }
        total += static_cast<double>(apart), largest = std::max(largest, static_cast<double>(apart));
      }
      const auto n = static_cast<double>(std::max<std::int64_t>(1, end - begin));
      spread[l] = static_cast<float>(total / n), centre_spread[l] = static_cast<float>(centres / n);
      radius[l] = static_cast<float>(std::sqrt(largest) * (1 + 1e-5));
    });
  });
}

void lists_engine(const Problem& a, const Lists& lists, double tolerance, Sink& sink) {
  Search search(a, lists, tolerance);
  const std::int64_t group = std::max<std::int64_t>(1, pixels_together / std::max<std::int64_t>(1, search.pixels_of_a_query()));
  for (std::int64_t b0 = 0; b0 < a.queries; b0 += group) {
    const std::int64_t b1 = std::min(a.queries, b0 + group);
    search.run(b0, b1);
    for (std::int64_t b = b0; b < b1; ++b) {
      Partial total(a.height * a.width, a.channels, a.full, true);
      Into into(total);
      Problem exact = only(a, b);
      exact.rim = search.put(b, total);
      if (!exact.rim || search.pixels_of_a_query() < a.height * a.width) cpu_engine(exact, into);
      sink.take(b, total);
    }
  }
}

}  // namespace pyels
