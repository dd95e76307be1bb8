// What the windows picked for a pixel say of the sums over all of them.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace pyels {

// A window that was weighed: log2 of its weight, and the probability with which it was picked.
struct Heavy {
  double log_w = -std::numeric_limits<double>::infinity(), probability = 1;
  std::int64_t source = -1;

  bool before(const Heavy& other) const {
    return log_w > other.log_w || (log_w == other.log_w && source < other.source);
  }
};

using Heaviest = std::array<Heavy, 8>;  // in descending order

// Estimates of sum w and sum w * centre: of every window picked, its weight divided by the probability that it is
// (Horvitz and Thompson), with the variance that goes with that. Relative to 2^m.
class Estimate {
 public:
  explicit Estimate(std::int64_t channels) : sums_(static_cast<std::size_t>(3 * channels)) {}

  double m = -std::numeric_limits<double>::infinity();
  double s = 0, ss = 0;      // the sum of weights, and its variance
  double e = 0;              // the sum of w * (log2 w - m)
  std::int64_t certain = 0;  // number of windows that were picked surely
  Heaviest heaviest{};       // of those picked

  // Per channel: the sum of w * centre, its covariance with s, and its variance.
  double y(std::int64_t c) const { return sums_[static_cast<std::size_t>(3 * c)]; }
  double sy(std::int64_t c) const { return sums_[static_cast<std::size_t>(3 * c + 1)]; }
  double yy(std::int64_t c) const { return sums_[static_cast<std::size_t>(3 * c + 2)]; }

  // A window of weight 2^log_w, picked with this probability; `centre` has a value for each channel.
  void add(double log_w, double probability, std::int64_t from, const double* centre) {
    if (log_w > m) refer_to(log_w);
    count(log_w, probability, 1, centre);
    keep({log_w, probability, from});
  }

  // A window that is known without a pick, unless it is so light that it is not known whether it was picked.
  void know(double log_w, std::int64_t from, const double* centre) {
    const auto same = std::find_if(heaviest.begin(), heaviest.end(), [&](const Heavy& h) { return h.source == from; });
    if (same != heaviest.end()) {
      if (same->probability == 1) return;
      count(log_w, same->probability, -1, centre);
      count(log_w, same->probability = 1, 1, centre);
      // What is left of nearly all that there was is rounding.
      ss = std::max(0.0, ss), fourth_ = std::clamp(fourth_, 0.0, ss * ss);
    } else if (log_w > heaviest.back().log_w) {
      add(log_w, 1, from, centre);
    }
  }

  void add(Estimate other) {
    if (other.heaviest[0].source < 0) return;
    (other.m > m ? *this : other).refer_to(std::max(m, other.m));
    s += other.s, ss += other.ss, fourth_ += other.fourth_, e += other.e, certain += other.certain;
    for (std::size_t i = 0; i < sums_.size(); ++i) sums_[i] += other.sums_[i];
    for (const Heavy& one : other.heaviest) keep(one);
  }

  // A variance to which few windows contribute is poorly known, and more often too small than too large: where it is
  // that of n equal contributions, errors are made larger by few / n.
  void widen(double few) {
    if (ss < 1e-150) return;
    const double factor = std::pow(1 + few * fourth_ / (ss * ss), 2);
    ss *= factor;
    for (auto sum = sums_.begin(); sum != sums_.end(); sum += 3) sum[1] *= factor, sum[2] *= factor;
  }

  // So much may the mean be off by what was not seen.
  void allow_for(double unseen) {
    for (auto sum = sums_.begin(); sum != sums_.end(); sum += 3) sum[2] += std::pow(unseen * s, 2);
  }

  // The standard error of the mean, y / s, in the channel where it is largest: to first order, that of a ratio.
  double error() const {
    double largest = 0;
    for (auto sum = sums_.begin(); sum != sums_.end(); sum += 3) {
      const double mean = sum[0] / s;
      largest = std::max(largest, sum[2] - 2 * mean * sum[1] + mean * mean * ss);
    }
    return std::sqrt(largest) / s;
  }

 private:
  void refer_to(double to) {
    const double down = std::exp2(m - to), squared = down * down;
    e = down > 0 ? down * (e + s * (m - to)) : 0;
    s *= down, ss *= squared, fourth_ *= squared * squared;
    for (auto sum = sums_.begin(); sum != sums_.end(); sum += 3) sum[0] *= down, sum[1] *= squared, sum[2] *= squared;
    m = to;
  }
  // Once more, or with times = -1 no more.
  void count(double log_w, double probability, int times, const double* centre) {
    const double share = times * std::exp2(log_w - m) / probability;
    const double variance = times * share * share * (1 - probability);
    s += share, ss += variance, fourth_ += times * variance * variance, e += share * (log_w - m);
    certain += probability == 1 ? times : 0;
    for (auto sum = sums_.begin(); sum != sums_.end(); sum += 3, ++centre)
      sum[0] += share * *centre, sum[1] += variance * *centre, sum[2] += variance * *centre * *centre;
  }
  void keep(const Heavy& one) {
    if (!one.before(heaviest.back())) return;
    auto at = heaviest.end() - 1;
    for (; at != heaviest.begin() && one.before(at[-1]); --at) *at = at[-1];
    *at = one;
  }

  double fourth_ = 0;  // sum of squares of what ss is the sum of
  std::vector<double> sums_;
};

}  // namespace pyels
