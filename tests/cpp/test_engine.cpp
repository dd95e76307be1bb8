// The CPU engine against the definition in double precision, on every instruction set that this CPU runs.
//
//     test_engine            everything but the next; also the program to run under sanitizers
//     test_engine --large    sums over 1e8 patches
#include <atomic>
#include <cstring>
#include <thread>

#include "cases.h"
#include "checks.h"

using namespace cases;
using namespace checks;
using pyels::Partial;
using pyels::Problem;
using pyels::cpu_engine;
using pyels::reference_engine;

namespace {

// ---- Checking ---------------------------------------------------------------------------------------------------

// Behind each bound the worst seen on any instruction set.
Bounded mean{"mean", 1e-4};                    // 1.6e-5
Bounded entropy{"entropy", 2e-4};              // 2.0e-5
Bounded source_weight{"source weight", 1e-4};  // 3.1e-5
// Relative to 1 + |log-evidence|. Only the full posterior reports it; without, an error that all heavy weights share
// does not matter: at sigma = 1e-3 the rounding of alpha to float32 is one.
Bounded evidence{"log-evidence", 3e-5};                  // 2.2e-5
Bounded quick_evidence{"log-evidence, not full", 2e-4};  // 6.0e-5

void compare(const Partial& ours, const Partial& oracle) {
  mean.see(mean_error(ours, oracle));
  for (std::size_t p = 0; p < oracle.s.size(); ++p) {
    const double expected = oracle.m[p] + std::log(oracle.s[p]);
    (ours.full ? evidence : quick_evidence)
        .see(std::abs(ours.m[p] + std::log(ours.s[p]) - expected) / (1 + std::abs(expected)));
    if (!ours.full) continue;
    entropy.see(std::abs((std::log(ours.s[p]) - ours.e[p] / ours.s[p]) -
                         (std::log(oracle.s[p]) - oracle.e[p] / oracle.s[p])));
    const double heaviest = std::exp(oracle.top[p] - oracle.m[p]) / oracle.s[p];
    source_weight.see(std::abs(std::exp(ours.top[p] - ours.m[p]) / ours.s[p] - heaviest));
    if (heaviest > 0.51) check(ours.source[p] == oracle.source[p], "the heaviest source is another");
  }
}

void compare_with_oracle(const Case& work) {
  const std::vector<Partial> oracle = run(reference_engine, work.problem());
  on_every_isa(work.text(), [&] {
    for (const bool full : {false, true}) {
      const std::vector<Partial> ours = run(cpu_engine, work.problem(full));
      for (std::size_t b = 0; b < ours.size(); ++b) compare(ours[b], oracle[b]);
    }
  });
}

// Variance preserving: alpha^2 + sigma^2 = 1; beyond sigma = 1 the signal stays.
Level level(double sigma) { return {sigma < 1 ? std::sqrt(1 - sigma * sigma) : 1.0, sigma}; }

// ---- Tests ------------------------------------------------------------------------------------------------------

void every_window_size() {
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
      for (const auto& [height, width] : sizes) {
        ++number;
        std::vector<Level> some{levels[number % 7], levels[(number + 3) % 7]};
        // The oracle's time grows with the square of the pixels, times k * k.
        const bool dear = machine.wraps() && k > 9;
        if (dear) some.pop_back();
        Case work(machine, {number % 2 ? 1 : 3, height, width}, dear ? 2 : 6, k, some, 40, number);
        if (number % 3 == 0) work.to_float();
        compare_with_oracle(work);
      }
    }
  }
}

void bank_sizes_and_classes() {
  std::uint64_t number = 0;
  for (const Machine& machine : machines)
    for (const std::int64_t n : {1, 15, 16, 17, 33})
      for (const std::int64_t channels : {1, 3}) {
        ++number;
        const std::vector<Level> levels{level(0.1), level(0.3), level(0.6), level(0.9), level(0.98)};
        Case work(machine, {channels, 6, 9}, n, 3, levels, 40, number);
        if (number % 2 == 0) work.to_float();
        if (n > 1) work.with_classes(3);
        compare_with_oracle(work);
      }
}

