// The approximate engine: importance sampling of the windows of a bank.
//
// An index keeps the windows in lists of similar ones, with short descriptions (coordinates along principal
// directions). From a query's distance to the means of lists follows which of them can matter; from the descriptions in
// these, about how much each window weighs. Every window is then picked with a probability pi that grows with this, or surely, and
// the exact weights w of those picked, each divided by its pi, sum up to estimates of sum w and sum w * centre (Horvitz
// and Thompson), with known variance. More are picked until the error of the mean is below the tolerance.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "kernel.h"
#include "pyels.h"
#include "work.h"

namespace pyels {
namespace {

constexpr double ln2 = 0.693147180559945309417232121458;
constexpr double nothing = -std::numeric_limits<double>::infinity();

// Gathers windows into panels.
class Gather {
 public:
  Gather(const Problem& a, const Lists& lists, const Kernel& kernel)
      : a_(a), lists_(lists), kernel_(kernel), k_(a.patch_size), r_(a.patch_size / 2), dims_(a.channels * k_ * k_) {
    const std::int64_t bytes = dims_ * kernel.lanes * (a.pixels_uint8 ? 1 : 4);
    windows_ = aligned<std::uint8_t>(bytes + 64);  // transposing may read beyond the last
  }

  // The panel (dims)[L] of up to L members; lanes without one repeat the last.
  void panel(const std::int64_t* members, std::int64_t count, float* to) {
    if (a_.pixels_uint8)
      block(a_.pixels_uint8, reinterpret_cast<std::uint8_t*>(windows_.get()), kernel_.spread_uint8, members, count, to);
    else
      block(a_.pixels_float, reinterpret_cast<float*>(windows_.get()), kernel_.spread_float, members, count, to);
  }

