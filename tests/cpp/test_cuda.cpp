// The CUDA engine against the definition in double precision, and what it plans on the host. Built twice: for a GPU,
// as test_gpu, and without one, as test_cuda, the very same kernels on an emulation of blocks and threads
// (emulated/cuda_runtime.h).
#include <cuda_runtime.h>

#include <memory>

#include "cuda/plan.h"
#include "exact.h"

using namespace exact;

namespace {

void check_cuda(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

// An array on the device; what it holds at first, when nothing is copied there, is no number and must not matter.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(std::size_t n) : n_(n) {
    check_cuda(cudaMalloc(reinterpret_cast<void**>(&at_), std::max<std::size_t>(1, n * sizeof(T))));
    check_cuda(cudaMemset(at_, 0xff, n * sizeof(T)));
  }
  OnDevice(const T* from, std::size_t n) : OnDevice(n) {
    check_cuda(cudaMemcpy(at_, from, n * sizeof(T), cudaMemcpyHostToDevice));
  }
  ~OnDevice() { cudaFree(at_); }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

  T* get() const { return at_; }
  // Elements of query b, of as many as `to` has for each.
  void copy(std::int64_t b, std::vector<T>& to) const {
    check_cuda(cudaMemcpy(to.data(), at_ + static_cast<std::size_t>(b) * to.size(), to.size() * sizeof(T),
                          cudaMemcpyDeviceToHost));
  }

 private:
  T* at_ = nullptr;
  std::size_t n_;
};

// A problem whose arrays are on the host, with those of the bank and the queries on the device.
struct There {
  OnDevice<std::uint8_t> bytes;
  OnDevice<float> floats;
  OnDevice<std::int64_t> order;
  OnDevice<float> x;
  Problem problem;

  explicit There(const Problem& a)
      : bytes(a.pixels_uint8, a.pixels_uint8 ? values(a) : 0),
        floats(a.pixels_float, a.pixels_float ? values(a) : 0),
        order(a.order, a.order ? ordered(a) : 0),
        x(a.x, static_cast<std::size_t>(a.queries * a.channels * a.height * a.width)),
        problem(a) {
    (a.pixels_uint8 ? void(problem.pixels_uint8 = bytes.get()) : void(problem.pixels_float = floats.get()));
    problem.order = a.order ? order.get() : nullptr, problem.x = x.get();
  }

 private:
  static std::size_t ordered(const Problem& a) {
    return static_cast<std::size_t>(a.queries > 0 ? *std::max_element(a.end, a.end + a.queries) : 0);
  }
  static std::size_t values(const Problem& a) {
    std::size_t images = a.order ? 0 : ordered(a);
    for (std::size_t i = 0; a.order && i < ordered(a); ++i)
      images = std::max(images, static_cast<std::size_t>(a.order[i]) + 1);
    return images * static_cast<std::size_t>(a.channels * a.height * a.width);
  }
};

// As an engine whose arrays are all on the host, and that writes into a sink.
void on_device(const Problem& a, const pyels::CudaOptions& options, pyels::Sink& sink) {
  const There there(a);
  const std::int64_t pixels = a.height * a.width;
  const auto all = static_cast<std::size_t>(a.queries * pixels), extra = a.full() ? all : 0;
  const OnDevice<double> m(all), s(all), y(all * static_cast<std::size_t>(a.channels)), e(extra), top(extra);
  const OnDevice<std::int64_t> source(extra);
  const OnDevice<std::uint8_t> workspace(static_cast<std::size_t>(pyels::cuda_workspace(there.problem, options, 0)));
  const pyels::Out out{
      .m = m.get(), .s = s.get(), .y = y.get(), .e = e.get(), .top = top.get(), .source = source.get()};
  pyels::cuda_engine(there.problem, options, out, workspace.get(), 0, nullptr);
  check_cuda(cudaDeviceSynchronize());
  for (std::int64_t b = 0; b < a.queries; ++b) {
    Partial partial(pixels, a.channels, a.full());
    m.copy(b, partial.m), s.copy(b, partial.s), y.copy(b, partial.y);
    if (a.full()) e.copy(b, partial.e), top.copy(b, partial.top), source.copy(b, partial.source);
    sink.take(b, partial);
  }
}

void cuda_engine(const Problem& a, pyels::Sink& sink) { on_device(a, {}, sink); }
void with_tensor_cores(const Problem& a, pyels::Sink& sink) { on_device(a, {.tensor_cores = true}, sink); }

