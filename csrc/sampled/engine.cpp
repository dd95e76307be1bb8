// The approximate engine: importance sampling of the windows of a bank.
//
// An index keeps the windows in lists of similar ones, with short descriptions (coordinates along principal
// directions). From a query's distance to the means of lists follows which of them can matter; from the descriptions
// in these, about how much each window weighs. Every window is then picked with a probability that grows with this, and
// the exact weights w of those picked, each divided by its probability, sum up to estimates of sum w and sum w * centre,
// with known variance (Estimate). More are picked until the error of the mean is below the tolerance. Pixels that are
// far from all windows are looked at again, and pixels tell those beside them what is heavy.
#include "sampled/engine.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>

#include "sampled/beside.h"
#include "sampled/estimate.h"
#include "sampled/picking.h"
#include "sampled/prospects.h"
#include "sampled/weigher.h"
#include "sampled/windows.h"
#include "sources.h"
#include "threads.h"
#include "weighing.h"

namespace pyels {
namespace {

constexpr double growth = 8;  // of their number, from round to round at most
// Where one window holds more than `heavy` of the weight, a search for neighbours is what is needed.
constexpr double heavy = 0.02;
// A window that is unlike the others of its list may weigh more than the model allows for, and never be looked at; and
// what was picked may be more alike than what was not. So large a part of the tolerance is added to a pixel's deviation,
// unless all windows were weighed.
constexpr double unseen = 0.05;
// A pixel is far from windows of which the nearest is so many standard deviations further than noise explains; beyond
// furthest it makes no difference.
constexpr double far = 4, furthest = 1000;
// The error grows by few / n where the variance is that of n equal contributions.
constexpr double few = 3;
// A query is left to the exact engine where to look on would cost more than half of what that does: weighing a window
// that was picked counts as 80 of its pairs, and weighing one by description as one and a half.
constexpr double pick_cost = 80, look_cost = 1.5, most_of_exact = 0.5;
// So many query pixels share what is read of the lists, and know of them at a time; and about so many picks are held.
constexpr std::int64_t pixels_together = 1024;
constexpr double picks_together = 1 << 23;
// The pixels whose sources are in lists: those of a region.
std::vector<Place> listed_pixels(const Problem& a, std::int64_t region) {
  const Span rows = source_axis(a, a.height).span[region / 3], columns = source_axis(a, a.width).span[region % 3];
  std::vector<Place> pixels;
  for (std::int64_t row = rows.first; row < rows.first + rows.count; ++row)
    for (std::int64_t column = columns.first; column < columns.first + columns.count; ++column)
      pixels.push_back({row, column});
  return pixels;
}

class Search {
 public:
  Search(const Problem& a, const SampledOptions& options, const Lists& lists)
      : a_(a),
        options_(options),
        region_(a, lists.region),
        places_(listed_pixels(a, lists.region)),
        layout_(a),
        prospects_(a, lists, options.dice),
        picking_(a, options, lists, region_, prospects_) {}

  // Looks for the pixels of queries b0 .. b1 - 1.
  void run(std::int64_t b0, std::int64_t b1) {
    batch_.first_query = b0;
    batch_.exact.assign(static_cast<std::size_t>(b1 - b0), false);
    estimates_.assign(static_cast<std::size_t>((b1 - b0) * std::ssize(places_)), Estimate(a_.channels));
    fill_queries(b0, b1);
    // All pixels of several queries, or a part of those of one.
    const std::int64_t part = std::min(pixels_together, std::ssize(places_));
    for (std::int64_t from = 0; from < std::ssize(places_); from += part) {
      const std::int64_t to = std::min(std::ssize(places_), from + part);
      batch_.pixels.clear();
      for (std::int64_t b = b0; b < b1; ++b)
        for (std::int64_t i = from; i < to; ++i) batch_.pixels.push_back(pixel(b, i));
      search(to - from);
      search_again(to - from);
      conclude();
    }
  }

  // Fills `out` where the listed pixels of query b are; false when the exact engine is to be used.
  bool put(std::int64_t b, Partial& out) const {
    if (batch_.exact[static_cast<std::size_t>(b - batch_.first_query)]) return false;
    for (std::int64_t i = 0; i < std::ssize(places_); ++i)
      put(places_[static_cast<std::size_t>(i)], estimates_[number_of_estimate(b, i)], out);
    return true;
  }