void extreme_noise() {
  for (const Machine& machine : machines)
    for (const std::int64_t k : {3, 7}) {
      if (machine.whole_image() && k > 3) continue;
      std::vector<Level> levels;
      for (const double sigma : {1e-3, 1e-2, 1.0, 10.0, 1e3}) {
        levels.push_back({0.0, sigma});
        levels.push_back(level(sigma));
      }
      for (const double grain : {0.0, 40.0}) compare_with_oracle(Case(machine, {1, 7, 10}, 18, k, levels, grain));
    }
}

// alpha = 0 and x = 0: every weight is 1, and s counts the patches.
void every_source_counts_once() {
  for (const Machine& machine : machines)
    for (const std::int64_t k : {1, 3, 5, 9, 21}) {
      const Shape shape{1, 9, 12};
      if ((machine.wraps() && k > 9) || (machine.whole_image() && k > 1)) continue;
      Case work(machine, shape, 19, k, {{0, 0.5}});
      work.x.assign(work.x.size(), 0.0f);
      const double expected = static_cast<double>(work.n * pairs_per_image(machine, shape.height, shape.width, k));
      const auto counted = [&](Engine engine) {
        const Partial partial = run(engine, work.problem(false))[0];
        double count = 0;
        for (std::size_t p = 0; p < partial.s.size(); ++p) count += std::exp(partial.m[p]) * partial.s[p];
        return count;
      };
      context = work.text() + ", reference";
      check(counted(reference_engine) == expected, "the oracle counts otherwise");
      on_every_isa(work.text(), [&] {
        const double count = counted(cpu_engine);
        check(std::abs(count - expected) < 0.1, "counted " + std::to_string(count) + " of " + std::to_string(expected));
      });
    }
}

// More queries and images than the engine handles at once; any thread count, any company, the same bits.
void threads_and_batches_change_no_bit() {
  for (const Machine& machine : machines) {
    std::vector<Level> levels;
    for (int b = 0; b < 70; ++b) levels.push_back(level((b + 1) / 71.0));
    const Case many_queries = Case(machine, {1, 5, 6}, 20, 3, levels).with_classes(2);
    const Case many_images(machine, {3, 6, 7}, 160, 5, {level(0.2), level(0.9), level(1e-3)});
    for (const Case& work : {many_queries, many_images})
      on_every_isa(work.text(), [&] {
        for (const bool full : {false, true}) {
          const std::vector<Partial> once = run(cpu_engine, work.problem(full));
          for (const int threads : {2, 3, 5}) {
            const std::vector<Partial> again = run(cpu_engine, work.problem(full, threads));
            for (std::size_t b = 0; b < once.size(); ++b)
              check(identical(once[b], again[b]), std::to_string(threads) + " threads, query " + std::to_string(b));
          }
          for (std::size_t b = 0; b < once.size(); b += b < 5 ? 1 : 29) {
            const Problem one = only(work.problem(full, 2), static_cast<std::int64_t>(b));
            check(identical(once[b], run(cpu_engine, one)[0]), "query " + std::to_string(b) + " alone");
          }
        }
      });
  }
}

