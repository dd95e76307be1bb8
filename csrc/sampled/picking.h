// Which windows are picked for pixels, by what the descriptions in lists tell of their weights.
#pragma once

#include <cstdint>
#include <vector>

#include "sampled/engine.h"
#include "sampled/prospects.h"
#include "sampled/scan.h"
#include "sampled/windows.h"
#include "threads.h"

namespace pyels {

// A tenth of the windows are picked from all alike: where the descriptions or the model tell little, the variance shows it.
constexpr double alike = 0.1;
// Picks are made by so many shares of the lists, and weighed by so many shares of the bank's images, which stay in the
// cache meanwhile. Sums are added up in the order of shares, whichever threads worked on them.
constexpr std::int64_t list_shares = 64, image_shares = 64;

// A window that was picked for a pixel.
struct Found {
  std::int32_t pixel, image, place;
  float probability;
};

// Pixels of some queries that are searched for together.
struct Batch {
  std::int64_t first_query = 0;
  std::vector<char> exact{};  // (queries) which of them are left to the exact engine
  std::vector<Pixel> pixels{};

  bool is_exact(const Pixel& q) const { return exact[static_cast<std::size_t>(q.b - first_query)]; }
  bool active(const Pixel& q) const { return !q.done && !is_exact(q); }
};

// work(pixel, i, own) for the active pixels i of from .. to - 1; own = make() for each thread.
template <class Work, class Make>
void each_pixel(const Problem& a, const SampledOptions& options, Batch& batch, std::int64_t from, std::int64_t to,
                Work work, Make make) {
  in_threads(options.threads, to - from, a.interrupted, [&](auto take) {
    auto own = make();
    take([&](std::int64_t i, auto) {
      Pixel& q = batch.pixels[static_cast<std::size_t>(from + i)];
      if (batch.active(q)) work(q, from + i, own);
    });
  });
}

class Picking {
 public:
  Picking(const Problem& a, const SampledOptions& options, const Lists& lists, const RegionWindows& region,
          const Prospects& prospects)
      : a_(a), options_(options), lists_(lists), region_(region), prospects_(prospects), scan_(scan_in_use()) {}

  // Finds out which lists can matter to the pixels, and about how much their windows weigh.
  void begin(Batch& batch);
  // Picks windows for the active pixels from .. to - 1, as many as each wants.
  void pick(Batch& batch, std::int64_t from, std::int64_t to);
  // Those of a share of the lists that are in a share of the bank's images.
  const std::vector<Found>& found(std::int64_t list_share, std::int64_t image_share) const {
    return found_[static_cast<std::size_t>(list_share * image_shares + image_share)];
  }
  // At how many windows each pixel looks.
  std::vector<double> looked_at(const Batch& batch) const;

 private:
  void know_lists(Batch& batch);
  void weigh_lists(Batch& batch);
  std::int64_t members(const Entry& e) const;
  template <class Prepare, class Look>
  void each_list(Batch& batch, std::int64_t from, std::int64_t to, Prepare prepare, Look look);
  ScanTask task(std::int64_t l, std::int64_t from, std::int64_t to) const;
  void pick_elsewhere(const Batch& batch, std::int64_t share, std::int32_t i);
  void add(const Pixel& q, std::int64_t share, std::int32_t pixel, std::int64_t member, float probability);

  const Problem& a_;
  const SampledOptions& options_;
  const Lists& lists_;
  const RegionWindows& region_;
  const Prospects& prospects_;
  const Scan& scan_;
  std::vector<Entry> entries_{};             // list by list
  std::vector<std::int64_t> first_entry_{};  // (lists + 1)
  std::vector<bool> known_{};                // (pixels, lists) whether there is an entry
  std::vector<std::vector<Found>> found_{};  // (list_shares, image_shares)
};

}  // namespace pyels
