// The CPU engine against the definition in double precision, on every instruction set that this CPU runs; and what of
// the reference engine no other has.
#include <atomic>
#include <cstring>
#include <thread>

#include "exact.h"

using namespace exact;

namespace {

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
          const std::vector<Partial> once = run(cpu_engine(), work.problem(full));
          for (const int threads : {2, 3, 5}) {
            const std::vector<Partial> again = run(cpu_engine(threads), work.problem(full));
            for (std::size_t b = 0; b < once.size(); ++b)
              check(identical(once[b], again[b]), std::to_string(threads) + " threads, query " + std::to_string(b));
          }
          for (std::size_t b = 0; b < once.size(); b += b < 5 ? 1 : 29) {
            const Problem one = only(work.problem(full), static_cast<std::int64_t>(b));
            check(identical(once[b], run(cpu_engine(2), one)[0]), "query " + std::to_string(b) + " alone");
          }
        }
      });
  }
}

// Of the reference engine: masks of ones are IS, and of the squares around the pixels LS, to the last bit; weights of
// any size are those of the formula.
void masks_weigh_every_pixel() {
  for (const std::int64_t channels : {1, 3}) {
    const Shape shape{channels, 5, 7};
    const std::vector<Level> levels{level(0.1), level(0.5), level(0.9)};
    const auto masked = [&](const Case& work, const auto& weight) {
      std::vector<double> masks;
      for (std::int64_t p = 0; p < shape.pixels(); ++p)
        for (std::int64_t z = 0; z < shape.size(); ++z) masks.push_back(weight(p, z));
      Problem a = work.problem();
      a.window = pyels::Window::masks, a.sources = pyels::Sources::same_position, a.masks = masks.data();
      return run(reference_engine, a);
    };
    const auto same = [&](const std::vector<Partial>& a, const std::vector<Partial>& b, const char* what) {
      for (std::size_t i = 0; i < a.size(); ++i) check(identical(a[i], b[i]), what);
    };
    context = "masks, C = " + std::to_string(channels);
    const Case is = Case(machines[0], shape, 9, 3, levels).with_classes(2), ls(machines[2], shape, 9, 3, levels);
    same(masked(is, [](auto, auto) { return 1.0; }), run(reference_engine, is.problem()), "ones are not IS");
    const auto square = [&](std::int64_t p, std::int64_t z) {
      return std::abs(p / shape.width - z / shape.width % shape.height) <= 1 &&
             std::abs(p % shape.width - z % shape.width) <= 1;
    };
    same(masked(ls, square), run(reference_engine, ls.problem()), "squares are not LS");
    const auto weight = [](std::int64_t p, std::int64_t z) { return 0.01 * static_cast<double>((7 * p + 3 * z) % 11); };
    const std::vector<Partial> ours = masked(ls, weight);
    for (std::size_t b = 0; b < levels.size(); ++b)
      for (std::int64_t p = 0; p < shape.pixels(); ++p) {
        double s = 0, y = 0;
        for (std::int64_t n = 0; n < ls.n; ++n) {
          double log_w = 0;
          const auto phi = [&](std::int64_t z) { return ls.bytes[n * shape.size() + z] / 127.5 - 1; };
          for (std::int64_t z = 0; z < shape.size(); ++z) {
            const double x = ls.x[static_cast<std::int64_t>(b) * shape.size() + z];
            log_w -= weight(p, z) * std::pow((x - ls.alpha[b] * phi(z)) / ls.sigma[b], 2) / 2;
          }
          s += std::exp(log_w - ours[b].m[p]), y += std::exp(log_w - ours[b].m[p]) * phi(p);
        }
        check(std::abs(s / ours[b].s[p] - 1) < 1e-9 && std::abs(y / s - ours[b].y[p] / ours[b].s[p]) < 1e-9,
              "not the weights of the formula");
      }
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
  const auto asked_to_stop = [](const Engine& engine, Problem a) {
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
    for (const int threads : {1, 3}) asked_to_stop(cpu_engine(threads), lengthy.problem(false));
    FailingSink sink;
    check_throws<std::length_error>([&] { cpu_engine(2)(quick.problem(false), sink); }, "the sink's exception");
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
    const Partial partial = run(cpu_engine(2), work.problem(false))[0];
    for (std::size_t p = 0; p < partial.s.size(); ++p) {
      bank_mean.see(std::abs(partial.y[p] / partial.s[p] - sum / count));
      all_counted.see(std::abs(partial.m[p] + std::log(partial.s[p]) - evidence_expected));
    }
  });
  std::printf("  worst: mean %.1e, log-evidence %.1e\n", bank_mean.worst, all_counted.worst);
}

}  // namespace

int main(int count, char** arguments) {
  on_every_engine = [](const std::string& what, const std::function<void(const Engine&)>& body) {
    on_every_isa(what, [&] { body(cpu_engine()); });
  };
  return run_tests(count, arguments,
                   {{"every window size", every_window_size},
                    {"bank sizes and classes", bank_sizes_and_classes},
                    {"extreme noise", extreme_noise},
                    {"every source counts once", every_source_counts_once},
                    {"threads and batches change no bit", threads_and_batches_change_no_bit},
                    {"the lowest image is the source", the_lowest_image_is_the_source},
                    {"parts of a bank merge to the whole", parts_of_a_bank_merge_to_the_whole},
                    {"masks weigh every pixel", masks_weigh_every_pixel},
                    {"threads stop when asked", work_stops_when_asked},
                    {"the instruction set can be chosen", instruction_set_can_be_chosen},
                    {"long sums keep their digits", long_sums_keep_their_digits, true}},
                   [] { exact_bounds.report(); });
}
