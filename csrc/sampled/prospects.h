// Which lists can matter to a pixel of a query, and about how much: by a model of their windows.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "sampled/engine.h"
#include "sampled/scan.h"
#include "sampled/windows.h"
#include "threads.h"
#include "weighing.h"

namespace pyels {

constexpr double infinity = std::numeric_limits<double>::infinity();

// 2^32 over the golden ratio: multiples of it, modulo 2^32, lie evenly.
constexpr std::uint32_t golden = 0x9E3779B1u;
constexpr double first_picks = 1000;  // windows that are weighed for a pixel at first

struct Place {
  std::int64_t row, column;
};

// Queries as they are kept: over alpha and wrapped around, (C, H + k - 1, W + k - 1), in the bank's units, in which a
// pixel is unit * value + zero. Distances are then between their windows and the bank's.
struct QueryLayout {
  std::int64_t row, channel;  // from one to the next
  double unit, zero;

  explicit QueryLayout(const Problem& a)
      : row(a.width + a.patch_size - 1),
        channel(row * (a.height + a.patch_size - 1)),
        unit(a.pixels_uint8 ? 127.5 : 1.0),
        zero(a.pixels_uint8 ? 127.5 : 0.0) {}
};

// What a query pixel knows of a list.
struct Entry {
  std::int32_t pixel, list;
  float part = 1;              // of its members, that is looked at
  float largest;               // by the model, log2
  float typical;               // by the model, log2 of a pick's probability, were there one pick in all
  float top = -1e30f;          // log2 of the largest tempered weight by description
  float sum = 0, squares = 0;  // of these weights and of their squares, relative to 2^top
};

struct Pixel {
  std::int64_t b;       // query
  std::int64_t number;  // of the pixel, among those of its region
  Place place;
  std::int64_t overhang;  // by how much its window overhangs a side; 1 inside
  const float* x;         // its window, C * rows * columns of the query's pixels over alpha, in the bank's units
  double scale;           // log2 w = -scale * squared distance, in these units
  double wider = 1;       // by so much the variance of windows towards it is more than elsewhere
  // Windows are picked in proportion to their tempered weight, (weight by description) ^ tempering.
  float tempering = 0.75;
  bool done = false;
  bool search = false;                 // one window weighs more than `heavy`
  std::vector<std::int16_t> z{};       // along the leading directions, in steps
  std::vector<std::uint8_t> tables{};  // for the others
  ScanQuery scan{};
  double members = 0;  // of the lists that it knows
  double picks = first_picks, error = 0;
  double log_total = -infinity;  // log2 of the sum of tempered weights
  double log_sum = 0;            // where `search`: log2 of the sum of weights, as estimated first
};

// What the model says of the weights of a list's windows: they are log-normal.
struct Model {
  float mean, sd;          // of log2 w; and in nats
  float furthest, log2_n;  // standard deviations to the furthest of n windows; log2 n

  Model tempered(float tempering) const { return {tempering * mean, tempering * sd, furthest, log2_n}; }
  // log2 of the sum of weights: carried by windows as many standard deviations above the mean as there are nats in one,
  // or by the furthest.
  float sum() const {
    return std::min(log2_n, mean + (furthest < sd ? sd * furthest * bits : sd * sd / 2 * bits + log2_n));
  }
  // No weight is above 1.
  float largest() const { return std::min(0.0f, mean + sd * furthest * bits); }
  float typical() const { return std::min(0.0f, mean + std::min(1.5f * sd, furthest) * sd * bits); }  // by weight

  static constexpr float bits = static_cast<float>(1 / ln2);  // in a nat
};

class Prospects {
 public:
  Prospects(const Problem& a, const Lists& lists, std::uint32_t dice);

  // What a thread works in.
  struct Room {
    std::vector<float> z{}, distances{}, sums{};
    std::vector<Model> models{};
  };

  // Describes a pixel, and returns its entries, the lists that can matter, in their order; none where float32 distances
  // would spoil the weights, which is then left to the exact engine.
  std::vector<Entry> begin(Pixel& q, std::int32_t number, Room& room) const;

  // By how many standard deviations a pixel's heaviest window, of weight 2^log_w, is further away than noise explains:
  // the squared distance to the window that it is made of, over sigma^2, has the chi-squared distribution.
  double deviations(const Pixel& q, double log_w) const {
    const double n = values(q);
    return (-2 * ln2 * log_w - n) / std::sqrt(2 * n);
  }

  std::int64_t size(std::int64_t l) const { return lists_.end[l] - lists_.begin[l]; }
  double windows() const { return windows_; }  // of all lists
  // The member of a list, the first of a block, from which on it is looked at: with dice 0 its first one.
  std::int64_t start(std::int64_t l) const {
    const auto blocks = static_cast<std::uint64_t>((size(l) + list_block - 1) / list_block);
    const auto share = static_cast<std::uint32_t>(l + 1) * (dice_ * golden);  // of 2^32
    return static_cast<std::int64_t>(share * blocks >> 32) * list_block;
  }

 private:
  double describe(Pixel& q, std::vector<float>& z) const;
  void model(const Pixel& q, double outside, Room& room) const;  // of every list
  double values(const Pixel& q) const { return values_[static_cast<std::size_t>(q.overhang - 1)]; }
  // How many directions there are for such an overhang.
  std::int64_t usable(const Pixel& q) const {  // within bounds even if the index was written to
    return std::clamp<std::int64_t>(lists_.usable[q.overhang - 1] / 4 * 4, leading, lists_.directions_count);
  }

  const Lists& lists_;
  const std::uint32_t dice_;
  const Scan& scan_;
  const QueryLayout layout_;
  const RegionWindows region_;
  const std::int64_t channels_, rows_, columns_, dims_;  // of a window
  std::vector<double> values_;                           // (overhangs) of a window that are on the image
  struct Size {
    float log2, furthest;  // of n members; standard deviations to the furthest of n normal ones
  };
  std::vector<Size> sizes_;  // (lists)
  double windows_ = 0;
  std::vector<float> turned_;  // (dims, directions)
  Aligned<float> means_;       // (blocks, directions)[L] of lists
};

}  // namespace pyels
