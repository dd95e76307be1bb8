// The approximate engine: importance sampling of the windows of a bank.
//
// An index keeps the windows in lists of similar ones, with short descriptions (coordinates along principal
// directions). From a query's distance to the means of lists follows which of them can matter; from the descriptions
// in these, about how much each window weighs. Every window is then picked with a probability that grows with this, and
// the exact weights w of those picked, each divided by its probability, sum up to estimates of sum w and sum w * centre,
// with known variance (Estimate). More are picked until the error of the mean is below the tolerance.
#include "sampled/engine.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "cpu/maps.h"
#include "sampled/estimate.h"
#include "sampled/windows.h"
#include "sources.h"
#include "threads.h"
#include "weighing.h"

namespace pyels {
namespace {

constexpr double infinity = std::numeric_limits<double>::infinity();

constexpr double first_picks = 2500;  // windows that are weighed for a pixel in the first round
constexpr double growth = 8;          // of their number, from round to round at most
// Windows are picked in proportion to their tempered weight, (weight by description) ^ tempering. A window that lies
// far off the directions may be nearer than it seems: `beta` times that squared length is taken off its squared distance.
constexpr double tempering = 0.75, beta = 0.2;
// And a tenth of them from all alike: where the descriptions or the model tell little, the variance shows it.
constexpr double alike = 0.1;
// The model of a list: its windows spread alike in so many directions. Of the descriptions in lists whose weights it
// predicts to be less than 2^-reach of the whole none is looked at.
constexpr double directions = 32, reach = 20;
// So many windows, a part of every list, are weighed by description at first. Then so large a part of each is looked at
// as is `spare` times the probability with which the typical window of weight in it is picked, by what was seen in the
// first part; but no less than `model_spare` times that by the model, as a first part may not show what matters.
constexpr double pilot_members = 5e4, spare = 8, model_spare = 0.3;
// Where one window holds more than `heavy` of the weight, a search for neighbours is what is needed: then all of the
// lists are looked at where, by the model, a window may hold 2^-near of it.
constexpr double heavy = 0.02, near = 20;
// The error grows by few / n where the variance is that of n equal contributions.
constexpr double few = 3;
// A query is left to the exact engine where to look on would cost more than half of what that does: weighing a window
// that was picked counts as 120 of its pairs, and weighing one by description as 4.
constexpr double pick_cost = 120, look_cost = 4, most_of_exact = 0.5;
// Beyond so many nats float32 distances spoil the weights.
constexpr double most_nats = 3000;
// So many query pixels share what is read of the lists, and about so many picks are held at a time.
constexpr std::int64_t pixels_together = 1024;
constexpr double picks_together = 1 << 23;
// Picks are made by so many shares of the lists, and weighed by so many shares of the bank's images, which stay in the
// cache meanwhile. Sums are added up in the order of shares, whichever threads worked on them.
constexpr std::int64_t list_shares = 64, image_shares = 64;

struct Place {
  std::int64_t row, column;
};

// The pixels whose sources are in lists: those that meet others along both axes.
std::vector<Place> listed_pixels(const Problem& a) {
  const Span rows = source_axis(a, a.height).span[0], columns = source_axis(a, a.width).span[0];
  std::vector<Place> pixels;
  for (std::int64_t row = rows.first; row < rows.first + rows.count; ++row)
    for (std::int64_t column = columns.first; column < columns.first + columns.count; ++column)
      pixels.push_back({row, column});
  return pixels;
}

// What the model says of the weights of a list's windows: they are log-normal.
struct Model {
  double mean, sd;          // of log2 w; and in nats
  double furthest, log2_n;  // standard deviations to the furthest of n windows; log2 n