// Behind each bound the worst seen.
Bounds tensor_core_bounds{{"tensor cores: mean", 1e-4},                     // 3.0e-5
                          {"tensor cores: entropy", 3e-4},                  // 6.0e-5
                          {"tensor cores: source weight", 2e-4},            // 5.7e-5
                          {"tensor cores: log-evidence", 3e-4},             // 6.6e-5
                          {"tensor cores: log-evidence, not full", 3e-4}};  // 6.6e-5

// ---- The second pass ---------------------------------------------------------------------------------------------

// What it is told, and what it answers.
struct SecondPass {
  std::vector<double> log_sum, mean, cotangent, taps, folded, variance, derivative;

  SecondPass(const Case& work, std::uint64_t seed) {
    const std::size_t values = work.x.size();
    Random random(seed);
    log_sum.resize(work.alpha.size() * static_cast<std::size_t>(work.shape.pixels())), mean.resize(values);
    for (std::size_t i = 0; i < values; ++i) cotangent.push_back(random.normal());
    for (std::int64_t i = 0; i < work.k; ++i) taps.push_back(seed % 2 ? 1.0 : 0.2 + random.uniform());
    clear();
  }
  void clear() {
    for (std::vector<double>* answer : {&folded, &variance, &derivative}) answer->assign(mean.size(), 0.0);
  }

  // By what an engine finds in the first pass.
  SecondPass& after(const Engine& engine, Problem a) {
    a.want = pyels::want_mean | pyels::want_second;
    const std::vector<Partial> first = run(engine, a);
    const std::int64_t pixels = a.height * a.width, values = a.channels * pixels;
    for (std::int64_t i = 0; i < a.queries * values; ++i) {
      const Partial& of = first[i / values];
      const std::int64_t p = i % pixels;
      mean[i] = of.y[i % values] / of.s[p], log_sum[i / values * pixels + p] = of.m[p] + std::log(of.s[p]);
    }
    return *this;
  }

  pyels::Second second() {
    pyels::Second s;
    s.log_sum = log_sum.data(), s.mean = mean.data(), s.cotangent = cotangent.data(), s.fold_taps = taps.data();
    s.folded = folded.data(), s.variance = variance.data(), s.derivative = derivative.data();
    return s;
  }

  void on_device(const Problem& a) { on_device(a, second()); }
  // Of `s` what is not null.
  static void on_device(const Problem& a, const pyels::Second& s) {
    const There there(a);
    const auto values = static_cast<std::size_t>(a.queries * a.channels * a.height * a.width);
    const OnDevice<double> log_sum(s.log_sum, values / static_cast<std::size_t>(a.channels)),
        mean(s.mean, s.mean ? values : 0), cotangent(s.cotangent, s.cotangent ? values : 0),
        taps(s.fold_taps, static_cast<std::size_t>(a.patch_size));
    pyels::Second to;
    to.log_sum = log_sum.get(), to.mean = mean.get(), to.cotangent = cotangent.get(), to.fold_taps = taps.get();
    std::vector<std::unique_ptr<OnDevice<double>>> answers;
    for (const auto answer : {&pyels::Second::folded, &pyels::Second::variance, &pyels::Second::derivative})
      if (s.*answer)
        answers.push_back(std::make_unique<OnDevice<double>>(s.*answer, values)), to.*answer = answers.back()->get();
    const OnDevice<std::uint8_t> workspace(static_cast<std::size_t>(pyels::cuda_workspace(there.problem, to, 0)));
    pyels::cuda_second(there.problem, to, workspace.get(), 0, nullptr);
    check_cuda(cudaDeviceSynchronize());
    for (const auto answer : {&pyels::Second::folded, &pyels::Second::variance, &pyels::Second::derivative})
      if (s.*answer) check_cuda(cudaMemcpy(s.*answer, to.*answer, values * sizeof(double), cudaMemcpyDeviceToHost));
  }
};

Bounded folded_bound{"second pass: folded", 1e-4}, variance_bound{"second pass: variance", 1e-4},
    derivative_bound{"second pass: derivative", 1e-4};

double worst(const std::vector<double>& a, const std::vector<double>& b) {
  double most = 0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double error = std::abs(a[i] - b[i]);
    most = std::isfinite(error) ? std::max(most, error) : HUGE_VAL;
  }
  return most;
}

