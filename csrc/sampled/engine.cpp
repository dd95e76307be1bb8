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
#include "sampled/prospects.h"
#include "sampled/scan.h"
#include "sampled/weigher.h"
#include "sampled/windows.h"
#include "sources.h"
#include "threads.h"
#include "weighing.h"

namespace pyels {
namespace {

constexpr double growth = 8;  // of their number, from round to round at most
// A tenth of the windows are picked from all alike: where the descriptions or the model tell little, the variance shows it.
constexpr double alike = 0.1;
// After the first part of every list, so large a part of each is looked at as is `spare` times the probability with
// which the typical window of weight in it is picked, by what was seen in the first part; but no less than `model_spare`
// times that by the model, as a first part may not show what matters.
constexpr float spare = 8, model_spare = 0.3f;
// Where one window holds more than `heavy` of the weight, a search for neighbours is what is needed: then all of the
// lists are looked at where, by the model, a window may hold 2^-near of it.
constexpr double heavy = 0.02, near = 12;
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
// Picks are made by so many shares of the lists, and weighed by so many shares of the bank's images, which stay in the
// cache meanwhile. Sums are added up in the order of shares, whichever threads worked on them.
constexpr std::int64_t list_shares = 64, image_shares = 64;

// The pixels whose sources are in lists: those of a region.
std::vector<Place> listed_pixels(const Problem& a, std::int64_t region) {
  const Span rows = source_axis(a, a.height).span[region / 3], columns = source_axis(a, a.width).span[region % 3];
  std::vector<Place> pixels;
  for (std::int64_t row = rows.first; row < rows.first + rows.count; ++row)
    for (std::int64_t column = columns.first; column < columns.first + columns.count; ++column)
      pixels.push_back({row, column});
  return pixels;
}

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
        scan_(scan_in_use()),
        region_(a, lists.region),
        places_(listed_pixels(a, lists.region)),
        layout_(a),
        prospects_(a, lists, options.dice) {}

  // Looks for the pixels of queries b0 .. b1 - 1.
  void run(std::int64_t b0, std::int64_t b1) {
    b0_ = b0;
    exact_.assign(static_cast<std::size_t>(b1 - b0), false);
    estimates_.assign(static_cast<std::size_t>((b1 - b0) * std::ssize(places_)), Estimate(a_.channels));
    fill_queries(b0, b1);
    // All pixels of several queries, or a part of those of one.
    const std::int64_t part = std::min(pixels_together, std::ssize(places_));
    for (std::int64_t from = 0; from < std::ssize(places_); from += part) {
      const std::int64_t to = std::min(std::ssize(places_), from + part);
      pixels_.clear();
      for (std::int64_t b = b0; b < b1; ++b)
        for (std::int64_t i = from; i < to; ++i) pixels_.push_back(pixel(b, i));
      search(to - from);
      search_again(to - from);
      conclude();
    }
  }

  // Fills `out` where the listed pixels of query b are; false when the exact engine is to be used.
  bool put(std::int64_t b, Partial& out) const {
    if (exact_[static_cast<std::size_t>(b - b0_)]) return false;
    for (std::int64_t i = 0; i < std::ssize(places_); ++i)
      put(places_[static_cast<std::size_t>(i)], estimates_[number_of_estimate(b, i)], out);
    return true;
  }