  Model tempered() const { return {tempering * mean, tempering * sd, furthest, log2_n}; }
  // log2 of the sum of weights: carried by windows as many standard deviations above the mean as there are nats in one,
  // or by the furthest.
  double sum() const {
    return std::min(log2_n, mean + (furthest < sd ? sd * furthest / ln2 : sd * sd / 2 / ln2 + log2_n));
  }
  // No weight is above 1.
  double largest() const { return std::min(0.0, mean + sd * furthest / ln2); }
  double typical() const { return std::min(0.0, mean + std::min(1.5 * sd, furthest) * sd / ln2); }  // by weight
};

// What a query pixel knows of a list.
struct Entry {
  std::int32_t list;
  float part;                  // of its members, that is looked at
  float largest;               // by the model, log2
  float typical;               // by the model, log2 of a pick's probability, were there one pick in all
  float top = -1e30f;          // log2 of the largest tempered weight by description
  float sum = 0, squares = 0;  // of these weights and of their squares, relative to 2^top
};

struct Pixel {
  std::int64_t b;  // query
  Place place;
  const float* x;  // its window, C * k * k of the query's pixels over alpha, in the bank's units
  double scale;    // log2 w = -scale * squared distance, in these units
  bool done = false;
  bool search = false;  // one window weighs more than `heavy`
  std::vector<Entry> entries{};
  std::vector<std::int16_t> z{};
  ScanQuery scan{};
  double members = 0, picks = first_picks, error = 0;
  double log_total = -infinity;  // log2 of the sum of tempered weights
  double log_sum = 0;            // where `search`: log2 of the sum of weights, as estimated first
};

struct Pair {
  std::int32_t pixel, entry;
};

// A window that was picked for a pixel.
struct Found {
  std::int32_t pixel, image, place;
  float probability;
};

class Search {
 public:
  Search(const Problem& a, const SampledOptions& options, const Lists& lists)
      : a_(a),
        options_(options),
        lists_(lists),
        kernel_(kernel_in_use()),
        places_(listed_pixels(a)),
        dims_(a.channels * a.patch_size * a.patch_size),
        x_width_(a.width + a.patch_size - 1),
        x_plane_(x_width_ * (a.height + a.patch_size - 1)),
        unit_(a.pixels_uint8 ? 127.5 : 1.0),
        zero_(a.pixels_uint8 ? 127.5 : 0.0) {
    for (std::int64_t l = 0; l < lists.count; ++l) {
      const double n = std::max(1.0, static_cast<double>(size(l)));
      sizes_.push_back({std::log2(n), std::sqrt(2 * std::log(n))});
      windows_ += static_cast<double>(size(l));
    }
    turn_directions();
  }

  std::int64_t pixels_of_a_query() const { return std::ssize(places_); }

  // Looks for the pixels of queries b0 .. b1 - 1.
  void run(std::int64_t b0, std::int64_t b1) {
    b0_ = b0;
    pixels_.clear(), exact_.assign(static_cast<std::size_t>(b1 - b0), false);
    fill_queries(b0, b1);
    estimates_.assign(pixels_.size(), Estimate(a_.channels));
    each_pixel(
        0, std::ssize(pixels_), [&](Pixel& q, std::int64_t, Own& own) { begin(q, own); }, [] { return Own{}; });
    for (const Pixel& q : pixels_)
      if (q.entries.empty()) exact_[static_cast<std::size_t>(q.b - b0_)] = true;
    weigh_lists();
    while (std::any_of(pixels_.begin(), pixels_.end(), [&](const Pixel& q) { return active(q); })) {
      for (std::int64_t from = 0, to = 0; from < std::ssize(pixels_); from = to) {
        to = portion(from);
        pick(from, to);
        evaluate(from, to);
      }
      settle();
    }
  }

  // Fills `out` where the listed pixels of query b are; false when the exact engine is to be used.
  bool put(std::int64_t b, Partial& out) const {
    if (exact_[static_cast<std::size_t>(b - b0_)]) return false;
    for (std::size_t i = 0; i < pixels_.size(); ++i)
      if (pixels_[i].b == b) put(pixels_[i], estimates_[i], out);
    return true;
  }

 private:
  std::int64_t size(std::int64_t l) const { return lists_.end[l] - lists_.begin[l]; }
  double alpha(std::int64_t b) const { return std::max(a_.alpha[b], 1e-9); }  // at 0, x / alpha would be infinite
  bool active(const Pixel& q) const { return !q.done && !exact_[static_cast<std::size_t>(q.b - b0_)]; }

  // work(pixel, i, own) for the active pixels i of from .. to - 1; own = make() for each thread.
  template <class Work, class Make>
  void each_pixel(std::int64_t from, std::int64_t to, Work work, Make make) {
    in_threads(options_.threads, to - from, a_.interrupted, [&](auto take) {
      auto own = make();
      take([&](std::int64_t i, auto) {
        Pixel& q = pixels_[static_cast<std::size_t>(from + i)];
        if (active(q)) work(q, from + i, own);
      });
    });
  }