// Both passes, and the second one alone, told what the oracle found.
void compare_second(const Case& work, std::uint64_t seed) {
  const Problem a = work.problem();
  context = work.text() + " sigma=" + std::to_string(work.sigma[0]);
  SecondPass oracle(work, seed);
  oracle.after(reference_engine, a);
  pyels::reference_second(a, oracle.second());
  const std::int64_t r = work.k / 2, height = work.shape.height, width = work.shape.width;
  const auto cover = [&](std::int64_t n, std::int64_t z) {
    double sum = 0;
    for (std::int64_t i = 0; i < work.k; ++i)
      if (const std::int64_t p = z + r - i; work.machine.wraps() || (p >= 0 && p < n)) sum += oracle.taps[i];
    return sum;
  };
  double largest = 1e-3;
  for (const double v : oracle.derivative) largest = std::max(largest, std::abs(v));
  const double steepest = 0.03 * work.alpha[0] / (work.sigma[0] * work.sigma[0]);
  for (const bool told : {false, true}) {
    SecondPass ours(work, seed);
    told ? void((ours.log_sum = oracle.log_sum, ours.mean = oracle.mean)) : void(ours.after(cuda_engine, a));
    ours.on_device(a);
    for (std::size_t i = 0; i < ours.folded.size(); ++i) {
      const std::int64_t z = static_cast<std::int64_t>(i) % (height * width);
      folded_bound.see(std::abs(ours.folded[i] - oracle.folded[i]) /
                       (cover(height, z / width) * cover(width, z % width)));
    }
    variance_bound.see(worst(ours.variance, oracle.variance));
    // Where the posterior is all but one source the derivative is all but nothing, and what the first pass rounds of
    // the mean is what is left.
    derivative_bound.see(worst(ours.derivative, oracle.derivative) / (told ? largest : std::max(largest, steepest)));
  }
}

void second_pass_of_every_window() {
  const double sigmas[] = {0.05, 0.7, 0.2, 0.95, 0.4, 0.99, 0.02};
  std::uint64_t number = 0;
  for (const Machine& machine : machines)
    for (const std::int64_t k : {1, 3, 5, 7, 9, 11, 17, 25}) {
      if (machine.whole_image() || (machine.wraps() && k > (large ? 17 : 11))) continue;
      for (const std::int64_t channels : {1, 3}) {
        ++number;
        Shape shape{channels, number % 4 < 2 ? 9 : 6, number % 4 < 2 ? 10 : 17};
        if (machine.wraps() && k > 5) shape = {channels, k + static_cast<std::int64_t>(number % 3), k + 2};
        if (!large && k > 3 && channels == 1 + 2 * static_cast<std::int64_t>(k / 2 % 2)) continue;
        Case work(machine, shape, k > 9 ? 2 : large ? 5 : 3, k, {level(sigmas[number % 7])}, 40, number);
        if (number % 3 == 0) work.to_float();
        compare_second(work, number);
      }
    }
}

void second_pass_at_extreme_noise() {
  std::uint64_t number = 0;
  for (const Machine& machine : machines)
    for (const double sigma : {1e-3, 1e-2, 10.0, 1e3, 1e20}) {
      if (machine.whole_image()) continue;
      ++number;
      const std::int64_t k = number % 3 ? 3 : 7;
      Case work(machine, {1 + 2 * static_cast<std::int64_t>(number % 2), 7, 8}, 4, k, {level(sigma), {0.0, sigma}},
                number % 4 < 2 ? 40 : 0, number);
      for (float& v : work.x) v = std::clamp(v, -1e6f, 1e6f);
      compare_second(work, number);
    }
}