 private:
  double alpha(std::int64_t b) const { return std::max(a_.alpha[b], 1e-9); }  // at 0, x / alpha would be infinite
  std::size_t number_of_estimate(std::int64_t b, std::int64_t place) const {
    return static_cast<std::size_t>((b - batch_.first_query) * std::ssize(places_) + place);
  }
  Estimate& estimate(const Pixel& q) { return estimates_[number_of_estimate(q.b, q.number)]; }

  // The queries over alpha, in the bank's units, wrapped around: distances are then between their windows and the
  // bank's.
  void fill_queries(std::int64_t b0, std::int64_t b1) {
    const std::int64_t size = a_.channels * a_.height * a_.width, r = a_.patch_size / 2;
    // Rows are read in steps of up to 16.
    queries_.assign(static_cast<std::size_t>((b1 - b0) * a_.channels * layout_.channel + 16), 0.0f);
    float* to = queries_.data();
    for (std::int64_t b = b0; b < b1; ++b) {
      const double factor = layout_.unit / alpha(b);
      const float* x = a_.x + b * size;
      for (std::int64_t c = 0; c < a_.channels; ++c, x += a_.height * a_.width)
        for (std::int64_t row = 0; row < a_.height + 2 * r; ++row)
          for (std::int64_t column = 0; column < layout_.row; ++column) {
            const float value = x[(row + a_.height - r) % a_.height * a_.width + (column + a_.width - r) % a_.width];
            *to++ = static_cast<float>(factor * static_cast<double>(value) + layout_.zero);
          }
    }
  }

  // The i-th pixel of the region, of query b.
  Pixel pixel(std::int64_t b, std::int64_t i) const {
    const std::int64_t r = a_.patch_size / 2;
    const double ratio = alpha(b) / (a_.sigma[b] * layout_.unit);
    const Place& place = places_[static_cast<std::size_t>(i)];
    const std::int64_t rows_off = region_.inside() ? 0 : std::max<std::int64_t>(0, r - place.row);
    const std::int64_t columns_off = region_.inside() ? 0 : std::max<std::int64_t>(0, r - place.column);
    return {.b = b,
            .number = i,
            .place = place,
            .overhang = region_.overhang(place.row, place.column),
            .x = queries_.data() + (b - batch_.first_query) * a_.channels * layout_.channel +
                 (place.row + rows_off) * layout_.row + place.column + columns_off,
            .scale = 0.5 * ratio * ratio / ln2};
  }

  // Estimates for batch_.pixels. The exact engine, if a query is left to it, has so many pixels of it to evaluate.
  void search(std::int64_t of_query) {
    picking_.begin(batch_);
    while (std::any_of(batch_.pixels.begin(), batch_.pixels.end(), [&](const Pixel& q) { return batch_.active(q); })) {
      for (std::int64_t first = 0, behind = 0; first < std::ssize(batch_.pixels); first = behind) {
        behind = portion(first);
        picking_.pick(batch_, first, behind);
        evaluate(first, behind);
      }
      settle(of_query);
    }
  }

  // And once more for pixels that are further from all windows found than noise explains. Of how windows spread towards
  // these the model knows less, and of which are nearest the descriptions, whose errors grow with the distance: more
  // lists are looked at, and more windows weighed, of which fewer are preferred. What was heavy in the first search stays.
  void search_again(std::int64_t of_query) {
    std::vector<Pixel> again;
    std::vector<Heaviest> heaviest;
    std::vector<double> cost(batch_.exact.size(), 0.0);
    for (const Pixel& q : batch_.pixels) {
      const Estimate& found = estimate(q);
      if (batch_.is_exact(q) || static_cast<double>(found.certain) == prospects_.windows()) continue;
      const double deviations = std::min(furthest, prospects_.deviations(q, found.heaviest[0].log_w));
      if (deviations < far) continue;
      Pixel next = pixel(q.b, q.number);
      next.wider = deviations * deviations;
      next.tempering *= static_cast<float>(far / deviations);
      next.picks = std::min(prospects_.windows(), std::max(q.picks, first_picks * deviations));
      cost[static_cast<std::size_t>(q.b - batch_.first_query)] += pick_cost * next.picks;
      again.push_back(std::move(next));
      heaviest.push_back(found.heaviest);
    }
    if (again.empty()) return;
    leave_what_is_too_dear(cost, of_query);
    batch_.pixels.swap(again);
    search(of_query);
    in_threads(options_.threads, std::ssize(batch_.pixels), a_.interrupted, [&](auto take) {
      Weigher weigher(a_, region_, layout_);
      take([&](std::int64_t i, auto) {
        const Pixel& q = batch_.pixels[static_cast<std::size_t>(i)];
        if (batch_.is_exact(q)) return;
        for (const Heavy& one : heaviest[static_cast<std::size_t>(i)])
          if (one.source >= 0) know(q, one.source, weigher);
      });
    });
    batch_.pixels.swap(again);
  }