  // The queries over alpha, in the bank's units, wrapped around: distances are then between their windows and the
  // bank's.
  void fill_queries(std::int64_t b0, std::int64_t b1) {
    const std::int64_t size = a_.channels * a_.height * a_.width, r = a_.patch_size / 2;
    // Rows are read in steps of up to 16.
    queries_.assign(static_cast<std::size_t>((b1 - b0) * a_.channels * x_plane_ + 16), 0.0f);
    float* to = queries_.data();
    for (std::int64_t b = b0; b < b1; ++b) {
      const double factor = unit_ / alpha(b), ratio = alpha(b) / (a_.sigma[b] * unit_);
      for (const Place& place : places_)
        pixels_.push_back({.b = b,
                           .place = place,
                           .x = to + place.row * x_width_ + place.column,
                           .scale = 0.5 * ratio * ratio / ln2});
      const float* x = a_.x + b * size;
      for (std::int64_t c = 0; c < a_.channels; ++c, x += a_.height * a_.width)
        for (std::int64_t row = 0; row < a_.height + 2 * r; ++row)
          for (std::int64_t column = 0; column < x_width_; ++column) {
            const float value = x[(row + a_.height - r) % a_.height * a_.width + (column + a_.width - r) % a_.width];
            *to++ = static_cast<float>(factor * static_cast<double>(value) + zero_);
          }
    }
  }

  // ---- Which lists can matter -----------------------------------------------------------------------------------

  // Directions as (dims, directions), so that coordinates are summed side by side, and the means of lists as panels,
  // (blocks, directions)[L].
  void turn_directions() {
    const std::int64_t lanes = kernel_.lanes, n = lists_.directions_count;
    turned_.resize(static_cast<std::size_t>(dims_ * n));
    for (std::int64_t i = 0; i < n; ++i)
      for (std::int64_t j = 0; j < dims_; ++j) turned_[j * n + i] = lists_.directions[i * dims_ + j];
    means_ = aligned<float>((lists_.count + lanes - 1) / lanes * lanes * n);
    for (std::int64_t l = 0; l < lists_.count; ++l)
      for (std::int64_t i = 0; i < n; ++i)
        means_[(l / lanes * n + i) * lanes + l % lanes] = static_cast<float>(unit_) * lists_.mean[l * n + i];
  }

  // The query along the principal directions; the squared length of what they leave.
  double describe(Pixel& q, std::vector<float>& z) {
    const std::int64_t n = lists_.directions_count, k = a_.patch_size;
    z.assign(static_cast<std::size_t>(n), 0.0f);
    double whole = 0, inside = 0;
    for (std::int64_t j = 0; j < dims_; ++j) {
      const float pixel = q.x[j / (k * k) * x_plane_ + j / k % k * x_width_ + j % k];
      const float value = pixel - static_cast<float>(unit_ * static_cast<double>(lists_.origin[j]) + zero_);
      const float* along = turned_.data() + j * n;
      for (std::int64_t i = 0; i < n; ++i) z[static_cast<std::size_t>(i)] += value * along[i];
      whole += static_cast<double>(value) * static_cast<double>(value);
    }
    double largest = 1e-30;
    for (float value : z) inside += static_cast<double>(value) * static_cast<double>(value);
    for (std::int64_t i = 0; i < n; ++i) largest = std::max(largest, std::abs(scaled(z, i)));
    const double step = largest / 16000;
    for (std::int64_t i = 0; i < n; ++i) q.z.push_back(static_cast<std::int16_t>(std::lround(scaled(z, i) / step)));
    ScanQuery& s = q.scan;
    s.z = q.z.data();
    s.base = static_cast<float>(-tempering * q.scale * inside);
    s.norm_scale = static_cast<float>(tempering * q.scale * unit_ * unit_);
    s.rest_scale = static_cast<float>(tempering * beta * q.scale * unit_ * unit_);
    s.dot_scale = static_cast<float>(tempering * 2 * q.scale * step * unit_);
    s.seed = seed(q);
    return std::max(0.0, whole - inside);
  }

  // A coordinate in units of the steps of codes.
  double scaled(const std::vector<float>& z, std::int64_t i) const {
    return static_cast<double>(z[static_cast<std::size_t>(i)]) * static_cast<double>(lists_.step[i]);
  }

