// Picks of windows; see picking.h.
#include "sampled/picking.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace pyels {
namespace {

// After the first part of every list, so large a part of each is looked at as is `spare` times the probability with
// which the typical window of weight in it is picked, by what was seen in the first part; but no less than `model_spare`
// times that by the model, as a first part may not show what matters.
constexpr float spare = 8, model_spare = 0.3f;
// Where a pixel is searched for neighbours, all of the lists are looked at where, by the model, a window may hold 2^-near of
// the weight.
constexpr double near = 12;

}  // namespace

void Picking::begin(Batch& batch) {
  know_lists(batch);
  weigh_lists(batch);
}

// Which lists can matter to which pixels, list by list.
void Picking::know_lists(Batch& batch) {
  std::vector<std::vector<Entry>> of_pixels(batch.pixels.size());
  each_pixel(
      a_, options_, batch, 0, std::ssize(batch.pixels),
      [&](Pixel& q, std::int64_t i, Prospects::Room& room) {
        of_pixels[static_cast<std::size_t>(i)] = prospects_.begin(q, static_cast<std::int32_t>(i), room);
      },
      [] { return Prospects::Room{}; });
  first_entry_.assign(static_cast<std::size_t>(lists_.count + 1), 0);
  for (std::size_t i = 0; i < batch.pixels.size(); ++i) {
    if (of_pixels[i].empty()) batch.exact[static_cast<std::size_t>(batch.pixels[i].b - batch.first_query)] = true;
    for (const Entry& e : of_pixels[i]) ++first_entry_[static_cast<std::size_t>(e.list + 1)];
  }
  std::partial_sum(first_entry_.begin(), first_entry_.end(), first_entry_.begin());
  entries_.resize(static_cast<std::size_t>(first_entry_.back()));
  known_.assign(static_cast<std::size_t>(std::ssize(batch.pixels) * lists_.count), false);
  std::vector<std::int64_t> at(first_entry_.begin(), first_entry_.end() - 1);
  for (std::size_t i = 0; i < batch.pixels.size(); ++i) {
    for (const Entry& e : of_pixels[i]) {
      entries_[static_cast<std::size_t>(at[static_cast<std::size_t>(e.list)]++)] = e;
      known_[i * static_cast<std::size_t>(lists_.count) + static_cast<std::size_t>(e.list)] = true;
    }
    of_pixels[i] = {};
  }
}

// How many members of a list a pixel looks at: whole blocks, or all.
std::int64_t Picking::members(const Entry& e) const {
  const std::int64_t n = prospects_.size(e.list);
  if (e.part >= 1) return n;
  const auto wanted = static_cast<std::int64_t>(static_cast<double>(e.part) * static_cast<double>(n));
  return std::min(n, (wanted / list_block + 1) * list_block);
}

// look(picks, share, pixel, entry, task) for the entries of active pixels of from .. to - 1: list by list, and part by
// part of its members, so that a part stays in the cache while it is looked at; before that prepare(pixel, entry).
// `picks` has room for those of a part.
template <class Prepare, class Look>
void Picking::each_list(Batch& batch, std::int64_t from, std::int64_t to, Prepare prepare, Look look) {
  const auto wanted = [&](const Entry& e) {
    return e.pixel >= from && e.pixel < to && batch.active(batch.pixels[static_cast<std::size_t>(e.pixel)]);
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
          prepare(batch.pixels[static_cast<std::size_t>(e.pixel)], e);
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
                look(buffer.data(), share, batch.pixels[static_cast<std::size_t>(e.pixel)], e,
                     task(l, first + begin, first + end));
            }
        }
      }
    });
  });
}

ScanTask Picking::task(std::int64_t l, std::int64_t from, std::int64_t to) const {
  const std::int64_t first = lists_.begin[l] + from;
  const std::int64_t tail_bytes = (lists_.directions_count - leading) / 4;
  return {.lead = lists_.lead + first * leading,
          .tail = lists_.tail + first * tail_bytes,
          .tail_block = tail_bytes * list_block,
          .members = to - from,
          .first = static_cast<std::uint32_t>(first)};
}