// More queries than a launch has, of classes, each of which is what it is alone; parts of a bank add up, and what is
// not asked for changes nothing.
void second_pass_of_batches_and_parts() {
  std::vector<Level> levels;
  for (int b = 0; b < pyels::cuda::most_queries + 3; ++b) levels.push_back(level((b + 1) / 40.0));
  for (const Machine& machine : machines) {
    if (machine.whole_image()) continue;
    const Case work = Case(machine, {1, 4, 5}, 5, 3, levels).with_classes(2);
    compare_second(work, 1);
    const Problem a = work.problem();
    SecondPass together(work, 2);
    together.after(cuda_engine, a).on_device(a);
    const std::int64_t pixels = work.shape.pixels();
    for (const std::int64_t b : {std::int64_t{0}, std::int64_t{17}, std::ssize(levels) - 1}) {
      SecondPass alone = together;
      alone.clear();
      const Problem one = only(a, b);
      pyels::Second s = alone.second(), folds;
      s.log_sum += b * pixels, s.mean += b * pixels, s.cotangent += b * pixels;
      SecondPass::on_device(one, s);
      for (const auto& [mine, all] : {std::pair{&alone.folded, &together.folded},
                                      {&alone.variance, &together.variance},
                                      {&alone.derivative, &together.derivative}})
        check(std::equal(mine->begin(), mine->begin() + pixels, all->begin() + b * pixels), "a query alone is another");
      folds.log_sum = s.log_sum, folds.fold_taps = s.fold_taps, folds.folded = alone.derivative.data();
      std::fill(alone.derivative.begin(), alone.derivative.end(), 0.0);
      SecondPass::on_device(one, folds);
      check(alone.derivative == alone.folded, "a fold alone is another");
    }
    SecondPass parts = together;
    parts.clear();
    for (const bool second_half : {false, true}) {
      Case part = work;
      for (std::size_t b = 0; b < levels.size(); ++b)
        (second_half ? part.begin : part.end)[b] = (work.begin[b] + work.end[b]) / 2;
      parts.on_device(part.problem());
    }
    check(worst(parts.folded, together.folded) < 1e-5 && worst(parts.variance, together.variance) < 1e-5,
          "the parts do not add up");
  }
}

// A pixel without a window answers nothing.
void second_pass_without_windows() {
  const Case work(machines[4], {1, 6, 7}, 5, 3, {level(0.5)});
  context = work.text();
  SecondPass some(work, 1);
  some.after(reference_engine, work.problem());
  for (std::size_t p = 0; p < some.log_sum.size(); ++p)
    if (p % 7 != 3) some.log_sum[p] = HUGE_VAL;
  some.on_device(work.problem());
  check(some.folded[0] == 0 && some.folded[2] != 0 && some.variance[0] == 0 && some.variance[3] > 0 &&
            some.derivative[0] == 0,
        "an answer from nowhere");
}

// ---- The first ---------------------------------------------------------------------------------------------------

// Images of several tiles, more channels than a thread holds, more queries than a launch: few patches, many places.
void several_tiles_channels_and_launches() {
  std::uint64_t number = 0;
  for (const Machine& machine : machines)
    for (const Shape shape : {Shape{1, 34, 35}, Shape{5, 33, 9}, Shape{9, 10, 34}})
      for (const std::int64_t k : {3, 7, 11}) {
        if (!large && !machine.whole_image() && k != (shape.channels == 1 ? 3 : shape.channels == 5 ? 7 : 11)) continue;
        if (machine.whole_image() && (k > 3 || shape.height > 33)) continue;
        if (machine.wraps() && k > std::min(shape.height, shape.width)) continue;
        if (shape.height > 33 && (machine.sources == pyels::Sources::circular || k == 7))
          continue;  // the oracle's time
        compare_with_oracle(Case(machine, shape, 2, k, {level(number % 2 ? 0.3 : 0.9)}, 40, number + 1));
        ++number;
      }
  std::vector<Level> levels;
  for (int b = 0; b < (large ? 2 : 1) * pyels::cuda::most_queries + 3; ++b) levels.push_back(level((b + 1) / 40.0));
  for (const Machine& machine : machines) {
    const Case work = Case(machine, {1, 5, 6}, large ? 20 : 6, 3, levels).with_classes(2);
    compare_with_oracle(work);
    for (const bool full : {false, true})
      for (const Engine& engine : {Engine(cuda_engine), Engine(with_tensor_cores)}) {
        const std::vector<Partial> together = run(engine, work.problem(full));
        for (const std::int64_t b : {std::int64_t{0}, std::int64_t{17}, std::ssize(levels) - 1})
          check(identical(together[b], run(engine, only(work.problem(full), b))[0]), "a query alone is another");
      }
  }
}

// Distances of whole images are kept for so many at a time.
void more_images_than_distances_are_kept() {
  const Machine& es = machines[1];
  Case work(es, {1, 4, 4}, pyels::cuda::most_entries / 16 + 20, 3, {level(0.5)});
  work.begin[0] = 7;
  const std::vector<Partial> oracle = run(reference_engine, work.problem());
  context = work.text();
  for (const bool full : {false, true}) compare(run(cuda_engine, work.problem(full))[0], oracle[0]);
}