void parts_of_a_bank_merge_to_the_whole() {
  for (const Machine& machine : machines) {
    Case work(machine, {3, 6, 7}, 40, 3, {level(0.1), level(0.5), level(0.95), level(1e-3)});
    const auto part = [&](Engine engine, std::int64_t begin, std::int64_t end) {
      work.begin.assign(work.begin.size(), begin), work.end.assign(work.end.size(), end);
      return run(engine, work.problem());
    };
    const std::vector<Partial> whole = part(reference_engine, 0, 40);
    const auto check_merge = [&](Engine engine) {
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
        if (engine == reference_engine) {
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
    check_merge(reference_engine);
    on_every_isa(work.text(), [&] { check_merge(cpu_engine); });
  }
}

std::atomic<int> times_asked;
std::atomic<bool> asked_elsewhere;
std::thread::id caller;

bool stop_now() {
  ++times_asked;
  if (std::this_thread::get_id() != caller) asked_elsewhere = true;
  return true;
}

struct FailingSink : pyels::Sink {
  void take(std::int64_t, const Partial&) override { throw std::length_error("full"); }
};

// Interruption, and errors: whatever is thrown reaches the caller, with no thread left behind (which would terminate).
void work_stops_when_asked() {
  caller = std::this_thread::get_id();
  const auto asked_to_stop = [](Engine engine, Problem a) {
    times_asked = 0, asked_elsewhere = false;
    a.interrupted = stop_now;
    check_throws<pyels::Interrupted>([&] { run(engine, a); }, "Interrupted");
    check(times_asked >= 1 && !asked_elsewhere, "not asked, or by another thread");
  };
  const Case quick(machines[3], {1, 6, 6}, 5, 3, {level(0.5)});
  // Seconds of work if nobody stops it: the engine asks a few times a second.
  const Case lengthy(machines[3], {1, 24, 24}, 3000, 9, std::vector<Level>(8, level(0.5)));
  context = "reference";
  asked_to_stop(reference_engine, quick.problem());
  on_every_isa("long work", [&] {
    for (const int threads : {1, 3}) asked_to_stop(cpu_engine, lengthy.problem(false, threads));
    FailingSink sink;
    check_throws<std::length_error>([&] { cpu_engine(quick.problem(false, 2), sink); }, "the sink's exception");
  });
}

void instruction_set_can_be_chosen() {
  const std::vector<const char*> isas = pyels::available_isas();
  context = "PYELS_ISA";
  check(!isas.empty(), "no instruction set");
  for (const char* isa : isas) {
    use_isa(isa);
    check(std::strcmp(pyels::isa_in_use(), isa) == 0, std::string(isa) + " was not obeyed");
  }
  use_isa("");
  check(std::strcmp(pyels::isa_in_use(), isas.front()) == 0, "not the best by default");
  use_isa("pentium");
  check_throws<std::invalid_argument>([] { pyels::isa_in_use(); }, "invalid_argument");
}

// 1.02e8 patches that weigh nearly alike, where a float32 sum stops growing at 1.7e7: the mean is the bank's, and the
// evidence counts every patch.
void long_sums_keep_their_digits() {
  const Shape shape{1, 8, 8};
  const std::int64_t n = 1'600'000;
  Case work(machines[3], shape, 1, 3, {{1.0, 1e3}});
  work.x.assign(work.x.size(), 0.0f);
  work.n = work.end[0] = n;
  work.bytes.resize(n * shape.size());
  Random random(7);
  double sum = 0, squares = 0;
  for (std::uint8_t& v : work.bytes) {
    v = static_cast<std::uint8_t>(random.bits() % 200);  // not centred on 0
    const double value = v / 127.5 - 1;
    sum += value, squares += value * value;
  }
  const auto count = static_cast<double>(work.bytes.size());
  // Of weights exp(-d / 2e6), d the sum of 9 squares, the logarithm of the mean is this to 1e-11. The centre's share of
  // d moves the mean by less than 2e-7.
  const double evidence_expected = std::log(count) - 9 * squares / count / 2e6;
  Bounded bank_mean{"mean of the bank", 1e-5};            // worst seen 1.3e-7
  Bounded all_counted{"log-evidence of the bank", 1e-5};  // worst seen 5.2e-7
  on_every_isa(work.text(), [&] {
    const Partial partial = run(cpu_engine, work.problem(false, 2))[0];
    for (std::size_t p = 0; p < partial.s.size(); ++p) {
      bank_mean.see(std::abs(partial.y[p] / partial.s[p] - sum / count));
      all_counted.see(std::abs(partial.m[p] + std::log(partial.s[p]) - evidence_expected));
    }
  });
  std::printf("  worst: mean %.1e, log-evidence %.1e\n", bank_mean.worst, all_counted.worst);
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<Test> tests{{"every window size", every_window_size},
                          {"bank sizes and classes", bank_sizes_and_classes},
                          {"extreme noise", extreme_noise},
                          {"every source counts once", every_source_counts_once},
                          {"threads and batches change no bit", threads_and_batches_change_no_bit},
                          {"parts of a bank merge to the whole", parts_of_a_bank_merge_to_the_whole},
                          {"work stops when asked", work_stops_when_asked},
                          {"the instruction set can be chosen", instruction_set_can_be_chosen}};
  if (count == 2 && std::strcmp(arguments[1], "--large") == 0)
    tests = {{"long sums keep their digits", long_sums_keep_their_digits}};
  else if (count != 1)
    return std::fprintf(stderr, "usage: %s [--large]\n", arguments[0]), 2;
  const int failed = run_tests(tests);
  for (const Bounded& seen : {mean, entropy, source_weight, evidence, quick_evidence})
    if (seen.worst > 0) std::printf("%s: worst error %.1e, bound %.0e\n", seen.what, seen.worst, seen.bound);
  return failed != 0;
}