  void know(const Pixel& q, std::int64_t source, Weigher& weigher) {
    const std::int64_t size = a_.height * a_.width;
    const double log_w = weigher.log_weight(q, source / size, source % size);
    estimate(q).know(log_w, source, weigher.centre.data());
  }

  // Pixels from .. to - 1, as many as make no more than picks_together.
  std::int64_t portion(std::int64_t from) const {
    double picks = 0;
    std::int64_t to = from;
    for (; to < std::ssize(batch_.pixels); ++to) {
      const Pixel& q = batch_.pixels[static_cast<std::size_t>(to)];
      if (!batch_.active(q)) continue;
      picks += std::min((1 + alike) * q.picks, prospects_.windows());
      if (picks > picks_together && to > from) break;
    }
    return to;
  }

  // Weighs what was picked.
  void evaluate(std::int64_t from, std::int64_t to) {
    shares_.assign(static_cast<std::size_t>(image_shares * (to - from)), Estimate(a_.channels));
    weigh(from, to);
    each_pixel(
        a_, options_, batch_, from, to,
        [&](Pixel& q, std::int64_t i, int) {
          Estimate& total = estimate(q);
          total = Estimate(a_.channels);
          for (std::int64_t share = 0; share < image_shares; ++share)
            total.add(shares_[static_cast<std::size_t>(share * (to - from) + i - from)]);
          q.error = interval * with_doubts(total).error() / layout_.unit;
        },
        [] { return 0; });
  }

  // With the variance that it is known with.
  Estimate with_doubts(Estimate total) const {
    total.widen(few);
    if (static_cast<double>(total.certain) < prospects_.windows())
      total.allow_for(unseen * options_.tolerance * layout_.unit);
    return total;
  }

  void weigh(std::int64_t from, std::int64_t to) {
    in_threads(options_.threads, image_shares, a_.interrupted, [&](auto take) {
      Weigher weigher(a_, region_, layout_);
      take([&](std::int64_t share, auto stop) {
        Estimate* estimates = shares_.data() + share * (to - from);
        for (std::int64_t lists = 0; lists < list_shares; ++lists) {
          const std::vector<Found>& some = picking_.found(lists, share);
          for (std::size_t i = 0; i < some.size(); ++i) {
            if (i % 64 == 0 && stop()) return;
            if (i + 4 < some.size()) weigher.prefetch(some[i + 4].image, some[i + 4].place);
            const Found& f = some[i];
            const double log_w = weigher.log_weight(batch_.pixels[static_cast<std::size_t>(f.pixel)], f.image, f.place);
            estimates[f.pixel - from].add(log_w, static_cast<double>(f.probability),
                                          f.image * a_.height * a_.width + f.place, weigher.centre.data());
          }
        }
      });
    });
  }

  // Who is done, and how much more the others need. They either get there, or become too dear.
  void settle(std::int64_t of_query) {
    const std::vector<double> looked_at = picking_.looked_at(batch_);
    std::vector<double> cost(batch_.exact.size(), 0.0);
    for (std::size_t i = 0; i < batch_.pixels.size(); ++i) {
      Pixel& q = batch_.pixels[i];
      if (!batch_.active(q)) continue;
      const Estimate& so_far = estimate(q);
      const double log_sum = so_far.m + std::log2(so_far.s);
      const bool search = !q.search && so_far.heaviest[0].log_w > log_sum + std::log2(heavy),
                 precise = q.error <= options_.tolerance;
      if (search) q.search = true, q.log_sum = log_sum;
      q.done = !search && precise;
      if (q.done) continue;
      const double wanted = 1.2 * std::pow(q.error / options_.tolerance, 2);
      if (!precise) q.picks *= std::clamp(std::isfinite(wanted) ? wanted : growth, 1.5, growth);
      cost[static_cast<std::size_t>(q.b - batch_.first_query)] += pick_cost * q.picks + look_cost * looked_at[i];
    }
    leave_what_is_too_dear(cost, of_query);
  }