  // From the query's own pixels, so that others do not matter to it.
  std::uint32_t seed(const Pixel& q) const {
    std::uint32_t hash = 2166136261u;
    for (std::int16_t value : q.z) hash = (hash ^ static_cast<std::uint16_t>(value)) * 16777619u;
    return hash;
  }

  // Squared distances of a query window to the windows of a list have the mean D + spread, D being that to the list's
  // mean, and are close to normal, so weights are close to log-normal.
  Model model(const Pixel& q, std::int64_t l, double distance) const {
    const double v = static_cast<double>(lists_.spread[l]) * unit_ * unit_;
    const double n = std::min(directions, static_cast<double>(dims_));
    const double variance = 4 * distance / static_cast<double>(dims_) * v + 2 * v * v / n;
    const Size& size = sizes_[static_cast<std::size_t>(l)];
    return {-q.scale * (distance + v), q.scale * ln2 * std::sqrt(variance), size.furthest, size.log2};
  }

  struct Own {
    std::vector<float> z{}, distances{};
    std::vector<Model> models{};
  };

  void begin(Pixel& q, Own& own) {
    const std::int64_t lanes = kernel_.lanes, n = lists_.directions_count;
    const double outside = describe(q, own.z);
    own.distances.resize(static_cast<std::size_t>(lists_.count + lanes));
    for (std::int64_t l = 0; l < lists_.count; l += lanes)
      kernel_.point_distances(means_.get() + l * n, own.z.data(), n, own.distances.data() + l);
    own.models.clear();
    double least = -infinity, nearest = infinity;
    for (std::int64_t l = 0; l < lists_.count; ++l) {
      const double distance = outside + static_cast<double>(own.distances[static_cast<std::size_t>(l)]);
      own.models.push_back(model(q, l, distance));
      if (size(l) == 0) continue;
      // There is at least so much: the mean of weights is above the weight of the mean.
      least = std::max(least, own.models.back().mean + own.models.back().log2_n);
      nearest = std::min(nearest, distance);
    }
    if (q.scale * nearest * ln2 > most_nats) return;  // without entries: left to the exact engine
    double total = 0;                                 // of tempered weights, relative to 2^(tempering * least)
    for (std::int64_t l = 0; l < lists_.count; ++l) {
      const Model& m = own.models[static_cast<std::size_t>(l)];
      if (size(l) == 0) continue;
      if (m.sum() > least - reach) {
        const Model t = m.tempered();
        q.entries.push_back({.list = static_cast<std::int32_t>(l),
                             .part = 1,
                             .largest = static_cast<float>(m.largest()),
                             .typical = static_cast<float>(t.typical())});
        q.members += static_cast<double>(size(l));
        total += std::exp2(t.sum() - tempering * least);
      }
    }
    for (Entry& e : q.entries) {
      e.part = static_cast<float>(std::min(1.0, pilot_members / q.members));
      e.typical -= static_cast<float>(tempering * least + std::log2(total));
    }
  }

  // ---- Rounds over lists ----------------------------------------------------------------------------------------

  // How many members of a list a pixel looks at: whole blocks, or all.
  std::int64_t members(const Entry& e) const {
    const std::int64_t n = size(e.list);
    const double blocks = std::ceil(static_cast<double>(e.part) * static_cast<double>(n) / list_block);
    return std::min(n, static_cast<std::int64_t>(blocks) * list_block);
  }

