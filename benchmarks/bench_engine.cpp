// How fast the CPU engine evaluates pairs (one query window against one bank patch), for every instruction set that
// this CPU runs, every machine, window size and 1 or 3 channels, on 32x32 images. Built with -DPYELS_BENCHMARKS=ON.
//
//     bench_engine --benchmark_filter='els_interior/k:9/C:1/isa:x86-64-v4'
//     PYELS_THREADS=1 bench_engine --benchmark_out=result.json --benchmark_repetitions=5
//
// PYELS_THREADS is the number of threads, by default the CPUs. Two counters:
//
//     pairs_per_second      as Machine.pairs of pyels/machines.py counts
//     fma_ceiling_fraction  the k * k * C multiply-adds that a pair's distance takes by itself, per second, over the
//                           float32 multiply-adds per second that this instruction set and as many threads do at best,
//                           measured here. Dense-equivalent work, clipped or not: an engine that shares arithmetic
//                           between pairs, as displacement maps do, can exceed 1. (IS and ES share one distance among
//                           all H * W pixels: C multiply-adds a pair.)
//
// Every result is compared with the reference engine, on the first images of the bank, before it is timed. The images
// are smooth, and noise level and window size go together as in the paper's calibrations, so that weights concentrate
// as they do on real images: how many there are to evaluate depends on it.
#include <benchmark/benchmark.h>

#include <chrono>
#include <map>
#include <optional>
#include <thread>

#include "../tests/cpp/cases.h"
#include "fma_ceiling.h"

using namespace cases;

namespace {

constexpr std::int64_t kHeight = 32, kWidth = 32;
constexpr double kBound = 1e-4;  // of the mean against the reference engine, as in the tests

int threads() {
  const char* given = std::getenv("PYELS_THREADS");
  const int n = given ? std::atoi(given) : static_cast<int>(std::thread::hardware_concurrency());
  return std::max(n, 1);
}

// Multiply-adds per second on all threads, the best of a few tries.
double fma_ceiling(const std::string& isa) {
  static std::map<std::string, double> known;
  double& best = known[isa];
  if (best > 0) return best;
  const pyels_benchmarks::FmaLoop* loop = nullptr;
  for (const pyels_benchmarks::FmaLoop* each : pyels_benchmarks::fma_loops)
    if (isa == each->isa) loop = each;
  constexpr std::int64_t rounds = 10'000'000;
  for (int attempt = 0; attempt < 5; ++attempt) {
    const auto start = std::chrono::steady_clock::now();
    std::vector<std::thread> others;
    const auto work = [&] { benchmark::DoNotOptimize(loop->run(rounds, 0.999f, 0.001f)); };
    for (int i = 1; i < threads(); ++i) others.emplace_back(work);
    work();
    for (std::thread& thread : others) thread.join();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
    best = std::max(best, static_cast<double>(rounds) * loop->multiply_adds * threads() / seconds.count());
  }
  return best;
}

// The noise level at which a window of this size predicts a trained network best: t = .05 for k = 3 to .95 for k = 17,
// on the cosine schedule.
Level calibrated(std::int64_t k) {
  const double angle = (0.05 + 0.9 * static_cast<double>(k - 3) / 14) / 1.008 * 1.5707963267948966;
  return {std::cos(angle), std::sin(angle)};
}

// Machine, window size and channels, whatever the instruction set. Made when it is first run.
struct Work {
  const Machine* machine;
  std::int64_t k, channels;
  std::optional<Case> made;
  std::vector<pyels::Partial> oracle;  // of the first query over the first images

  // Where one image gives few pairs, more of them, so that starting threads is not what is timed.
  std::int64_t images() const {
    if (machine->sources == pyels::Sources::same_position) return 2048;
    return machine->whole_image() ? 16 : 128;
  }

  pyels::Problem problem() {
    if (!made) {
      const Level level = calibrated(machine->whole_image() ? 17 : k);
      made.emplace(*machine, Shape{channels, kHeight, kWidth}, images(), k, std::vector<Level>(4, level), 10);
    }
    return made->problem(false);
  }

  // The first query over two images: enough to find an engine that computes something else, and still fast.
  double error() {
    static const std::int64_t few = 2;
    pyels::Problem a = only(problem(), 0);
    a.end = &few;
    if (oracle.empty()) oracle = run(pyels::reference_engine, a);
    return mean_error(run(cpu_engine(threads()), a)[0], oracle[0]);
  }

  double pairs() {
    const std::int64_t queries = problem().queries;
    return static_cast<double>(queries * images() * pairs_per_image(*machine, kHeight, kWidth, k));
  }
};

void time_engine(benchmark::State& state, Work& work, const char* isa) {
  use_isa(isa);
  const double error = work.error();
  if (!(error <= kBound)) {
    state.SkipWithError(("differs from the reference engine by " + std::to_string(error)).c_str());
    return;
  }
  struct Ignore : pyels::Sink {
    void take(std::int64_t, const pyels::Partial& partial) override { benchmark::DoNotOptimize(partial.s.data()); }
  } sink;
  const pyels::Problem a = work.problem();
  const Engine engine = cpu_engine(threads());
  engine(a, sink);  // warm up
  const auto start = std::chrono::steady_clock::now();
  for (auto _ : state) engine(a, sink);
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;

  const double pairs_per_second = work.pairs() * static_cast<double>(state.iterations()) / seconds.count();
  const auto multiply_adds = static_cast<double>(work.channels * (work.machine->whole_image() ? 1 : work.k * work.k));
  state.counters["pairs_per_second"] = pairs_per_second;
  state.counters["fma_ceiling_fraction"] = pairs_per_second * multiply_adds / fma_ceiling(isa);
}

}  // namespace

int main(int count, char** arguments) {
  static std::vector<Work> all;
  for (const Machine& machine : machines)
    for (std::int64_t k = 3; k <= 17; k += 2)
      for (const std::int64_t channels : {1, 3})
        if (!machine.whole_image() || k == 3) all.push_back({&machine, k, channels, {}, {}});
  for (Work& work : all)
    for (const char* isa : pyels::available_isas()) {
      const std::string size = work.machine->whole_image() ? "" : "/k:" + std::to_string(work.k);
      const std::string name = work.machine->name + size + "/C:" + std::to_string(work.channels) + "/isa:" + isa;
      benchmark::RegisterBenchmark(name.c_str(), time_engine, std::ref(work), isa)
          ->Unit(benchmark::kMillisecond)
          ->UseRealTime();  // the CPU time of this thread says nothing about the others
    }
  benchmark::Initialize(&count, arguments);
  if (benchmark::ReportUnrecognizedArguments(count, arguments)) return 2;
  benchmark::AddCustomContext("engine_threads", std::to_string(threads()));
  for (const char* isa : pyels::available_isas())
    benchmark::AddCustomContext(std::string("multiply_adds_per_second_") + isa, std::to_string(fma_ceiling(isa)));
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
  return 0;
}