// An exponent that is far from any float32, and weights that come in ascending order, so that it is raised again and
// again with sums behind it.
void exponents_are_raised() {
  for (const Machine& machine : machines)
    for (const double sigma : {1e-6, 3e-3, 0.02, 0.3, 1e25}) {
      Case work(machine, {3, 8, 7}, large ? 30 : 10, 5, {{1.0, sigma}, {0.5, sigma}});
      for (std::int64_t n = 0; n < work.n; ++n)  // towards the last image, which is the query
        for (std::int64_t i = 0; i < work.shape.size(); ++i)
          work.bytes[n * work.shape.size() + i] = static_cast<std::uint8_t>(130 - work.n + n);
      for (float& v : work.x) v = static_cast<float>(129 / 127.5 - 1);
      compare_with_oracle(work);
    }
}

#if defined(PYELS_EMULATED)
// Where shared memory is short, every window is worked off by the kernel that needs none.
void little_shared_memory() {
  emulated::shared_bytes = 9472;  // what the sums of its blocks take and little more
  for (const Machine& machine : machines)
    for (const std::int64_t channels : {4, 6}) {
      if (!large && channels == 4) continue;
      std::vector<Level> levels{level(0.1), level(0.9), level(1e-3)};
      if (!large) levels.resize(1);
      const Case work(machine, {channels, 9, 14}, large ? 4 : 2, 9, levels);
      context = work.text();
      if (!machine.whole_image())
        check(pyels::cuda::make_plan(work.problem(), {}, emulated::shared_bytes).method == pyels::cuda::Method::direct,
              "not the kernel without shared memory");
      compare_with_oracle(work);
      if (machine.whole_image()) continue;
      check(!pyels::cuda::make_second_plan(work.problem(), SecondPass(work, 1).second(), 9472).shared,
            "maps in shared memory that is not there");
      compare_second(work, 1);
    }
  emulated::shared_bytes = 227 * 1024;
}

void errors_of_the_device_are_thrown() {
  context = "launch";
  Case work(machines[5], {1, 8, 8}, 3, 3, {level(0.5)});
  Problem a = work.problem(false);
  a.queries = 0;
  emulated::launches = 0;
  run(cuda_engine, a);
  check(emulated::launches == 0, "work for no query");
  pyels::cuda::Plan plan = pyels::cuda::make_plan(work.problem(false), {}, 227 * 1024);
  check(plan.method == pyels::cuda::Method::maps, "not by maps");
  emulated::fails = true;
  check_throws<std::runtime_error>([&] { run(cuda_engine, work.problem(false)); }, "the error of a launch");
  emulated::fails = false;
}
#endif

// Of any size, on GPUs with much and with little shared memory.
void plans_keep_within_bounds() {
  using namespace pyels::cuda;
  for (const Machine& machine : machines)
    for (const std::int64_t side : {5, 28, 32, 64, 200})
      for (const std::int64_t channels : {1, 3, 16})
        for (const std::int64_t k : {1, 3, 7, 9, 17, 31, 101})
          for (const std::int64_t shared : {99 * 1024, 227 * 1024})
            for (const bool full : {false, true}) {
              if (machine.wraps() && !machine.whole_image() && k > side) continue;
              Case work(machine, {1, 1, 1}, 1, k, std::vector<Level>(20, level(0.5)));
              work.end.assign(20, 1'000'000);
              Problem a = work.problem(full);
              a.channels = channels, a.height = side, a.width = side + 3;
              const Plan plan = make_plan(a, {.tensor_cores = true}, shared);
              context = work.text() + " side " + std::to_string(side) + " channels " + std::to_string(channels);
              const std::int64_t partial = side * (side + 3) * plan.fields * 8;
              check(plan.workspace <= std::max(2 * workspace_bytes, 2 * partial), "a large workspace");
              const std::int64_t most = 1'000'000 / segments_of(a, plan, 1'000'000) + 1;  // images of a segment
              check(most * side * (side + 3) <= 0x7fffffff, "sources overflow");
              if (plan.method != Method::maps) continue;
              check(std::max(plan.layout.floats * 4, plan.product_shared) <= shared, "too much shared memory");
              check(plan.layout.threads <= most_threads && plan.layout.threads % 32 == 0, "threads");
              const auto covered = [&](const pyels::SourceAxis& axis) {
                std::int32_t next = 0, seen = 0;
                for (int tile = 0; tile < tiles_of(axis); ++tile) {
                  const pyels::Span span = tile_of(axis, tile);
                  check(span.count >= 1 && span.count <= tile_side, "a tile of no or too many pixels");
                  seen += span.count, next = std::max(next, span.first + span.count);
                }
                check(seen == axis.length && next == axis.length, "pixels are left out");
              };
              covered(plan.rows), covered(plan.columns);
            }
  // What is expected where the kernel for maps fits.
  const Case usual(machines[5], {3, 32, 32}, 1, 17, {level(0.9)});
  context = usual.text();
  for (const std::int64_t shared : {99 * 1024, 227 * 1024})
    check(make_plan(usual.problem(), {}, shared).method == Method::maps, "a usual size is not worked off by maps");
}