 private:
  double alpha(std::int64_t b) const { return std::max(a_.alpha[b], 1e-9); }  // at 0, x / alpha would be infinite
  bool is_exact(const Pixel& q) const { return exact_[static_cast<std::size_t>(q.b - b0_)]; }
  bool active(const Pixel& q) const { return !q.done && !is_exact(q); }
  std::size_t number_of_estimate(std::int64_t b, std::int64_t place) const {
    return static_cast<std::size_t>((b - b0_) * std::ssize(places_) + place);
  }
  Estimate& estimate(const Pixel& q) { return estimates_[number_of_estimate(q.b, q.number)]; }

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
            .x = queries_.data() + (b - b0_) * a_.channels * layout_.channel + (place.row + rows_off) * layout_.row +
                 place.column + columns_off,
            .scale = 0.5 * ratio * ratio / ln2};
  }

  // Estimates for pixels_. The exact engine, if a query is left to it, has so many pixels of it to evaluate.
  void search(std::int64_t of_query) {
    begin();
    weigh_lists();
    while (std::any_of(pixels_.begin(), pixels_.end(), [&](const Pixel& q) { return active(q); })) {
      for (std::int64_t first = 0, behind = 0; first < std::ssize(pixels_); first = behind) {
        behind = portion(first);
        pick(first, behind);
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
    std::vector<double> cost(exact_.size(), 0.0);
    for (const Pixel& q : pixels_) {
      const Estimate& found = estimate(q);
      if (is_exact(q) || static_cast<double>(found.certain) == prospects_.windows()) continue;
      const double deviations = std::min(furthest, prospects_.deviations(q, found.heaviest[0].log_w));
      if (deviations < far) continue;
      Pixel next = pixel(q.b, q.number);
      next.wider = deviations * deviations;
      next.tempering *= static_cast<float>(far / deviations);
      next.picks = std::min(prospects_.windows(), std::max(q.picks, first_picks * deviations));
      cost[static_cast<std::size_t>(q.b - b0_)] += pick_cost * next.picks;
      again.push_back(std::move(next));
      heaviest.push_back(found.heaviest);
    }
    if (again.empty()) return;
    leave_what_is_too_dear(cost, of_query);
    pixels_.swap(again);
    search(of_query);
    in_threads(options_.threads, std::ssize(pixels_), a_.interrupted, [&](auto take) {
      Weigher weigher(a_, region_, layout_);
      take([&](std::int64_t i, auto) {
        const Pixel& q = pixels_[static_cast<std::size_t>(i)];
        if (is_exact(q)) return;
        for (const Heavy& one : heaviest[static_cast<std::size_t>(i)])
          if (one.source >= 0) know(q, one.source, weigher);
      });
    });
    pixels_.swap(again);
  }

  void know(const Pixel& q, std::int64_t source, Weigher& weigher) {
    const std::int64_t size = a_.height * a_.width;
    const double log_w = weigher.log_weight(q, source / size, source % size);
    estimate(q).know(log_w, source, weigher.centre.data());
  }

  // Which lists can matter to which pixels, list by list.
  void begin() {
    std::vector<std::vector<Entry>> of_pixels(pixels_.size());
    each_pixel(
        0, std::ssize(pixels_),
        [&](Pixel& q, std::int64_t i, Prospects::Room& room) {
          of_pixels[static_cast<std::size_t>(i)] = prospects_.begin(q, static_cast<std::int32_t>(i), room);
        },
        [] { return Prospects::Room{}; });
    first_entry_.assign(static_cast<std::size_t>(lists_.count + 1), 0);
    for (std::size_t i = 0; i < pixels_.size(); ++i) {
      if (of_pixels[i].empty()) exact_[static_cast<std::size_t>(pixels_[i].b - b0_)] = true;
      for (const Entry& e : of_pixels[i]) ++first_entry_[static_cast<std::size_t>(e.list + 1)];
    }
    std::partial_sum(first_entry_.begin(), first_entry_.end(), first_entry_.begin());
    entries_.resize(static_cast<std::size_t>(first_entry_.back()));
    known_.assign(static_cast<std::size_t>(std::ssize(pixels_) * lists_.count), false);
    std::vector<std::int64_t> at(first_entry_.begin(), first_entry_.end() - 1);
    for (std::size_t i = 0; i < pixels_.size(); ++i) {
      for (const Entry& e : of_pixels[i]) {
        entries_[static_cast<std::size_t>(at[static_cast<std::size_t>(e.list)]++)] = e;
        known_[i * static_cast<std::size_t>(lists_.count) + static_cast<std::size_t>(e.list)] = true;
      }
      of_pixels[i] = {};
    }
  }

  // ---- Rounds over lists ----------------------------------------------------------------------------------------

  // How many members of a list a pixel looks at: whole blocks, or all.
  std::int64_t members(const Entry& e) const {
    const std::int64_t n = prospects_.size(e.list);
    if (e.part >= 1) return n;
    const auto wanted = static_cast<std::int64_t>(static_cast<double>(e.part) * static_cast<double>(n));
    return std::min(n, (wanted / list_block + 1) * list_block);
  }

  // look(picks, share, pixel, entry, task) for the entries of active pixels of from .. to - 1: list by list, and part by
  // part of its members, so that a part stays in the cache while it is looked at; before that prepare(pixel, entry).
  // `picks` has room for those of a part.
  template <class Prepare, class Look>
  void each_list(std::int64_t from, std::int64_t to, Prepare prepare, Look look) {
    const auto wanted = [&](const Entry& e) {
      return e.pixel >= from && e.pixel < to && active(pixels_[static_cast<std::size_t>(e.pixel)]);
    };
    in_threads(options_.threads, list_shares, a_.interrupted, [&](auto take) {
      std::vector<Pick> buffer(64 * list_block);
      std::vector<Entry*> looking;
      take([&](std::int64_t share, auto stop) {
        const std::int64_t part = std::ssize(buffer);
        for (std::int64_t l = share * lists_.count / list_shares; l < (share + 1) * lists_.count / list_shares; ++l) {
          looking.clear();
          std::int64_t most = 0;
          for (std::int64_t i = first_entry_[static_cast<std::size_t>(l)];
               i < first_entry_[static_cast<std::size_t>(l + 1)]; ++i) {
            Entry& e = entries_[static_cast<std::size_t>(i)];
            if (!wanted(e)) continue;
            prepare(pixels_[static_cast<std::size_t>(e.pixel)], e);
            most = std::max(most, members(e));
            looking.push_back(&e);
          }
          // From a block that the dice say to the end of the list, and on from its beginning.
          const std::int64_t start = prospects_.start(l), behind = prospects_.size(l) - start;
          for (const bool on : {false, true}) {
            const std::int64_t first = on ? 0 : start, run = on ? start : behind, before = on ? behind : 0;
            for (std::int64_t begin = 0; begin < std::min(run, most - before); begin += part)
              for (std::size_t i = 0; i < looking.size(); ++i) {
                if ((i & 15) == 0 && stop()) return;
                Entry& e = *looking[i];
                const std::int64_t end = std::min({members(e) - before, run, begin + part});
                if (begin < end)
                  look(buffer.data(), share, pixels_[static_cast<std::size_t>(e.pixel)], e,
                       task(l, first + begin, first + end));
              }
          }
        }
      });
    });
  }

  ScanTask task(std::int64_t l, std::int64_t from, std::int64_t to) const {
    const std::int64_t first = lists_.begin[l] + from;
    const std::int64_t tail_bytes = (lists_.directions_count - leading) / 4;
    return {.lead = lists_.lead + first * leading,
            .tail = lists_.tail + first * tail_bytes,
            .tail_block = tail_bytes * list_block,
            .members = to - from,
            .first = static_cast<std::uint32_t>(first)};
  }

  // Sums the tempered weights of a part of every list: what it takes to pick about so many windows.
  void weigh_lists() {
    each_list(
        0, std::ssize(pixels_), [](Pixel&, Entry&) {},
        [&](Pick*, std::int64_t, const Pixel& q, Entry& e, const ScanTask& t) {
          ScanQuery scan = q.scan;
          scan.top = e.top, scan.sum = static_cast<double>(e.sum), scan.squares = static_cast<double>(e.squares);
          scan_.scan_sum(t, scan);
          e.top = scan.top, e.sum = static_cast<float>(scan.sum), e.squares = static_cast<float>(scan.squares);
        });
    std::vector<double> top(pixels_.size(), -infinity), total(pixels_.size(), 0.0);
    for (const Entry& e : entries_) {
      double& largest = top[static_cast<std::size_t>(e.pixel)];
      largest = std::max(largest, static_cast<double>(e.top));
    }
    for (const Entry& e : entries_) {
      const auto i = static_cast<std::size_t>(e.pixel);
      const float below = e.top - static_cast<float>(top[i]);
      if (below < -40) continue;
      const double each = static_cast<double>(prospects_.size(e.list)) / static_cast<double>(members(e));
      total[i] += each * static_cast<double>(e.sum) * static_cast<double>(std::exp2(below));
    }
    for (std::size_t i = 0; i < pixels_.size(); ++i) pixels_[i].log_total = top[i] + std::log2(total[i]);
  }

  // Pixels from .. to - 1, as many as make no more than picks_together.
  std::int64_t portion(std::int64_t from) const {
    double picks = 0;
    std::int64_t to = from;
    for (; to < std::ssize(pixels_); ++to) {
      const Pixel& q = pixels_[static_cast<std::size_t>(to)];
      if (!active(q)) continue;
      picks += std::min((1 + alike) * q.picks, prospects_.windows());
      if (picks > picks_together && to > from) break;
    }
    return to;
  }

  void pick(std::int64_t from, std::int64_t to) {
    for (std::int64_t i = from; i < to; ++i) {
      Pixel& q = pixels_[static_cast<std::size_t>(i)];
      q.scan.rate = static_cast<float>(std::log2(q.picks) - q.log_total);
      q.scan.least = static_cast<float>(std::log2(alike * q.picks / prospects_.windows()));
    }
    found_.resize(static_cast<std::size_t>(list_shares * image_shares));
    for (std::vector<Found>& some : found_) some.clear();
    const auto how_much = [&](const Pixel& q, Entry& e) {
      const float typical = spare * std::exp2(e.top + q.scan.rate) * (e.squares / e.sum);
      const float by_model = model_spare * static_cast<float>(q.picks) * std::exp2(e.typical);
      const bool all = q.search && static_cast<double>(e.largest) > q.log_sum - near;
      e.part = all ? 1.0f : std::min(1.0f, std::max(typical, by_model));
    };
    each_list(from, to, how_much, [&](Pick* picks, std::int64_t share, const Pixel& q, Entry& e, const ScanTask& t) {
      const auto looked_at = static_cast<float>(members(e)) / static_cast<float>(prospects_.size(e.list));
      const float more = -std::log2(looked_at);
      ScanQuery scan = q.scan;
      scan.rate += more;
      scan.least = std::clamp(scan.least + more, -20.0f, 0.0f);  // dice have 24 bits
      const std::int64_t n = scan_.scan_pick(t, scan, picks);
      for (const Pick* p = picks; p < picks + n; ++p)
        found(share, e.pixel, std::int64_t{t.first} + p->member, p->probability * looked_at);
    });
    in_threads(options_.threads, list_shares, a_.interrupted, [&](auto take) {
      take([&](std::int64_t share, auto) {
        for (std::int64_t i = from; i < to; ++i)  // by the place in the image, so that other queries do not matter
          if (pixels_[static_cast<std::size_t>(i)].number % list_shares == share)
            pick_elsewhere(share, static_cast<std::int32_t>(i));
      });
    });
  }

  // Picks windows, all alike, of the lists that a pixel has no entry of.
  void pick_elsewhere(std::int64_t share, std::int32_t i) {
    const Pixel& q = pixels_[static_cast<std::size_t>(i)];
    if (!active(q) || q.members == prospects_.windows()) return;
    // Every so many of all members: windows lie in random order within their lists.
    const auto members = static_cast<double>(lists_.end[lists_.count - 1]);
    const double stride = std::max(1.0, members / (alike * q.picks));
    std::int64_t l = 0;
    for (double at = 0x1p-32 * q.scan.seed * stride; at < members; at += stride) {
      const auto member = static_cast<std::int64_t>(at);
      while (l + 1 < lists_.count && lists_.begin[l + 1] <= member) ++l;
      if (member < lists_.end[l] && !known_[static_cast<std::size_t>(i * lists_.count + l)])
        found(share, i, member, static_cast<float>(1 / stride));
    }
  }

  void found(std::int64_t share, std::int32_t pixel, std::int64_t member, float probability) {
    const auto window = static_cast<std::uint32_t>(lists_.window[member]);  // divisions of 32 bits are far quicker
    const auto pixels = static_cast<std::uint32_t>(a_.height * a_.width);
    // Of a mapped index that is written to meanwhile; whoever mapped it finds that out, but afterwards.
    if (window >= a_.images * pixels) return;
    const Place& at = pixels_[static_cast<std::size_t>(pixel)].place;
    const auto image = static_cast<std::int32_t>(window / pixels);
    const auto place = static_cast<std::int32_t>(region_.beside(window % pixels, at.row, at.column));
    found_[static_cast<std::size_t>(share * image_shares + image * image_shares / a_.images)].push_back(
        {pixel, image, place, probability});
  }

  // Weighs what was picked.
  void evaluate(std::int64_t from, std::int64_t to) {
    shares_.assign(static_cast<std::size_t>(image_shares * (to - from)), Estimate(a_.channels));
    weigh(from, to);
    each_pixel(
        from, to,
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
          const std::vector<Found>& some = found_[static_cast<std::size_t>(lists * image_shares + share)];
          for (std::size_t i = 0; i < some.size(); ++i) {
            if (i % 64 == 0 && stop()) return;
            if (i + 4 < some.size()) weigher.prefetch(some[i + 4].image, some[i + 4].place);
            const Found& f = some[i];
            const double log_w = weigher.log_weight(pixels_[static_cast<std::size_t>(f.pixel)], f.image, f.place);
            estimates[f.pixel - from].add(log_w, static_cast<double>(f.probability),
                                          f.image * a_.height * a_.width + f.place, weigher.centre.data());
          }
        }
      });
    });
  }

  // Who is done, and how much more the others need. They either get there, or become too dear.
  void settle(std::int64_t of_query) {
    std::vector<double> looked_at(pixels_.size(), 0.0);
    for (const Entry& e : entries_) looked_at[static_cast<std::size_t>(e.pixel)] += static_cast<double>(members(e));
    std::vector<double> cost(exact_.size(), 0.0);
    for (std::size_t i = 0; i < pixels_.size(); ++i) {
      Pixel& q = pixels_[i];
      if (!active(q)) continue;
      const Estimate& so_far = estimate(q);
      const double log_sum = so_far.m + std::log2(so_far.s);
      const bool search = !q.search && so_far.heaviest[0].log_w > log_sum + std::log2(heavy),
                 precise = q.error <= options_.tolerance;
      if (search) q.search = true, q.log_sum = log_sum;
      q.done = !search && precise;
      if (q.done) continue;
      const double wanted = 1.2 * std::pow(q.error / options_.tolerance, 2);
      if (!precise) q.picks *= std::clamp(std::isfinite(wanted) ? wanted : growth, 1.5, growth);
      cost[static_cast<std::size_t>(q.b - b0_)] += pick_cost * q.picks + look_cost * looked_at[i];
    }
    leave_what_is_too_dear(cost, of_query);
  }

  // To the exact engine: queries whose pixels would cost so much.
  void leave_what_is_too_dear(const std::vector<double>& cost, std::int64_t of_query) {
    for (std::size_t b = 0; b < cost.size(); ++b)
      if (cost[b] > most_of_exact * prospects_.windows() * static_cast<double>(of_query)) exact_[b] = true;
  }

  // Windows that are heavy for one pixel are weighed for those around it too: for these they may be in lists of which the
  // model says that nothing in them matters.
  void conclude() {
    std::vector<Heaviest> heaviest;
    for (const Pixel& q : pixels_) heaviest.push_back(estimate(q).heaviest);
    const HeavyBeside beside(a_, region_, pixels_, std::move(heaviest));
    in_threads(options_.threads, std::ssize(pixels_), a_.interrupted, [&](auto take) {
      Weigher weigher(a_, region_, layout_);
      take([&](std::int64_t i, auto) {
        const Pixel& q = pixels_[static_cast<std::size_t>(i)];
        if (is_exact(q)) return;
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
  const Lists& lists_;
  const Scan& scan_;
  const RegionWindows region_;
  const std::vector<Place> places_;
  const QueryLayout layout_;
  const Prospects prospects_;
  std::int64_t b0_ = 0;
  std::vector<Pixel> pixels_;
  std::vector<float> queries_;             // (queries, C, H + k - 1, W + k - 1)
  std::vector<char> exact_;                // (queries)
  std::vector<Estimate> estimates_;        // (queries, places)
  std::vector<Entry> entries_;             // list by list
  std::vector<std::int64_t> first_entry_;  // (lists + 1)
  std::vector<bool> known_;                // (pixels, lists) whether there is an entry
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
