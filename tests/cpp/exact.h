// Tests of an engine that is exact to rounding, whichever it is: against the definition in double precision.
#pragma once

#include <functional>

#include "cases.h"
#include "checks.h"

namespace exact {

using namespace cases;
using namespace checks;
using pyels::Partial;
using pyels::Problem;
using pyels::reference_engine;

// Calls body(engine) for all that is to be tested, with `context` saying on what.
inline std::function<void(const std::string& what, const std::function<void(const Engine&)>& body)> on_every_engine;

// ---- Checking ---------------------------------------------------------------------------------------------------

struct Bounds {
  Bounded mean, entropy, source_weight;
  // Relative to 1 + |log-evidence|. Only the full posterior reports it; without, an error that all heavy weights share
  // does not matter: at sigma = 1e-3 the rounding of alpha to float32 is one.
  Bounded evidence, quick_evidence;

  void report() const {
    for (const Bounded& seen : {mean, entropy, source_weight, evidence, quick_evidence})
      if (seen.worst > 0) std::printf("%s: worst error %.1e, bound %.0e\n", seen.what, seen.worst, seen.bound);
  }
};

// Behind each bound the worst seen on any instruction set.
inline Bounds exact_bounds{{"mean", 1e-4},                     // 1.6e-5
                           {"entropy", 2e-4},                  // 2.0e-5
                           {"source weight", 1e-4},            // 3.1e-5
                           {"log-evidence", 3e-5},             // 2.2e-5
                           {"log-evidence, not full", 2e-4}};  // 6.0e-5
inline Bounds* bounds = &exact_bounds;                         // of the engine that is being tested

inline void compare(const Partial& ours, const Partial& oracle) {
  bounds->mean.see(mean_error(ours, oracle));
  for (std::size_t p = 0; p < oracle.s.size(); ++p) {
    const double expected = oracle.m[p] + std::log(oracle.s[p]);
    (ours.full ? bounds->evidence : bounds->quick_evidence)
        .see(std::abs(ours.m[p] + std::log(ours.s[p]) - expected) / (1 + std::abs(expected)));
    if (!ours.full) continue;
    bounds->entropy.see(
        std::abs((std::log(ours.s[p]) - ours.e[p] / ours.s[p]) - (std::log(oracle.s[p]) - oracle.e[p] / oracle.s[p])));
    const double heaviest = std::exp(oracle.top[p] - oracle.m[p]) / oracle.s[p];
    bounds->source_weight.see(std::abs(std::exp(ours.top[p] - ours.m[p]) / ours.s[p] - heaviest));
    if (heaviest > 0.51) check(ours.source[p] == oracle.source[p], "the heaviest source is another");
  }
}

inline void compare_with_oracle(const Case& work) {
  const std::vector<Partial> oracle = run(reference_engine, work.problem());
  on_every_engine(work.text(), [&](const Engine& engine) {
    for (const bool full : {false, true}) {
      const std::vector<Partial> ours = run(engine, work.problem(full));
      for (std::size_t b = 0; b < ours.size(); ++b) compare(ours[b], oracle[b]);
    }
  });
}

// Variance preserving: alpha^2 + sigma^2 = 1; beyond sigma = 1 the signal stays.
inline Level level(double sigma) { return {sigma < 1 ? std::sqrt(1 - sigma * sigma) : 1.0, sigma}; }

// ---- Tests ------------------------------------------------------------------------------------------------------

inline void every_window_size() {
  const Level levels[] = {level(0.05), level(0.7), level(0.2), level(0.95), level(0.4), level(0.99), level(0.1)};
  std::uint64_t number = 0;
  for (const Machine& machine : machines) {
    if (machine.whole_image()) continue;
    for (const std::int64_t k : {1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 25, 41}) {
      // Windows that fill the image in one direction, just fit, reach out on both sides, hold all of it.
      std::vector<std::pair<std::int64_t, std::int64_t>> sizes{{9, 16}, {5, 17}, {19, 12}};
      if (machine.wraps()) {
        if (k > 17) continue;
        sizes = {{k, k + 3}};
        if (k <= 9) sizes.push_back({k + 4, k + 1});
        if (machine.sources == pyels::Sources::interior) sizes.push_back({k + 1, 33});
      }
      if (!large) sizes = {sizes[number % sizes.size()]};
      for (const auto& [height, width] : sizes) {
        ++number;
        std::vector<Level> some{levels[number % 7]};
        if (large) some.push_back(levels[(number + 3) % 7]);
        // The oracle's time grows with the square of the pixels, times k * k.
        const bool dear = machine.wraps() && k > 9;
        if (dear) some.resize(1);
        Case work(machine, {number % 2 ? 1 : 3, height, width}, dear ? 2 : large ? 6 : 3, k, some, 40, number);
        if (number % 3 == 0) work.to_float();
        compare_with_oracle(work);
      }
    }
  }
}

inline void bank_sizes_and_classes() {
  std::uint64_t number = 0;
  for (const Machine& machine : machines)
    for (const std::int64_t n : {1, 15, 16, 17, 33})
      for (const std::int64_t channels : {1, 3}) {
        ++number;
        if (!large && (n == 15 || n == 33 || number % 3 == 0)) continue;
        const std::vector<Level> levels{level(0.1), level(0.3), level(0.6), level(0.9), level(0.98)};
        Case work(machine, {channels, 6, 9}, n, 3, levels, 40, number);
        if (number % 2 == 0) work.to_float();
        if (n > 1) work.with_classes(3);
        compare_with_oracle(work);
      }
}

inline void extreme_noise() {
  for (const Machine& machine : machines)
    for (const std::int64_t k : {3, 7}) {
      if (machine.whole_image() && k > 3) continue;
      std::vector<Level> levels;
      for (const double sigma : {1e-3, 1e-2, 1.0, 10.0, 1e3}) {
        levels.push_back({0.0, sigma});
        levels.push_back(level(sigma));
      }
      for (const double grain : {0.0, 40.0})
        if (large || (grain == 0) == (k == 3))
          compare_with_oracle(Case(machine, {1, 7, 10}, large ? 18 : 5, k, levels, grain));
    }
}

// alpha = 0 and x = 0: every weight is 1, and s counts the patches.
inline void every_source_counts_once() {
  for (const Machine& machine : machines)
    for (const std::int64_t k : {1, 3, 5, 9, 21}) {
      const Shape shape{1, 9, 12};
      if ((machine.wraps() && k > 9) || (machine.whole_image() && k > 1)) continue;
      Case work(machine, shape, large ? 19 : 5, k, {{0, 0.5}});
      work.x.assign(work.x.size(), 0.0f);
      const double expected = static_cast<double>(work.n * pairs_per_image(machine, shape.height, shape.width, k));
      const auto counted = [&](const Engine& engine) {
        const Partial partial = run(engine, work.problem(false))[0];
        double count = 0;
        for (std::size_t p = 0; p < partial.s.size(); ++p) count += std::exp(partial.m[p]) * partial.s[p];
        return count;
      };
      context = work.text() + ", reference";
      check(counted(reference_engine) == expected, "the oracle counts otherwise");
      on_every_engine(work.text(), [&](const Engine& engine) {
        const double count = counted(engine);
        check(std::abs(count - expected) < 0.1, "counted " + std::to_string(count) + " of " + std::to_string(expected));
      });
    }
}

// Of equally heavy patches: here all images are the same.
inline void the_lowest_image_is_the_source() {
  for (const Machine& machine : machines)
    for (const double sigma : {0.1, 0.9}) {
      if (!large && (sigma == 0.1) == machine.wraps()) continue;
      Case work(machine, {1, 4, 5}, 1100, 3, {level(sigma)});  // two or more in each of up to 512 parts
      for (std::int64_t n = 1; n < work.n; ++n)
        std::copy_n(work.bytes.begin(), work.shape.size(), work.bytes.begin() + n * work.shape.size());
      on_every_engine(work.text(), [&](const Engine& engine) {
        const Partial partial = run(engine, work.problem())[0];
        for (const std::int64_t source : partial.source)
          check(source < work.shape.pixels(), "the source is in image " + std::to_string(source / work.shape.pixels()));
      });
    }
}

inline void parts_of_a_bank_merge_to_the_whole() {
  for (const Machine& machine : machines) {
    std::vector<Level> levels{level(0.1), level(1e-3), level(0.5), level(0.95)};
    if (!large) levels.resize(2);
    Case work(machine, {3, 6, 7}, 40, 3, levels);
    const auto part = [&](const Engine& engine, std::int64_t begin, std::int64_t end) {
      work.begin.assign(work.begin.size(), begin), work.end.assign(work.end.size(), end);
      return run(engine, work.problem());
    };
    const std::vector<Partial> whole = part(reference_engine, 0, 40);
    const auto check_merge = [&](const Engine& engine, bool reference) {
      const std::vector<Partial> first = part(engine, 0, 17), second = part(engine, 17, 24);
      const std::vector<Partial> third = part(engine, 24, 40);
      for (std::size_t b = 0; b < whole.size(); ++b) {
        Partial left = first[b], right = second[b], empty(left.pixels, left.channels, true);
        merge(left, second[b]), merge(left, third[b]);
        merge(right, third[b]);
        Partial both = first[b];
        merge(both, right);
        compare(left, whole[b]), compare(both, whole[b]);
        check(mean_error(left, both) < 1e-12, "merging is not associative");
        if (reference) {
          check(mean_error(left, whole[b]) < 1e-12, "the merged mean is another");
          check(left.top == whole[b].top, "the merged maximum is another");
        }
        Partial before = left, after = empty;
        merge(before, empty), merge(after, left);
        check(identical(before, left) && identical(after, left), "the empty partial is not neutral");
        merge(empty, Partial(left.pixels, left.channels, true));
        check(identical(empty, Partial(left.pixels, left.channels, true)), "empty and empty is not empty");
      }
    };
    context = work.text() + ", reference";
    check_merge(reference_engine, true);
    on_every_engine(work.text(), [&](const Engine& engine) { check_merge(engine, false); });
  }
}

}  // namespace exact