  // To the exact engine: queries whose pixels would cost so much.
  void leave_what_is_too_dear(const std::vector<double>& cost, std::int64_t of_query) {
    for (std::size_t b = 0; b < cost.size(); ++b)
      if (cost[b] > most_of_exact * prospects_.windows() * static_cast<double>(of_query)) batch_.exact[b] = true;
  }

  // Windows that are heavy for one pixel are weighed for those around it too: for these they may be in lists of which the
  // model says that nothing in them matters.
  void conclude() {
    std::vector<Heaviest> heaviest;
    for (const Pixel& q : batch_.pixels) heaviest.push_back(estimate(q).heaviest);
    const HeavyBeside beside(a_, region_, batch_.pixels, std::move(heaviest));
    in_threads(options_.threads, std::ssize(batch_.pixels), a_.interrupted, [&](auto take) {
      Weigher weigher(a_, region_, layout_);
      take([&](std::int64_t i, auto) {
        const Pixel& q = batch_.pixels[static_cast<std::size_t>(i)];
        if (batch_.is_exact(q)) return;
        for (const std::int64_t source : beside.around_pixel(q)) know(q, source, weigher);
        estimate(q) = with_doubts(estimate(q));
      });
    });
  }

  void put(const Place& place, const Estimate& from, Partial& out) const {
    const std::int64_t p = place.row * a_.width + place.column;
    out.m[p] = from.m * ln2, out.s[p] = from.s, out.ss[p] = from.ss;
    out.chance[p] = prospects_.windows() - static_cast<double>(from.certain);
    for (std::int64_t c = 0; c < a_.channels; ++c) {
      const std::int64_t i = c * out.pixels + p;
      out.y[i] = from.y(c) / layout_.unit, out.sy[i] = from.sy(c) / layout_.unit,
      out.yy[i] = from.yy(c) / (layout_.unit * layout_.unit);
    }
    if (!a_.full()) return;
    out.e[p] = from.e * ln2, out.top[p] = from.heaviest[0].log_w * ln2, out.source[p] = from.heaviest[0].source;
  }

  const Problem& a_;
  const SampledOptions& options_;
  const RegionWindows region_;
  const std::vector<Place> places_;
  const QueryLayout layout_;
  const Prospects prospects_;
  Picking picking_;
  Batch batch_;
  std::vector<float> queries_;       // (queries, C, H + k - 1, W + k - 1)
  std::vector<Estimate> estimates_;  // (queries, places)
  std::vector<Estimate> shares_;     // (image_shares, pixels)
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

void sampled_engine(const Problem& a, const SampledOptions& options, std::span<const Lists> lists, Sink& sink) {
  std::vector<std::unique_ptr<Search>> searches;
  for (const Lists& of_region : lists) searches.push_back(std::make_unique<Search>(a, options, of_region));
  const std::int64_t group = std::max<std::int64_t>(1, pixels_together / (a.height * a.width));
  for (std::int64_t b0 = 0; b0 < a.queries; b0 += group) {
    const std::int64_t b1 = std::min(a.queries, b0 + group);
    for (const auto& search : searches) search->run(b0, b1);
    for (std::int64_t b = b0; b < b1; ++b) {
      Partial total(a.height * a.width, a.channels, a.full(), true);
      unsigned exact = regions_of(source_axis(a, a.height), source_axis(a, a.width));
      for (std::size_t i = 0; i < lists.size(); ++i)
        if (searches[i]->put(b, total)) exact &= ~bit(static_cast<std::int32_t>(lists[i].region));
      Into into(total);
      if (exact) cpu_engine(only(a, b), {.threads = options.threads, .regions = exact}, into);
      sink.take(b, total);
    }
  }
}

}  // namespace pyels
