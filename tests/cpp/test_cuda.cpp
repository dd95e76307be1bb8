// The CUDA engine against the definition in double precision, and what it plans on the host. Built twice: for a GPU,
// as test_gpu, and without one, as test_cuda, the very same kernels on an emulation of blocks and threads
// (emulated/cuda_runtime.h).
#include <cuda_runtime.h>

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

// As an engine whose arrays are all on the host, and that writes into a sink.
void on_device(const Problem& a, const pyels::CudaOptions& options, pyels::Sink& sink) {
  const auto size = [](std::int64_t n) { return static_cast<std::size_t>(n); };
  const std::int64_t pixels = a.height * a.width;
  std::int64_t images = 0, ordered = 0;
  for (std::int64_t b = 0; b < a.queries; ++b) ordered = std::max(ordered, a.end[b]);
  for (std::int64_t i = 0; i < ordered; ++i) images = std::max(images, (a.order ? a.order[i] : i) + 1);
  const std::size_t values = size(images * a.channels * pixels);
  const OnDevice<std::uint8_t> bytes(a.pixels_uint8, a.pixels_uint8 ? values : 0);
  const OnDevice<float> floats(a.pixels_float, a.pixels_float ? values : 0);
  const OnDevice<std::int64_t> order(a.order, a.order ? size(ordered) : 0);
  const OnDevice<float> x(a.x, size(a.queries * a.channels * pixels));
  const std::size_t all = size(a.queries * pixels), extra = a.full() ? all : 0;
  const OnDevice<double> m(all), s(all), y(all * size(a.channels)), e(extra), top(extra);
  const OnDevice<std::int64_t> source(extra);
  Problem there = a;
  (a.pixels_uint8 ? void(there.pixels_uint8 = bytes.get()) : void(there.pixels_float = floats.get()));
  there.order = a.order ? order.get() : nullptr, there.x = x.get();
  const OnDevice<std::uint8_t> workspace(size(pyels::cuda_workspace(there, options, 0)));
  const pyels::Out out{
      .m = m.get(), .s = s.get(), .y = y.get(), .e = e.get(), .top = top.get(), .source = source.get()};
  pyels::cuda_engine(there, options, out, workspace.get(), 0, nullptr);
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
#if defined(PYELS_EMULATED)
            {"little shared memory", little_shared_memory},
            {"errors of the device are thrown", errors_of_the_device_are_thrown},
#endif
            {"plans keep within bounds", plans_keep_within_bounds},
            {"tensor cores are chosen", tensor_cores_are_chosen},
            {"tensor cores at their limit", tensor_cores_at_their_limit}, {
          "more images than distances are kept", more_images_than_distances_are_kept, true
        }
      },
      [] { exact_bounds.report(), tensor_core_bounds.report(); });
}