// Sums the tempered weights of a part of every list: what it takes to pick about so many windows.
void Picking::weigh_lists(Batch& batch) {
  each_list(
      batch, 0, std::ssize(batch.pixels), [](Pixel&, Entry&) {},
      [&](Pick*, std::int64_t, const Pixel& q, Entry& e, const ScanTask& t) {
        ScanQuery scan = q.scan;
        scan.top = e.top, scan.sum = static_cast<double>(e.sum), scan.squares = static_cast<double>(e.squares);
        scan_.scan_sum(t, scan);
        e.top = scan.top, e.sum = static_cast<float>(scan.sum), e.squares = static_cast<float>(scan.squares);
      });
  std::vector<double> top(batch.pixels.size(), -infinity), total(batch.pixels.size(), 0.0);
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
  for (std::size_t i = 0; i < batch.pixels.size(); ++i) batch.pixels[i].log_total = top[i] + std::log2(total[i]);
}

void Picking::pick(Batch& batch, std::int64_t from, std::int64_t to) {
  for (std::int64_t i = from; i < to; ++i) {
    Pixel& q = batch.pixels[static_cast<std::size_t>(i)];
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
  each_list(batch, from, to, how_much,
            [&](Pick* picks, std::int64_t share, const Pixel& q, Entry& e, const ScanTask& t) {
              const auto looked_at = static_cast<float>(members(e)) / static_cast<float>(prospects_.size(e.list));
              const float more = -std::log2(looked_at);
              ScanQuery scan = q.scan;
              scan.rate += more;
              scan.least = std::clamp(scan.least + more, -20.0f, 0.0f);  // dice have 24 bits
              const std::int64_t n = scan_.scan_pick(t, scan, picks);
              for (const Pick* p = picks; p < picks + n; ++p)
                add(q, share, e.pixel, std::int64_t{t.first} + p->member, p->probability * looked_at);
            });
  in_threads(options_.threads, list_shares, a_.interrupted, [&](auto take) {
    take([&](std::int64_t share, auto) {
      for (std::int64_t i = from; i < to; ++i)  // by the place in the image, so that other queries do not matter
        if (batch.pixels[static_cast<std::size_t>(i)].number % list_shares == share)
          pick_elsewhere(batch, share, static_cast<std::int32_t>(i));
    });
  });
}

// Picks windows, all alike, of the lists that a pixel has no entry of.
void Picking::pick_elsewhere(const Batch& batch, std::int64_t share, std::int32_t i) {
  const Pixel& q = batch.pixels[static_cast<std::size_t>(i)];
  if (!batch.active(q) || q.members == prospects_.windows()) return;
  // Every so many of all members: windows lie in random order within their lists.
  const auto members = static_cast<double>(lists_.end[lists_.count - 1]);
  const double stride = std::max(1.0, members / (alike * q.picks));
  std::int64_t l = 0;
  for (double at = 0x1p-32 * q.scan.seed * stride; at < members; at += stride) {
    const auto member = static_cast<std::int64_t>(at);
    while (l + 1 < lists_.count && lists_.begin[l + 1] <= member) ++l;
    if (member < lists_.end[l] && !known_[static_cast<std::size_t>(i * lists_.count + l)])
      add(q, share, i, member, static_cast<float>(1 / stride));
  }
}

void Picking::add(const Pixel& q, std::int64_t share, std::int32_t pixel, std::int64_t member, float probability) {
  const auto window = static_cast<std::uint32_t>(lists_.window[member]);  // divisions of 32 bits are far quicker
  const auto pixels = static_cast<std::uint32_t>(a_.height * a_.width);
  // Of a mapped index that is written to meanwhile; whoever mapped it finds that out, but afterwards.
  if (window >= a_.images * pixels) return;
  const auto image = static_cast<std::int32_t>(window / pixels);
  const auto place = static_cast<std::int32_t>(region_.beside(window % pixels, q.place.row, q.place.column));
  found_[static_cast<std::size_t>(share * image_shares + image * image_shares / a_.images)].push_back(
      {pixel, image, place, probability});
}

std::vector<double> Picking::looked_at(const Batch& batch) const {
  std::vector<double> looked_at(batch.pixels.size(), 0.0);
  for (const Entry& e : entries_) looked_at[static_cast<std::size_t>(e.pixel)] += static_cast<double>(members(e));
  return looked_at;
}

}  // namespace pyels
