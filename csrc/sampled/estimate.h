// What the windows picked for a pixel say of the sums over all of them.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace pyels {

// Estimates of sum w and sum w * centre: of every window picked, its weight divided by the probability that it is
// (Horvitz and Thompson), with the variance that goes with that. Relative to 2^m.
class Estimate {
 public:
  explicit Estimate(std::int64_t channels) : sums_(static_cast<std::size_t>(3 * channels)) {}

  double m = -std::numeric_limits<double>::infinity();
  double s = 0, ss = 0;  // the sum of weights, and its variance
  double e = 0;          // the sum of w * (log2 w - m)
  double top = m;        // log2 of the heaviest weight
  std::int64_t source = -1;
  std::int64_t certain = 0;  // number of windows that were picked surely

  // Per channel: the sum of w * centre, its covariance with s, and its variance.
  double y(std::int64_t c) const { return sums_[static_cast<std::size_t>(3 * c)]; }
  double sy(std::int64_t c) const { return sums_[static_cast<std::size_t>(3 * c + 1)]; }
  double yy(std::int64_t c) const { return sums_[static_cast<std::size_t>(3 * c + 2)]; }

  // A window of weight 2^log_w, picked with this probability; `centre` has a value for each channel.
  void add(double log_w, double probability, std::int64_t from, const double* centre) {
    if (log_w > m) refer_to(log_w);
    const double share = std::exp2(log_w - m) / probability, variance = share * share * (1 - probability);
    s += share, ss += variance, fourth_ += variance * variance, e += share * (log_w - m), certain += probability == 1;
    for (auto sum = sums_.begin(); sum != sums_.end(); sum += 3, ++centre)
      sum[0] += share * *centre, sum[1] += variance * *centre, sum[2] += variance * *centre * *centre;
    heaviest(log_w, from);
  }

  void add(Estimate other) {
    if (other.source < 0) return;
    (other.m > m ? *this : other).refer_to(std::max(m, other.m));
    s += other.s, ss += other.ss, fourth_ += other.fourth_, e += other.e, certain += other.certain;
    for (std::size_t i = 0; i < sums_.size(); ++i) sums_[i] += other.sums_[i];
    heaviest(other.top, other.source);
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
  void heaviest(double log_w, std::int64_t from) {
    if (log_w > top || (log_w == top && from < source)) top = log_w, source = from;
  }

  double fourth_ = 0;  // sum of squares of what ss is the sum of
  std::vector<double> sums_;
};

}  // namespace pyels