  void prefetch(std::int64_t member) const {
    a_.pixels_uint8 ? prefetch(a_.pixels_uint8, member) : prefetch(a_.pixels_float, member);
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
  void block(const Pixel* pixels, Pixel* windows, Spread spread, const std::int64_t* members, std::int64_t count,
             float* to) {
    const Pixel* rows[64];
    for (std::int64_t lane = 0; lane < kernel_.lanes; ++lane) {
      Pixel* at = windows + std::min(lane, count - 1) * dims_;
      rows[lane] = at;
      if (lane < count) window(pixels, members[lane], at);
    }
    spread(rows, dims_, to);
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

constexpr double first_picks = 2000;  // windows that are weighed for a pixel in the first round
constexpr double growth = 8;          // of their number, from round to round at most
// The model of a list: its windows spread alike in so many directions. Lists whose weights it predicts to be less than
// 2^-reach of the whole are never looked at.
constexpr double directions = 32, reach = 20;
// Then so many windows, a part of every list, are weighed by description, and lists that together seem to hold no more
// than `left_out` of the weight are left out, but for the nearest: these may hold a window that outweighs all others.
constexpr double pilot_members = 1e5, left_out = 1e-5;
constexpr std::ptrdiff_t nearest_lists = 32;
// Where the weight is spread over many windows, a part of every list will do that has so many times more effective
// windows than are picked.
constexpr double spare = 10;
// Windows are picked in proportion to (weight by description) ^ tempering, where what the description leaves counts by
// `beta` only: those that weigh more than their description says must not be missed.
constexpr double tempering = 0.75, beta = 0.2;
// The error grows by few / n where the variance is that of n equal contributions.
constexpr double few = 3;
// A pixel is hard when to look on costs more than a third of what looking at all windows would: weighing a window that
// was picked costs as much as about 300 pairs of the exact engine, weighing one by description about one. An image with
// more than a quarter of its pixels hard is left to the exact engine.
constexpr double pick_cost = 300, most_of_windows = 1.0 / 3, most_of_pixels = 1.0 / 4;
// Beyond so many nats float32 distances spoil the weights.
constexpr double most_nats = 3000;
// So many query pixels share what is read of the lists.
constexpr std::int64_t pixels_together = 4096;

// What a query pixel knows of a list.
struct Entry {
  std::int32_t list;
  float distance;      // squared, of its mean
  float top = -1e30f;  // log2 of the largest weight by description
  double sum = 0, squares = 0;  // of weights by description and of their squares, relative to 2^top
};

struct Pixel {
  std::int64_t b;  // query
  Place place;
  double scale;  // log2 w = -scale * squared distance, in units of the bank's pixels
  bool done = false, hard = false, beyond = false;  // hard, beyond: the exact engine would be better; is needed
  std::vector<Entry> entries{};
  std::vector<std::int16_t> z{};
  ScanQuery scan{};
  double members = 0, pilot = 0, fraction = 1, picks = 0, log_total = nothing, dropped = 0;
  // The estimate, relative to 2^m.
  double m = 0, s = 0, ss = 0, fourth = 0, error = 0;  // fourth: sum of squares of what ss is the sum of
  std::vector<double> y{}, sy{}, yy{};  // (C)
  double e = 0, top = nothing;
  std::int64_t source = -1;
};

class Search {
 public:
  Search(const Problem& a, const Lists& lists, double tolerance)
      : a_(a),
        lists_(lists),
        kernel_(kernel_in_use()),
        places_(listed_pixels(a)),
        dims_(a.channels * a.patch_size * a.patch_size),
        unit_(a.pixels_uint8 ? 127.5 : 1.0),
        tolerance_(tolerance) {
    for (std::int64_t l = 0; l < lists.count; ++l) windows_ += static_cast<double>(size(l));
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
    each_pixel([&](Pixel& q, auto& distances) { begin(q, distances); },
               [&] { return std::vector<float>(static_cast<std::size_t>(lists_.count + kernel_.lanes)); });
    settle();
    weigh_lists();
    do {
      pick();
      evaluate();
    } while (settle());
  }

  // Fills `out` where the listed pixels of query b are; false when the exact engine is to be used.
  bool put(std::int64_t b, Partial& out) const {
    if (exact_[static_cast<std::size_t>(b - b0_)]) return false;
    for (const Pixel& q : pixels_)
      if (q.b == b) put(q, out);
    return true;
  }

 private:
  std::int64_t size(std::int64_t l) const { return lists_.end[l] - lists_.begin[l]; }
  double alpha(std::int64_t b) const { return std::max(a_.alpha[b], 1e-9); }  // at 0, x / alpha would be infinite
  double scale(std::int64_t b) const {
    const double ratio = alpha(b) / (a_.sigma[b] * unit_);
    return 0.5 * ratio * ratio / ln2;
  }
  std::int64_t centre(std::int64_t c) const {
    return (c * a_.patch_size + a_.patch_size / 2) * a_.patch_size + a_.patch_size / 2;
  }
  bool active(const Pixel& q) const { return !q.done && !exact_[static_cast<std::size_t>(q.b - b0_)]; }

  template <class Work, class Make>
  void each_pixel(Work work, Make make) {
    in_threads(a_.threads, std::ssize(pixels_), a_.interrupted, [&](auto take) {
      auto own = make();
      take([&](std::int64_t i, auto) {
        Pixel& q = pixels_[static_cast<std::size_t>(i)];
        if (active(q)) work(q, own);
      });
    });
  }

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

  // ---- Which lists can matter -----------------------------------------------------------------------------------

  // Squared distances of a query window to the windows of a list have the mean D + spread, D being that to the list's
  // mean, and are close to normal, so weights are close to log-normal.
  double expected(const Pixel& q, std::int64_t l, double distance) const {
    return -q.scale * (distance + static_cast<double>(lists_.spread[l]) * unit_ * unit_);
  }
  // log2 of the sum of weights, carried by windows as many standard deviations (in nats) above the mean as there are
  // nats in one, or by the furthest that there are likely to be.
  double predicted(const Pixel& q, std::int64_t l, double distance) const {
    const double v = static_cast<double>(lists_.spread[l]) * unit_ * unit_;
    const double n = std::min(directions, static_cast<double>(dims_));
    const double sd = q.scale * ln2 * std::sqrt(4 * distance / static_cast<double>(dims_) * v + 2 * v * v / n);
    const double log_n = std::log(static_cast<double>(size(l))), furthest = std::sqrt(2 * log_n);
    return expected(q, l, distance) + (furthest < sd ? sd * furthest : sd * sd / 2 + log_n) / ln2;
  }

  void begin(Pixel& q, std::vector<float>& distances) {
    const std::int64_t lanes = kernel_.lanes;
    for (std::int64_t l = 0; l < lists_.count; l += lanes)
      kernel_.window_distances(means_.get() + l * dims_, window(q), dims_, distances.data() + l);
    const auto distance = [&](std::int64_t l) { return static_cast<double>(distances[static_cast<std::size_t>(l)]); };
    const double nearest = static_cast<double>(*std::min_element(distances.begin(), distances.begin() + lists_.count));
    q.beyond = q.scale * nearest * ln2 > most_nats;
    if (q.beyond) return;
    // There is at least so much: the mean of weights is above the weight of the mean.
    double least = nothing;
    for (std::int64_t l = 0; l < lists_.count; ++l)
      if (size(l) > 0) least = std::max(least, expected(q, l, distance(l)) + std::log2(static_cast<double>(size(l))));
    for (std::int64_t l = 0; l < lists_.count; ++l)
      if (size(l) > 0 && predicted(q, l, distance(l)) > least - reach) {
        q.entries.push_back({.list = static_cast<std::int32_t>(l), .distance = distances[static_cast<std::size_t>(l)]});
        q.members += static_cast<double>(size(l));
      }
    q.picks = first_picks;
    q.pilot = std::min(1.0, pilot_members / q.members);
    describe(q);
  }

  // The query along the principal directions.
  void describe(Pixel& q) {
    const std::int64_t n = lists_.directions_count;
    std::vector<double> z(static_cast<std::size_t>(n));
    double largest = 1e-30, length = 0;
    const float* x = window(q);
    for (std::int64_t i = 0; i < n; ++i) {
      const float* direction = lists_.directions + i * dims_;
      for (std::int64_t j = 0; j < dims_; ++j)
        z[static_cast<std::size_t>(i)] += static_cast<double>(direction[j]) *
                                          (static_cast<double>(x[j]) - unit_ * static_cast<double>(lists_.origin[j]));
      largest = std::max(largest, std::abs(z[static_cast<std::size_t>(i)]));
      length += z[static_cast<std::size_t>(i)] * z[static_cast<std::size_t>(i)];
    }
    const double step = largest / 16000;
    for (double value : z) q.z.push_back(static_cast<std::int16_t>(std::lround(value / step)));
    ScanQuery& s = q.scan;
    s.z = q.z.data();
    s.base = static_cast<float>(-tempering * q.scale * length);
    s.norm_scale = static_cast<float>(tempering * q.scale * unit_ * unit_);
    s.rest_scale = static_cast<float>(tempering * beta * q.scale * unit_ * unit_);
    s.dot_scale = static_cast<float>(tempering * 2 * q.scale * step * static_cast<double>(lists_.step) * unit_);
    s.seed = seed(q);
  }

  // From the query's own pixels, so that others do not matter to it.
  std::uint32_t seed(const Pixel& q) const {
    std::uint32_t hash = 2166136261u;
    const auto* bytes = reinterpret_cast<const unsigned char*>(window(q));
    for (std::int64_t i = 0; i < dims_ * 4; ++i) hash = (hash ^ bytes[i]) * 16777619u;
    return hash;
  }

  // ---- Rounds over lists ----------------------------------------------------------------------------------------

  struct Visit {
    std::int32_t pixel, entry;
  };

  // look(own, visit, task) for all active pixels that have an entry of a list: part by part of its members, so that a
  // part stays in the cache while it is looked at. own = make() for each thread.
  template <class Look, class Make>
  void each_list(double Pixel::*part_of, Look look, Make make) {
    std::vector<std::int64_t> first(static_cast<std::size_t>(lists_.count + 1), 0);
    for (const Pixel& q : pixels_)
      if (active(q))
        for (const Entry& e : q.entries) ++first[static_cast<std::size_t>(e.list + 1)];
    std::partial_sum(first.begin(), first.end(), first.begin());
    std::vector<Visit> visits(static_cast<std::size_t>(first.back()));
    std::vector<std::int64_t> at(first.begin(), first.end() - 1);
    for (std::size_t i = 0; i < pixels_.size(); ++i)
      if (active(pixels_[i]))
        for (std::size_t j = 0; j < pixels_[i].entries.size(); ++j)
          visits[static_cast<std::size_t>(at[static_cast<std::size_t>(pixels_[i].entries[j].list)]++)] = {
              static_cast<std::int32_t>(i), static_cast<std::int32_t>(j)};
    in_threads(a_.threads, lists_.count, a_.interrupted, [&](auto take) {
      auto own = make();
      take([&](std::int64_t l, auto stop) {
        constexpr std::int64_t part = 64 * list_block;
        for (std::int64_t from = 0; from < size(l); from += part)
          for (std::int64_t v = first[static_cast<std::size_t>(l)]; v < first[static_cast<std::size_t>(l + 1)]; ++v) {
            if (stop()) return;
            const Visit& visit = visits[static_cast<std::size_t>(v)];
            const Pixel& q = pixels_[static_cast<std::size_t>(visit.pixel)];
            const std::int64_t to = std::min(members(l, q.*part_of), from + part);
            if (from < to) look(own, visit, task(l, from, to));
          }
      });
    });
  }

  // How many members of a list a pixel looks at: whole blocks, or all.
  std::int64_t members(std::int64_t l, double part) const {
    const double wanted = std::ceil(part * static_cast<double>(size(l)) / list_block) * list_block;
    return std::min(size(l), static_cast<std::int64_t>(wanted));
  }

  ScanTask task(std::int64_t l, std::int64_t from, std::int64_t to) const {
    const std::int64_t first = lists_.begin[l] + from;
    return {.code = lists_.code + first * lists_.directions_count,
            .norm = lists_.norm + first,
            .rest = lists_.rest + first,
            .directions = lists_.directions_count,
            .members = to - from,
            .first = static_cast<std::uint32_t>(first)};
  }

  // Sums the weights by description of a part of every list: what it takes to pick about so many windows.
  void weigh_lists() {
    each_list(
        &Pixel::pilot, [&](int&, const Visit& visit, const ScanTask& t) {
      Pixel& q = pixels_[static_cast<std::size_t>(visit.pixel)];
      Entry& e = q.entries[static_cast<std::size_t>(visit.entry)];
      ScanQuery scan = q.scan;
      scan.top = e.top, scan.sum = e.sum, scan.squares = e.squares;
      kernel_.scan_sum(t, scan);
      e.top = scan.top, e.sum = scan.sum, e.squares = scan.squares;
    }, [] { return 0; });
    each_pixel([&](Pixel& q, std::vector<double>& shares) { keep(q, shares); }, [] { return std::vector<double>(); });
  }

  // Leaves out the lists that together hold less than `left_out` of the weight, and decides how many members of the
  // others are needed where the weight is spread over many.
  void keep(Pixel& q, std::vector<double>& shares) {
    double top = nothing, total = 0, squares = 0;
    for (const Entry& e : q.entries) top = std::max(top, static_cast<double>(e.top));
    shares.clear();
    for (const Entry& e : q.entries) {
      const double scale = std::exp2(static_cast<double>(e.top) - top);
      const double each = static_cast<double>(size(e.list)) / static_cast<double>(members(e.list, q.pilot));
      shares.push_back(each * e.sum * scale);
      total += shares.back(), squares += each * e.squares * scale * scale;
    }
    std::vector<float> near;  // what lies nearest may hold a window that outweighs all that was looked at
    for (const Entry& e : q.entries) near.push_back(e.distance);
    const auto nth = near.begin() + std::min<std::ptrdiff_t>(nearest_lists, std::ssize(near) - 1);
    std::nth_element(near.begin(), nth, near.end());
    std::vector<std::size_t> order(shares.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return shares[a] < shares[b]; });
    double dropped = 0;
    std::vector<Entry> kept;
    q.members = 0;
    for (std::size_t i : order) {
      if (q.entries[i].distance > *nth && dropped + shares[i] < left_out * total) {
        dropped += shares[i];
      } else {
        kept.push_back(q.entries[i]);
        q.members += static_cast<double>(size(kept.back().list));
      }
    }
    std::sort(kept.begin(), kept.end(), [](const Entry& a, const Entry& b) { return a.list < b.list; });
    q.entries = std::move(kept);
    q.dropped = dropped / total;
    q.log_total = top + std::log2(total - dropped);
    q.fraction = std::clamp(spare * q.picks * squares / (total * total), 0.0, 1.0);
  }

  void pick() {
    for (Pixel& q : pixels_) q.scan.rate = static_cast<float>(std::log2(q.picks / q.fraction) - q.log_total);
    std::mutex mutex;
    std::vector<std::vector<Pick>> parts;
    struct Own {
      std::vector<Pick> buffer = std::vector<Pick>(64 * list_block), picks{};
      std::mutex& mutex;
      std::vector<std::vector<Pick>>& parts;
      ~Own() {
        const std::lock_guard<std::mutex> lock(mutex);
        parts.push_back(std::move(picks));
      }
    };
    each_list(
        &Pixel::fraction, [&](Own& own, const Visit& visit, const ScanTask& t) {
      const Pixel& q = pixels_[static_cast<std::size_t>(visit.pixel)];
      const std::int64_t n = kernel_.scan_pick(t, q.scan, visit.pixel, own.buffer.data());
      const std::int64_t l = q.entries[static_cast<std::size_t>(visit.entry)].list;
      const auto looked_at =
          static_cast<float>(static_cast<double>(members(l, q.fraction)) / static_cast<double>(size(l)));
      for (std::int64_t i = 0; i < n; ++i) {
        Pick p = own.buffer[static_cast<std::size_t>(i)];
        p.member += static_cast<std::int32_t>(t.first), p.probability *= looked_at;
        own.picks.push_back(p);
      }
    }, [&] { return Own{.mutex = mutex, .parts = parts}; });
    // By pixel, and for each in the order of members, whichever thread found them.
    first_.assign(pixels_.size() + 1, 0);
    for (const auto& part : parts)
      for (const Pick& p : part) ++first_[static_cast<std::size_t>(p.query + 1)];
    std::partial_sum(first_.begin(), first_.end(), first_.begin());
    picks_.resize(static_cast<std::size_t>(first_.back()));
    std::vector<std::int64_t> at(first_.begin(), first_.end() - 1);
    for (const auto& part : parts)
      for (const Pick& p : part) picks_[static_cast<std::size_t>(at[static_cast<std::size_t>(p.query)]++)] = p;
  }

  // Weighs what was picked.
  void evaluate() {
    struct Own {
      Gather gather;
      Aligned<float> panel, distances;
    };
    each_pixel([&](Pixel& q, Own& own) {
      const std::size_t i = static_cast<std::size_t>(&q - pixels_.data());
      const auto begin = picks_.begin() + first_[i], end = picks_.begin() + first_[i + 1];
      std::sort(begin, end, [](const Pick& a, const Pick& b) { return a.member < b.member; });
      weigh(q, begin, end, own.gather, own.panel.get(), own.distances.get());
    }, [&] {
      return Own{Gather(a_, lists_, kernel_), aligned<float>(dims_ * kernel_.lanes), aligned<float>(kernel_.lanes)};
    });
  }

  template <class Iterator>
  void weigh(Pixel& q, Iterator begin, Iterator end, Gather& gather, float* panel, float* distances) {
    const auto channels = static_cast<std::size_t>(a_.channels);
    const std::int64_t lanes = kernel_.lanes;
    q.m = nothing, q.s = q.ss = q.fourth = q.e = 0, q.top = nothing, q.source = -1;
    q.y.assign(channels, 0.0), q.sy.assign(channels, 0.0), q.yy.assign(channels, 0.0);
    std::int64_t members[64];
    for (auto p = begin; p < end; p += std::min<std::ptrdiff_t>(lanes, end - p)) {
      const auto live = std::min<std::int64_t>(lanes, end - p);
      for (std::int64_t i = 0; i < live; ++i) members[i] = p[i].member;
      for (std::int64_t i = 0; i < lanes && p + live + i < end; ++i) gather.prefetch((p + live + i)->member);
      gather.panel(members, live, panel);
      kernel_.window_distances(panel, window(q), dims_, distances);
      for (std::int64_t i = 0; i < live; ++i) {
        const double log_w = -q.scale * static_cast<double>(distances[i]);
        if (log_w > q.m) {  // what was summed so far refers to the largest
          const double down = std::exp2(q.m - log_w);
          q.s *= down, q.ss *= down * down, q.fourth *= std::pow(down, 4);
          q.e = down > 0 ? down * q.e + q.s * (q.m - log_w) : 0;
          for (std::size_t c = 0; c < channels; ++c) q.y[c] *= down, q.sy[c] *= down * down, q.yy[c] *= down * down;
          q.m = log_w;
        }
        const double w = std::exp2(log_w - q.m), probability = static_cast<double>(p[i].probability);
        const double share = w / probability, variance = share * share * (1 - probability);
        q.s += share, q.ss += variance, q.fourth += variance * variance, q.e += share * (log_w - q.m);
        for (std::size_t c = 0; c < channels; ++c) {
          const auto value = static_cast<double>(panel[centre(static_cast<std::int64_t>(c)) * lanes + i]);
          q.y[c] += share * value, q.sy[c] += variance * value, q.yy[c] += variance * value * value;
        }
        const std::int64_t image = lists_.image[p[i].member];
        const std::int64_t source = image * a_.height * a_.width + lists_.place[p[i].member];
        if (log_w > q.top || (log_w == q.top && source < q.source)) q.top = log_w, q.source = source;
      }
    }
    // A variance to which few windows contribute is poorly known, and more often too small than too large.
    const double unsure = q.ss > 1e-150 ? std::pow(1 + few * q.fourth / (q.ss * q.ss), 2) : 1.0;
    q.ss *= unsure;
    for (std::size_t c = 0; c < channels; ++c) q.sy[c] *= unsure, q.yy[c] *= unsure;
    q.error = error(q);
  }

  // Of the mean, in [-1, 1].
  double error(const Pixel& q) const {
    double largest = 0;
    for (std::size_t c = 0; c < q.y.size(); ++c) {
      const double mean = q.y[c] / q.s;
      largest = std::max(largest, q.yy[c] - 2 * mean * q.sy[c] + mean * mean * q.ss);
    }
    return list_interval * std::sqrt(largest) / q.s / unit_ + q.dropped;
  }

  // Who is done, and how much more the others need; false when all are done.
  bool settle() {
    const std::int64_t n = pixels_of_a_query();
    for (std::size_t i = 0; i < exact_.size(); ++i) {
      std::int64_t hard = 0;
      for (std::int64_t j = 0; j < n; ++j) {
        Pixel& q = pixels_[i * static_cast<std::size_t>(n) + static_cast<std::size_t>(j)];
        if (q.beyond) exact_[i] = true;
        if (q.done || q.y.empty()) continue;
        // The latter: most windows of any weight were picked, and more would change little; the error stays as stated.
        if (q.error <= tolerance_ || (q.fraction == 1 && q.picks > 4 * q.members)) {
          q.done = true;
          continue;
        }
        const double wanted = 1.2 * std::pow(q.error / tolerance_, 2);
        q.picks *= std::clamp(std::isfinite(wanted) ? wanted : growth, 1.5, growth);
        q.fraction = std::min(1.0, 4 * q.fraction);
        q.hard = pick_cost * q.picks + q.fraction * q.members > most_of_windows * windows_;
        hard += q.hard;
      }
      if (static_cast<double>(hard) > most_of_pixels * static_cast<double>(n)) exact_[i] = true;
    }
    return std::any_of(pixels_.begin(), pixels_.end(), [&](const Pixel& q) { return active(q); });
  }

  void put(const Pixel& q, Partial& out) const {
    const std::int64_t p = q.place.row * a_.width + q.place.column;
    out.m[p] = q.m * ln2, out.s[p] = q.s;
    out.ss[p] = q.ss;
    out.tail[p] = std::max(q.dropped * q.s, std::numeric_limits<double>::min());  // 0: all was looked at
    for (std::int64_t c = 0; c < a_.channels; ++c) {
      const std::int64_t i = c * out.pixels + p;
      out.y[i] = q.y[c] / unit_, out.sy[i] = q.sy[c] / unit_, out.yy[i] = q.yy[c] / (unit_ * unit_);
    }
    if (!a_.full) return;
    out.e[p] = q.e * ln2, out.top[p] = q.top * ln2, out.source[p] = q.source;
  }

  const Problem& a_;
  const Lists& lists_;
  const Kernel& kernel_;
  const std::vector<Place> places_;
  const std::int64_t dims_;
  const double unit_, tolerance_;
  double windows_ = 0;
  Aligned<float> means_;
  std::int64_t b0_ = 0;
  std::vector<Pixel> pixels_;
  std::vector<float> queries_;        // (pixels, dims)
  std::vector<char> exact_;           // (queries)
  std::vector<Pick> picks_;           // those of each pixel side by side
  std::vector<std::int64_t> first_;   // (pixels + 1) where they begin
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

void describe_lists(const Problem& a, const Lists& lists, float* mean, float* spread, std::int8_t* code, float* norm,
                    float* rest) {
  const Kernel& kernel = kernel_in_use();
  in_threads(a.threads, lists.count, a.interrupted, [&](auto take) {
    const Gather gather(a, lists, kernel);
    const std::int64_t dims = gather.dims(), n = lists.directions_count;
    std::vector<double> sum(static_cast<std::size_t>(dims));
    std::vector<std::uint8_t> bytes(static_cast<std::size_t>(dims + 16));
    std::vector<float> window(static_cast<std::size_t>(dims + 16));
    const auto read = [&](std::int64_t member) {
      if (!a.pixels_uint8) return gather.window(a.pixels_float, member, window.data());
      gather.window(a.pixels_uint8, member, bytes.data());
      for (std::int64_t i = 0; i < dims; ++i) window[i] = static_cast<float>(bytes[i]) * (1 / 127.5f) - 1.0f;
    };
    take([&](std::int64_t l, auto stop) {
      const std::int64_t begin = lists.begin[l], end = lists.end[l];
      std::fill(sum.begin(), sum.end(), 0.0);
      double squares = 0;
      for (std::int64_t i = begin; i < end; ++i) {
        if (stop()) return;
        read(i);
        for (std::int64_t j = 0; j < dims; ++j) sum[j] += static_cast<double>(window[j]);
        float length = 0;
        for (std::int64_t j = 0; j < dims; ++j) window[j] -= lists.origin[j], length += window[j] * window[j];
        float inside = 0;
        std::int8_t* to = code + i / list_block * list_block * n + i % list_block * 2;
        for (std::int64_t k = 0; k < n; ++k) {
          const float* direction = lists.directions + k * dims;
          float z = 0;
          for (std::int64_t j = 0; j < dims; ++j) z += direction[j] * window[j];
          const float coordinate = std::clamp(std::nearbyint(z / lists.step), -127.0f, 127.0f);
          to[k / 2 * list_block * 2 + k % 2] = static_cast<std::int8_t>(coordinate);
          inside += coordinate * lists.step * coordinate * lists.step;
        }
        norm[i] = inside, rest[i] = std::max(0.0f, length - inside);
        squares += static_cast<double>(length);
      }
      const auto n_members = static_cast<double>(std::max<std::int64_t>(1, end - begin));
      double apart = 0;  // of the mean from the origin
      for (std::int64_t j = 0; j < dims; ++j) {
        const double value = begin < end ? sum[j] / n_members : 0.0;
        mean[l * dims + j] = static_cast<float>(value);
        apart += std::pow(value - static_cast<double>(lists.origin[j]), 2);
      }
      spread[l] = static_cast<float>(std::max(0.0, squares / n_members - apart));
    });
  });
}

void lists_engine(const Problem& a, const Lists& lists, double tolerance, Sink& sink) {
  Search search(a, lists, tolerance);
  const std::int64_t group = std::max<std::int64_t>(1, pixels_together / search.pixels_of_a_query());
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