// The displacements of an axis are all of its pairs, once, and windows reach no further than maps have room for.
void plans_of_the_second_pass() {
  using namespace pyels::cuda;
  for (const Machine& machine : machines)
    for (const std::int64_t side : {1, 5, 28, 200})
      for (const std::int64_t k : {1, 3, 7, 17, 31, 101}) {
        if (machine.whole_image() || (machine.wraps() && k > side)) continue;
        Case work(machine, {1, 1, 1}, 1, k, std::vector<Level>(20, level(0.5)));
        work.end.assign(20, 1'000'000);
        Problem a = work.problem();
        a.channels = 3, a.height = side, a.width = side + 3;
        context = work.text() + " side " + std::to_string(side);
        double some = 0;
        pyels::Second second;
        second.folded = second.derivative = &some;
        const SecondPlan plan = make_second_plan(a, second, 99 * 1024);
        check(plan.workspace <= 2 * workspace_bytes + 2 * plan.segment_size, "a large workspace");
        check(plan.shared == (plan.floats * 4 <= 99 * 1024) && (side > 28 || k > 31 || plan.shared), "shared memory");
        for (const pyels::SourceAxis& axis : {plan.rows, plan.columns}) {
          std::int64_t pairs = 0, expected = 0;
          for (int i = 0; i < axis.spans; ++i) expected += std::int64_t{axis.span[i].count} * sources_of(axis.span[i]);
          for (int i = 0; i < shifts_of(axis); ++i) {
            const Shift shift = shift_of(axis, i);
            pairs += shift.count;
            check(shift.count >= 1 && shift.reach >= shift.count && shift.reach <= axis.length, "a displacement");
            check(shift.first - axis.window / 2 <= shift.reach_first, "windows reach further back");
          }
          check(pairs == expected, "pairs");
        }
      }
}

// Tensor cores are used where they are exact enough, and may be faster.
void tensor_cores_are_chosen() {
  using namespace pyels::cuda;
  for (const Machine& machine : machines)
    for (const auto& [channels, k] : {std::pair{1, 1}, {1, 3}, {1, 7}, {1, 9}, {3, 3}, {3, 5}, {3, 7}})
      for (const bool floats : {false, true}) {
        // Noise levels t = 0, 0.05, 0.15 and 0.9 of the cosine schedule.
        Case work(machine, {channels, 32, 32}, 1, k, {level(1e-3), level(0.0775), level(0.232), level(0.985)});
        if (floats) work.to_float();
        context = work.text();
        const Problem a = work.problem(false);
        Problem before_second = a;
        before_second.want |= pyels::want_second;
        check(!by_products(before_second, make_plan(a, {.tensor_cores = true}, 99 * 1024), 3),
              "used before a second pass");
        for (const bool asked : {false, true}) {
          const Plan plan = make_plan(a, {.tensor_cores = asked}, 99 * 1024);
          const bool everywhere = !machine.whole_image() && machine.sources != pyels::Sources::same_position;
          const bool able = asked && everywhere && channels * k * k <= 80 && !floats;
          check(!by_products(a, plan, 0), "used where the noise is too low");
          check(by_products(a, plan, 1) == (able && k == 1), "t = 0.05");
          check(by_products(a, plan, 2) == (able && channels * k * k < 75), "t = 0.15");
          check(by_products(a, plan, 3) == able, "t = 0.9");
        }
      }
}