  // look(picks, share, pixel, entry, task) for all active pixels of from .. to - 1 and their entries: list by list, and
  // part by part of its members, so that a part stays in the cache while it is looked at. `picks` has room for those of
  // a part.
  template <class Look>
  void each_list(std::int64_t from, std::int64_t to, Look look) {
    std::vector<std::int64_t> first(static_cast<std::size_t>(lists_.count + 1), 0);
    const auto each_pair = [&](auto visit) {
      for (std::int64_t i = from; i < to; ++i) {
        const Pixel& q = pixels_[static_cast<std::size_t>(i)];
        if (!active(q)) continue;
        for (std::size_t j = 0; j < q.entries.size(); ++j)
          visit(static_cast<std::size_t>(q.entries[j].list), Pair{static_cast<int>(i), static_cast<int>(j)});
      }
    };
    each_pair([&](std::size_t l, Pair) { ++first[l + 1]; });
    std::partial_sum(first.begin(), first.end(), first.begin());
    std::vector<Pair> pairs(static_cast<std::size_t>(first.back()));
    std::vector<std::int64_t> at(first.begin(), first.end() - 1);
    each_pair([&](std::size_t l, Pair pair) { pairs[static_cast<std::size_t>(at[l]++)] = pair; });
    in_threads(options_.threads, list_shares, a_.interrupted, [&](auto take) {
      std::vector<Pick> buffer(64 * list_block);
      take([&](std::int64_t share, auto stop) {
        const std::int64_t part = std::ssize(buffer);
        for (std::int64_t l = share * lists_.count / list_shares; l < (share + 1) * lists_.count / list_shares; ++l)
          for (std::int64_t begin = 0, most = part; begin < most; begin += part)
            for (std::int64_t i = first[static_cast<std::size_t>(l)]; i < first[static_cast<std::size_t>(l + 1)]; ++i) {
              if ((i & 15) == 0 && stop()) return;
              if (i + 8 < std::ssize(pairs)) {
                const Pair& soon = pairs[static_cast<std::size_t>(i + 8)];
                __builtin_prefetch(pixels_[static_cast<std::size_t>(soon.pixel)].entries.data() + soon.entry);
              }
              const Pair& pair = pairs[static_cast<std::size_t>(i)];
              Pixel& q = pixels_[static_cast<std::size_t>(pair.pixel)];
              Entry& e = q.entries[static_cast<std::size_t>(pair.entry)];
              const std::int64_t wanted = members(e), end = std::min(wanted, begin + part);
              most = std::max(most, wanted);
              if (begin < end) look(buffer.data(), share, pair.pixel, e, task(l, begin, end));
            }
      });
    });
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

  // Sums the tempered weights of a part of every list: what it takes to pick about so many windows.
  void weigh_lists() {
    each_list(0, std::ssize(pixels_), [&](Pick*, std::int64_t, std::int32_t i, Entry& e, const ScanTask& t) {
      ScanQuery scan = pixels_[static_cast<std::size_t>(i)].scan;
      scan.top = e.top, scan.sum = e.sum, scan.squares = e.squares;
      kernel_.scan_sum(t, scan);
      e.top = scan.top, e.sum = static_cast<float>(scan.sum), e.squares = static_cast<float>(scan.squares);
    });
    each_pixel(
        0, std::ssize(pixels_),
        [&](Pixel& q, std::int64_t, int) {
          double top = -infinity, total = 0;
          for (const Entry& e : q.entries) top = std::max(top, static_cast<double>(e.top));
          for (const Entry& e : q.entries) {
            const double each = static_cast<double>(size(e.list)) / static_cast<double>(members(e));
            total += each * static_cast<double>(e.sum) * std::exp2(static_cast<double>(e.top) - top);
          }
          q.log_total = top + std::log2(total);
        },
        [] { return 0; });
  }

  // Pixels from .. to - 1, as many as make no more than picks_together.
  std::int64_t portion(std::int64_t from) const {
    double picks = 0;
    std::int64_t to = from;
    for (; to < std::ssize(pixels_); ++to) {
      const Pixel& q = pixels_[static_cast<std::size_t>(to)];
      if (!active(q)) continue;
      picks += std::min((1 + alike) * q.picks, windows_);
      if (picks > picks_together && to > from) break;
    }
    return to;
  }

  void pick(std::int64_t from, std::int64_t to) {
    each_pixel(
        from, to,
        [&](Pixel& q, std::int64_t, int) {
          q.scan.rate = static_cast<float>(std::log2(q.picks) - q.log_total);
          for (Entry& e : q.entries) {
            const double typical =
                spare * std::exp2(static_cast<double>(e.top + q.scan.rate)) * static_cast<double>(e.squares / e.sum);
            const double by_model = model_spare * q.picks * std::exp2(static_cast<double>(e.typical));
            const bool all = q.search && static_cast<double>(e.largest) > q.log_sum - near;
            e.part = all ? 1.0f : static_cast<float>(std::min(1.0, std::max(typical, by_model)));
          }
        },
        [] { return 0; });
    found_.resize(static_cast<std::size_t>(list_shares * image_shares));
    for (std::vector<Found>& some : found_) some.clear();
    each_list(from, to, [&](Pick* picks, std::int64_t share, std::int32_t i, Entry& e, const ScanTask& t) {
      const auto looked_at = static_cast<float>(members(e)) / static_cast<float>(size(e.list));
      const Pixel& q = pixels_[static_cast<std::size_t>(i)];
      ScanQuery scan = q.scan;
      scan.rate -= std::log2(looked_at);
      const double least = alike * q.picks / windows_ / static_cast<double>(looked_at);
      scan.least = static_cast<float>(std::clamp(std::log2(least), -20.0, 0.0));  // dice have 24 bits
      const std::int64_t n = kernel_.scan_pick(t, scan, picks);
      for (const Pick* p = picks; p < picks + n; ++p)
        found(share, i, std::int64_t{t.first} + p->member, p->probability * looked_at);
    });
    in_threads(options_.threads, list_shares, a_.interrupted, [&](auto take) {
      take([&](std::int64_t share, auto) {
        for (std::int64_t i = from; i < to; ++i)  // by the place in the image, so that other queries do not matter
          if (i % std::ssize(places_) % list_shares == share) pick_elsewhere(share, static_cast<std::int32_t>(i));
      });
    });
  }

  // Picks windows, all alike, of the lists that a pixel has no entry of.
  void pick_elsewhere(std::int64_t share, std::int32_t i) {
    const Pixel& q = pixels_[static_cast<std::size_t>(i)];
    if (!active(q) || q.members == windows_) return;
    // Every so many of all members: windows lie in random order within their lists.
    const auto members = static_cast<double>(lists_.end[lists_.count - 1]);
    const double stride = std::max(1.0, members / (alike * q.picks));
    auto entry = q.entries.begin();
    std::int64_t l = 0;
    for (double at = 0x1p-32 * q.scan.seed * stride; at < members; at += stride) {
      const auto member = static_cast<std::int64_t>(at);
      while (l + 1 < lists_.count && lists_.begin[l + 1] <= member) ++l;
      while (entry != q.entries.end() && entry->list < l) ++entry;
      if (member < lists_.end[l] && (entry == q.entries.end() || entry->list != l))
        found(share, i, member, static_cast<float>(1 / stride));
    }
  }

  void found(std::int64_t share, std::int32_t pixel, std::int64_t member, float probability) {
    const std::int32_t image = lists_.image[member];
    found_[static_cast<std::size_t>(share * image_shares + image * image_shares / a_.images)].push_back(
        {pixel, image, lists_.place[member], probability});
  }

  // Weighs what was picked.
  void evaluate(std::int64_t from, std::int64_t to) {
    shares_.assign(static_cast<std::size_t>(image_shares * (to - from)), Estimate(a_.channels));
    if (a_.pixels_uint8)
      weigh(from, to, a_.pixels_uint8, kernel_.distance_uint8);
    else
      weigh(from, to, a_.pixels_float, kernel_.distance_float);
    each_pixel(
        from, to,
        [&](Pixel& q, std::int64_t i, int) {
          Estimate& total = estimates_[static_cast<std::size_t>(i)];
          total = Estimate(a_.channels);
          for (std::int64_t share = 0; share < image_shares; ++share)
            total.add(shares_[static_cast<std::size_t>(share * (to - from) + i - from)]);
          total.widen(few);
          q.error = interval * total.error() / unit_;
        },
        [] { return 0; });
  }

  template <class T, class Distance>
  void weigh(std::int64_t from, std::int64_t to, const T* pixels, Distance distance) {
    const Windows<T> windows(a_, pixels);
    const std::int64_t size = a_.height * a_.width, r = a_.patch_size / 2;
    in_threads(options_.threads, image_shares, a_.interrupted, [&](auto take) {
      std::vector<T> buffer(static_cast<std::size_t>(windows.room()));
      std::vector<double> value(static_cast<std::size_t>(a_.channels));
      WindowPair pair{a_.channels, a_.patch_size, x_width_, x_plane_, 0, 0};
      take([&](std::int64_t share, auto stop) {
        Estimate* estimates = shares_.data() + share * (to - from);
        for (std::int64_t lists = 0; lists < list_shares; ++lists) {
          const std::vector<Found>& some = found_[static_cast<std::size_t>(lists * image_shares + share)];
          for (std::size_t i = 0; i < some.size(); ++i) {
            if (i % 64 == 0 && stop()) return;
            if (i + 4 < some.size()) windows.prefetch(some[i + 4].image, some[i + 4].place);
            const Found& f = some[i];
            const Pixel& q = pixels_[static_cast<std::size_t>(f.pixel)];
            const auto window = windows.at(f.image, f.place, buffer.data());
            pair.row = window.row, pair.channel = window.channel;
            const double squared = static_cast<double>(distance(pair, q.x, window.first));
            for (std::int64_t c = 0; c < a_.channels; ++c)
              value[static_cast<std::size_t>(c)] =
                  static_cast<double>(window.first[c * window.channel + r * window.row + r]) - zero_;
            estimates[f.pixel - from].add(-q.scale * squared, static_cast<double>(f.probability),
                                          f.image * size + f.place, value.data());
          }
        }
      });
    });
  }

  // Who is done, and how much more the others need. They either get there, or become too dear.
  void settle() {
    std::vector<double> cost(exact_.size(), 0.0);
    for (std::size_t i = 0; i < pixels_.size(); ++i) {
      Pixel& q = pixels_[i];
      if (!active(q)) continue;
      const Estimate& so_far = estimates_[i];
      const double log_sum = so_far.m + std::log2(so_far.s);
      const bool search = !q.search && so_far.top > log_sum + std::log2(heavy), precise = q.error <= options_.tolerance;
      if (search) q.search = true, q.log_sum = log_sum;
      q.done = !search && precise;
      if (q.done) continue;
      const double wanted = 1.2 * std::pow(q.error / options_.tolerance, 2);
      if (!precise) q.picks *= std::clamp(std::isfinite(wanted) ? wanted : growth, 1.5, growth);
      double looked_at = 0;
      for (const Entry& e : q.entries) looked_at += static_cast<double>(members(e));
      cost[static_cast<std::size_t>(q.b - b0_)] += pick_cost * q.picks + look_cost * looked_at;
    }
    for (std::size_t b = 0; b < cost.size(); ++b)
      if (cost[b] > most_of_exact * windows_ * static_cast<double>(places_.size())) exact_[b] = true;
  }

  void put(const Pixel& q, const Estimate& from, Partial& out) const {
    const std::int64_t p = q.place.row * a_.width + q.place.column;
    out.m[p] = from.m * ln2, out.s[p] = from.s, out.ss[p] = from.ss;
    out.chance[p] = windows_ - static_cast<double>(from.certain);
    for (std::int64_t c = 0; c < a_.channels; ++c) {
      const std::int64_t i = c * out.pixels + p;
      out.y[i] = from.y(c) / unit_, out.sy[i] = from.sy(c) / unit_, out.yy[i] = from.yy(c) / (unit_ * unit_);
    }
    if (!a_.full()) return;
    out.e[p] = from.e * ln2, out.top[p] = from.top * ln2, out.source[p] = from.source;
  }

  const Problem& a_;
  const SampledOptions& options_;
  const Lists& lists_;
  const Kernel& kernel_;
  const std::vector<Place> places_;
  const std::int64_t dims_, x_width_, x_plane_;
  const double unit_, zero_;  // the bank's pixels are unit * value + zero
  struct Size {
    double log2, furthest;  // of n members; standard deviations to the furthest of n normal ones
  };
  std::vector<Size> sizes_;  // (lists)
  double windows_ = 0;
  std::vector<float> turned_;
  Aligned<float> means_;
  std::int64_t b0_ = 0;
  std::vector<Pixel> pixels_;
  std::vector<float> queries_;             // (queries, C, H + k - 1, W + k - 1)
  std::vector<char> exact_;                // (queries)
  std::vector<Estimate> estimates_;        // (pixels)
  std::vector<std::vector<Found>> found_;  // (list_shares, image_shares)
  std::vector<Estimate> shares_;           // (image_shares, pixels)
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

void sampled_engine(const Problem& a, const SampledOptions& options, const Lists& lists, Sink& sink) {
  Search search(a, options, lists);
  const std::int64_t group = std::max<std::int64_t>(1, pixels_together / search.pixels_of_a_query());
  for (std::int64_t b0 = 0; b0 < a.queries; b0 += group) {
    const std::int64_t b1 = std::min(a.queries, b0 + group);
    search.run(b0, b1);
    for (std::int64_t b = b0; b < b1; ++b) {
      Partial total(a.height * a.width, a.channels, a.full(), true);
      Into into(total);
      const bool rim = search.put(b, total);
      if (!rim || search.pixels_of_a_query() < a.height * a.width)
        cpu_engine(only(a, b), {.threads = options.threads, .rim = rim}, into);
      sink.take(b, total);
    }
  }
}

}  // namespace pyels