// Where they are least exact: at the lowest noise at which they are used. Also of images that are black and white, of
// which an error of the weights shows most.
void tensor_cores_at_their_limit() {
  Bounded absolute{"tensor cores: log-evidence, absolute", 2e-3};  // 1.3e-3
  for (const auto& [channels, k] : {std::pair{1, 3}, {1, 5}, {1, 7}, {3, 3}, {3, 5}, {8, 3}})
    for (const Machine& machine : {machines[3], machines[5]})
      for (const bool black_and_white : {false, true}) {
        if (!large && black_and_white == (machine.sources == pyels::Sources::zeros)) continue;
        const auto case_of = [&, channels = channels, k = k](double sigma) {
          return Case(machine, {channels, 9, 11}, 8, k, {level(sigma), level(sigma)}, 40, 7 + k);
        };
        double low = 1e-3, high = 1;
        while (high / low > 1.001) {
          const double sigma = std::sqrt(low * high);
          const Case work = case_of(sigma);
          const Problem a = work.problem();
          const pyels::cuda::Plan plan = pyels::cuda::make_plan(a, {.tensor_cores = true}, 227 * 1024);
          (pyels::cuda::by_products(a, plan, 0) ? high : low) = sigma;
        }
        Case work = case_of(high);
        if (black_and_white) {
          for (std::uint8_t& v : work.bytes) v = v > 100 ? 255 : 0;
          Random random(5);
          for (std::size_t i = 0; i < work.x.size(); ++i) {
            const double x0 = i % 5 == 0 ? 1 : work.bytes[i] / 127.5 - 1;
            work.x[i] = static_cast<float>(work.alpha[0] * x0 + high * random.normal());
          }
        }
        context = work.text() + ", at the limit", bounds = &tensor_core_bounds;
        const std::vector<Partial> oracle = run(reference_engine, work.problem());
        const std::vector<Partial> ours = run(with_tensor_cores, work.problem());
        for (std::size_t b = 0; b < ours.size(); ++b) {
          compare(ours[b], oracle[b]);
          for (std::size_t p = 0; p < ours[b].s.size(); ++p)
            absolute.see(std::abs(ours[b].m[p] + std::log(ours[b].s[p]) - oracle[b].m[p] - std::log(oracle[b].s[p])));
        }
      }
  std::printf("  worst: log-evidence %.1e\n", absolute.worst);
}

}  // namespace

int main(int count, char** arguments) {
  on_every_engine = [](const std::string& what, const std::function<void(const Engine&)>& body) {
    context = what, bounds = &exact_bounds;
    body(cuda_engine);
    if (what.rfind("els", 0) != 0) return;  // the other machines have no use for them
    context += ", tensor cores", bounds = &tensor_core_bounds;
    body(with_tensor_cores);
  };
  return run_tests(
      count, arguments,
      {
        {"bank sizes and classes", bank_sizes_and_classes}, {"every source counts once", every_source_counts_once},
            {"every window size", every_window_size}, {"extreme noise", extreme_noise},
            {"the lowest image is the source", the_lowest_image_is_the_source},
            {"parts of a bank merge to the whole", parts_of_a_bank_merge_to_the_whole},
            {"several tiles, channels and launches", several_tiles_channels_and_launches},
            {"exponents are raised", exponents_are_raised},
            {"second pass of every window", second_pass_of_every_window},
            {"second pass at extreme noise", second_pass_at_extreme_noise},
            {"second pass of batches and parts", second_pass_of_batches_and_parts},
            {"second pass without windows", second_pass_without_windows},
#if defined(PYELS_EMULATED)
            {"little shared memory", little_shared_memory},
            {"errors of the device are thrown", errors_of_the_device_are_thrown},
#endif
            {"plans keep within bounds", plans_keep_within_bounds},
            {"plans of the second pass", plans_of_the_second_pass},
            {"tensor cores are chosen", tensor_cores_are_chosen},
            {"tensor cores at their limit", tensor_cores_at_their_limit}, {
          "more images than distances are kept", more_images_than_distances_are_kept, true
        }
      },
      [] {
        exact_bounds.report(), tensor_core_bounds.report();
        for (const Bounded& seen : {folded_bound, variance_bound, derivative_bound})
          std::printf("%s: worst error %.1e, bound %.0e\n", seen.what, seen.worst, seen.bound);
      });
}
