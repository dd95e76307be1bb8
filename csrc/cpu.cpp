// The exact CPU engine: picks the instruction set, cuts the bank into fixed segments, lets threads work through them,
// and merges their partial posteriors in the order of the bank. Neither the segments nor the order of any sum depends
// on the number of threads or on the other queries, so the result does not either.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <limits>
#include <memory>
#include <mutex>
#include <string>
#include <thread>

#include "kernel.h"
#include "pyels.h"

namespace pyels {
namespace {

// ---- Instruction sets ------------------------------------------------------------------------------------------

std::vector<const Kernel*> runnable_kernels() {
  std::vector<const Kernel*> kernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") &&
                  __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("movbe");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512cd");
  if (v4) kernels.push_back(&x86_64_v4::kernel);
  if (v3) kernels.push_back(&x86_64_v3::kernel);
  if (v2) kernels.push_back(&x86_64_v2::kernel);
#else
  kernels.push_back(&generic::kernel);
#endif
  return kernels;
}

const Kernel& kernel_in_use() {
  const std::vector<const Kernel*> kernels = runnable_kernels();
  if (kernels.empty()) throw std::runtime_error("this CPU lacks x86-64-v2 (SSE4.2), the least the cpu engine needs");
  const char* forced = std::getenv("PYELS_ISA");
  if (!forced || !*forced) return *kernels.front();
  std::string allowed;
  for (const Kernel* kernel : kernels) {
    if (std::strcmp(kernel->isa, forced) == 0) return *kernel;
    allowed += (allowed.empty() ? "" : ", ") + std::string(kernel->isa);
  }
  throw std::invalid_argument("PYELS_ISA is '" + std::string(forced) + "'; this CPU runs " + allowed);
}

// ---- Source sets as displacements --------------------------------------------------------------------------------

// The displacements along one axis of length n, for windows of radius r (see Axis). Rows and columns are alike, and
// every source set is the product of its two axes.
class AxisPlan {
 public:
  AxisPlan(const Problem& a, std::int32_t n, std::int32_t r) {
    if (a.window == Window::image) r = 0;
    switch (a.sources) {
      case Sources::same_position:
        clipped(n, r, 0, 0, n);
        break;
      case Sources::zeros:
        // At d = 0 every pixel meets its own overhang; elsewhere only interior pixels meet, interior with interior.
        for (std::int32_t d = -(n - 1); d < n; ++d) {
          if (d == 0)
            clipped(n, r, 0, 0, n);
          else
            clipped(n, r, d, std::max(r, r - d), std::min(n - r, n - r - d));
        }
        break;
      case Sources::circular:
        for (std::int32_t d = 0; d < n; ++d) wrapped(n, r, d, 0, n);
        break;
      case Sources::interior:
        for (std::int32_t d = 0; d < n; ++d) wrapped(n, r, d, r, n - r);
        break;
    }
    for (std::size_t i = 0; i < axes_.size(); ++i) {
      const std::vector<std::int32_t>& c = coordinates_[i];
      Axis& axis = axes_[i];
      axis.map_query = c.data();
      axis.map_source = axis.map_query + axis.map_size;
      axis.p = axis.map_source + axis.map_size;
      axis.q = axis.p + axis.outputs;
    }
  }

  const Axis* axes() const { return axes_.data(); }
  std::int32_t size() const { return static_cast<std::int32_t>(axes_.size()); }

 private:
  // Pixels p0 <= p < p1 against p + d, windows clipped to the axis.
  void clipped(std::int32_t n, std::int32_t r, std::int32_t d, std::int32_t p0, std::int32_t p1) {
    if (p0 >= p1) return;
    const std::int32_t first = p0 - r;
    build(p1 - p0 + 2 * r, p1 - p0, std::max(0, -first), std::min(p1 + r, n) - first,
          [&](std::int32_t i) { return std::clamp(first + i, 0, n - 1); },
          [&](std::int32_t i) { return std::clamp(first + i + d, 0, n - 1); },
          [&](std::int32_t i) { return p0 + i; }, [&](std::int32_t i) { return p0 + i + d; });
  }

  // Sources q0 <= q < q1 against q - d, everything modulo n.
  void wrapped(std::int32_t n, std::int32_t r, std::int32_t d, std::int32_t q0, std::int32_t q1) {
    const auto mod = [n](std::int32_t i) { return ((i % n) + n) % n; };
    const std::int32_t size = q1 - q0 + 2 * r;
    build(size, q1 - q0, 0, size, [&](std::int32_t i) { return mod(q0 - r + i - d); },
          [&](std::int32_t i) { return mod(q0 - r + i); }, [&](std::int32_t i) { return mod(q0 + i - d); },
          [&](std::int32_t i) { return q0 + i; });
  }

  template <class MapQuery, class MapSource, class P, class Q>
  void build(std::int32_t map_size, std::int32_t outputs, std::int32_t begin, std::int32_t end, MapQuery map_query,
             MapSource map_source, P p, Q q) {
    std::vector<std::int32_t> c;
    for (std::int32_t i = 0; i < map_size; ++i) c.push_back(map_query(i));
    for (std::int32_t i = 0; i < map_size; ++i) c.push_back(map_source(i));
    for (std::int32_t i = 0; i < outputs; ++i) c.push_back(p(i));
    for (std::int32_t i = 0; i < outputs; ++i) c.push_back(q(i));
    axes_.push_back({map_size, begin, end, outputs, nullptr, nullptr, nullptr, nullptr});
    coordinates_.push_back(std::move(c));
  }

  std::vector<Axis> axes_;
  std::vector<std::vector<std::int32_t>> coordinates_;
};

struct Plan {
  const Problem& a;
  const Kernel& kernel;
  std::int32_t radius_rows, radius_columns;  // beyond these a window holds the whole axis wherever it stands
  AxisPlan rows, columns;
  std::int64_t pixels;
  std::int32_t rows_per_call;  // of displacements

  // About so many float32 terms may meet in one sum before it is moved into double.
  static constexpr std::int64_t max_terms = 128;

  explicit Plan(const Problem& problem)
      : a(problem),
        kernel(kernel_in_use()),
        radius_rows(static_cast<std::int32_t>(std::min(a.patch_size / 2, a.height - 1))),
        radius_columns(static_cast<std::int32_t>(std::min(a.patch_size / 2, a.width - 1))),
        rows(a, static_cast<std::int32_t>(a.height), radius_rows),
        columns(a, static_cast<std::int32_t>(a.width), radius_columns),
        pixels(a.height * a.width) {
    rows_per_call = static_cast<std::int32_t>(std::clamp<std::int64_t>(max_terms / columns.size(), 1, rows.size()));
  }

  std::int64_t displacements() const { return std::int64_t{rows.size()} * columns.size(); }
  bool whole_image() const { return a.window == Window::image; }
  std::int64_t images(std::int64_t b) const { return a.end[b] - a.begin[b]; }
  std::int64_t blocks(std::int64_t b) const { return (images(b) + kernel.lanes - 1) / kernel.lanes; }

  // Segments are what threads share out. Their number must not depend on the number of threads. Every segment of a
  // group of queries has its partial posterior in memory; these take about `partials_bytes` whatever the image size.
  static constexpr std::int64_t partials_bytes = std::int64_t{64} << 20;
  std::int64_t partial_bytes() const { return pixels * (a.channels + (a.full ? 5 : 2)) * 8; }
  std::int64_t max_segments() const { return std::clamp<std::int64_t>(partials_bytes / partial_bytes(), 8, 64); }
  std::int64_t segments(std::int64_t b) const { return std::min(blocks(b), max_segments()); }
  std::int64_t queries_in_group() const {
    return std::clamp<std::int64_t>(partials_bytes / (max_segments() * partial_bytes()), 1, 64);
  }
};

// ---- One thread's work -------------------------------------------------------------------------------------------

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Aligned = std::unique_ptr<T[], Free>;

template <class T>
Aligned<T> aligned(std::int64_t n) {
  void* p = std::aligned_alloc(64, (static_cast<std::size_t>(n) * sizeof(T) + 63) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return Aligned<T>(static_cast<T*>(p));
}

class Worker {
 public:
  explicit Worker(const Plan& plan)
      : plan_(plan),
        a_(plan.a),
        lanes_(plan.kernel.lanes),
        states_(plan.whole_image() ? 1 : plan.pixels),
        unit_(a_.pixels_uint8 ? 1 / 127.5 : 1.0),
        panel_(aligned<float>(a_.channels * plan.pixels * lanes_)),
        bias_(aligned<float>(lanes_)),
        reference_(aligned<double>(states_)),
        s_(aligned<float>(states_ * lanes_)),
        y_(aligned<float>(a_.channels * plan.pixels * lanes_)),
        e_(aligned<float>(a_.full ? states_ * lanes_ : 1)),
        best_(aligned<double>(a_.full ? states_ * lanes_ : 1)),
        best_at_(aligned<std::int32_t>(a_.full ? states_ * lanes_ : 1)),
        scratch_(aligned<float>(kernel_scratch(a_.height, a_.width) * lanes_)),
        flushed_(plan.pixels, a_.channels, a_.full) {}

  // Adds the images of one segment of query b to `total`.
  template <class Stop>
  void run(std::int64_t b, std::int64_t segment, Partial& total, Stop stop) {
    const std::int64_t blocks = plan_.blocks(b), segments = plan_.segments(b);
    const std::int64_t first = segment * blocks / segments, last = (segment + 1) * blocks / segments;
    KernelTask task = make_task(b);
    // The reference stays from flush to flush, so that weights are measured against the whole segment's maximum.
    std::fill_n(reference_.get(), states_, -std::numeric_limits<double>::infinity());
    clear();
    std::int64_t terms = 0, first_block = first;
    for (std::int64_t block = first; block < last; ++block) {
      fill_panel(b, block);
      for (std::int32_t row = 0; row < plan_.rows.size(); row += plan_.rows_per_call) {
        if (stop()) return;
        task.rows = plan_.rows.axes() + row;
        task.n_rows = std::min(plan_.rows_per_call, plan_.rows.size() - row);
        task.at = static_cast<std::int32_t>((block - first_block) * plan_.pixels);
        plan_.kernel.accumulate(task);
        terms += std::int64_t{task.n_rows} * task.n_columns;
        const bool last_call = block + 1 == last && row + task.n_rows == plan_.rows.size();
        const bool numbers_end = (block + 2 - first_block) * plan_.pixels > std::numeric_limits<std::int32_t>::max();
        if (terms < Plan::max_terms && !last_call && !numbers_end) continue;
        flush(b, first_block);
        merge(total, flushed_);
        clear();
        terms = 0;
        first_block = block;
      }
    }
  }

 private:
  KernelTask make_task(std::int64_t b) const {
    KernelTask t{};
    t.channels = a_.channels, t.height = a_.height, t.width = a_.width;
    t.x = a_.x + b * a_.channels * plan_.pixels;
    t.k_rows = 2 * plan_.radius_rows + 1, t.k_columns = 2 * plan_.radius_columns + 1;
    t.alpha = a_.alpha[b] * unit_;
    t.scale = 0.5 / (a_.sigma[b] * a_.sigma[b]);
    // The rounding errors of a sum along rows, then of rows.
    t.least_scale =
        static_cast<float>(t.scale * (1 - 5e-7 - 3e-9 * static_cast<double>(a_.height + a_.width + a_.channels)));
    // float32 distances err by 5e-8 of log w (rounding of sums) and by 8e-8 * sqrt(scale * log w) (rounding of pixels);
    // where they are random, either is kept below 3e-5. A query like any other has about half as many nats as its window
    // has pixels. Far beyond that no weight is left to float32, whether it stands out or not: many equal ones would err
    // together.
    t.exact_above = static_cast<float>(std::min(600.0 / t.scale, 1.4e5 / (t.scale * t.scale)));
    const std::int64_t window_pixels =
        a_.channels * (plan_.whole_image() ? plan_.pixels : std::int64_t{t.k_rows} * t.k_columns);
    const double far = std::min(1e5, 300 * std::sqrt(static_cast<double>(window_pixels)));
    t.always_exact_above = static_cast<float>(far / t.scale);
    // All weights left out together are less than 1e-8 of the sum.
    t.skip = static_cast<float>(
        std::min(80.0, std::log(static_cast<double>(plan_.images(b) * plan_.displacements())) + std::log(1e8)));
    t.panel = panel_.get(), t.bias = bias_.get();
    t.whole_image = plan_.whole_image();
    t.columns = plan_.columns.axes(), t.n_columns = plan_.columns.size();
    t.full = a_.full;
    t.reference = reference_.get(), t.s = s_.get(), t.y = y_.get();
    t.e = e_.get(), t.best = best_.get(), t.best_at = best_at_.get();
    t.scratch = scratch_.get();
    return t;
  }

  void clear() {
    std::fill_n(s_.get(), states_ * lanes_, 0.0f);
    std::fill_n(y_.get(), a_.channels * plan_.pixels * lanes_, 0.0f);
    if (!a_.full) return;
    std::fill_n(e_.get(), states_ * lanes_, 0.0f);
    std::fill_n(best_.get(), states_ * lanes_, -std::numeric_limits<double>::infinity());
    std::fill_n(best_at_.get(), states_ * lanes_, 0);
  }

  std::int64_t image(std::int64_t b, std::int64_t block, int lane) const {
    const std::int64_t n = a_.begin[b] + block * lanes_ + lane;
    return a_.order ? a_.order[n] : n;
  }

  // Spreads the pixels of the block's images over the lanes.
  void fill_panel(std::int64_t b, std::int64_t block) {
    const std::int64_t size = a_.channels * plan_.pixels, left = plan_.images(b) - block * lanes_;
    for (int lane = 0; lane < lanes_; ++lane) {
      bias_[lane] = lane < left ? 0.0f : -std::numeric_limits<float>::infinity();
      float* to = panel_.get() + lane;
      if (lane >= left) {
        for (std::int64_t i = 0; i < size; ++i) to[i * lanes_] = 0.0f;
      } else if (a_.pixels_uint8) {
        const std::uint8_t* from = a_.pixels_uint8 + image(b, block, lane) * size;
        for (std::int64_t i = 0; i < size; ++i) to[i * lanes_] = static_cast<float>(from[i]) - 127.5f;
      } else {
        const float* from = a_.pixels_float + image(b, block, lane) * size;
        for (std::int64_t i = 0; i < size; ++i) to[i * lanes_] = from[i];
      }
    }
  }

  // Sums the lanes of the state in double.
  void flush(std::int64_t b, std::int64_t first_block) {
    Partial& out = flushed_;
    const auto lane_sum = [this](const float* v) {
      double sum = 0.0;
      for (int lane = 0; lane < lanes_; ++lane) sum += v[lane];
      return sum;
    };
    for (std::int64_t p = 0; p < plan_.pixels; ++p) {
      const std::int64_t state = plan_.whole_image() ? 0 : p;
      out.m[p] = reference_[state];
      out.s[p] = lane_sum(s_.get() + state * lanes_);
      for (std::int64_t c = 0; c < a_.channels; ++c)
        out.y[c * plan_.pixels + p] = unit_ * lane_sum(y_.get() + (c * plan_.pixels + p) * lanes_);
      if (!a_.full) continue;
      out.e[p] = lane_sum(e_.get() + state * lanes_);
      out.top[p] = -std::numeric_limits<double>::infinity();
      out.source[p] = -1;
      std::int64_t first = 0;  // image and displacement of the heaviest so far: the lower goes before its equals
      for (int lane = 0; lane < lanes_; ++lane) {
        const double log_w = best_[state * lanes_ + lane];
        if (log_w < out.top[p] || std::isinf(log_w)) continue;
        const std::int64_t at = best_at_[state * lanes_ + lane];
        const std::int64_t number = image(b, first_block + at / plan_.pixels, lane);
        const std::int64_t candidate = number * plan_.pixels + at % plan_.pixels;
        if (log_w == out.top[p] && candidate > first) continue;
        out.top[p] = log_w;
        out.source[p] = number * plan_.pixels + source_pixel(p, at % plan_.pixels);
        first = candidate;
      }
    }
  }

  // With whole-image windows the kernel notes the source of pixel (0, 0), which is the displacement itself.
  std::int64_t source_pixel(std::int64_t p, std::int64_t q) const {
    if (!plan_.whole_image()) return q;
    const std::int64_t row = (p / a_.width + q / a_.width) % a_.height, column = (p + q) % a_.width;
    return row * a_.width + column;
  }

  const Plan& plan_;
  const Problem& a_;
  const std::int64_t lanes_, states_;
  const double unit_;  // of the panel: uint8 v is v - 127.5, exactly, in units of 1 / 127.5
  Aligned<float> panel_, bias_;
  Aligned<double> reference_;
  Aligned<float> s_, y_, e_;
  Aligned<double> best_;
  Aligned<std::int32_t> best_at_;
  Aligned<float> scratch_;
  Partial flushed_;
};

}  // namespace

std::vector<const char*> available_isas() {
  std::vector<const char*> names;
  for (const Kernel* kernel : runnable_kernels()) names.push_back(kernel->isa);
  return names;
}

const char* isa_in_use() { return kernel_in_use().isa; }

void cpu_engine(const Problem& a, Sink& sink) {
  const Plan plan(a);
  const std::int64_t group = plan.queries_in_group();
  struct Unit {
    std::int64_t query, segment;
    Partial partial;
  };
  for (std::int64_t b0 = 0; b0 < a.queries; b0 += group) {
    std::vector<Unit> units;
    for (std::int64_t b = b0; b < std::min(a.queries, b0 + group); ++b)
      for (std::int64_t segment = 0; segment < plan.segments(b); ++segment)
        units.push_back({b, segment, Partial(plan.pixels, a.channels, a.full)});

    std::atomic<std::size_t> next{0};
    std::atomic<bool> stop{false};
    std::exception_ptr failure;
    std::mutex failure_mutex;
    const auto work = [&](auto stop_asked) {
      try {
        Worker worker(plan);
        for (std::size_t i; !stop && (i = next++) < units.size();)
          worker.run(units[i].query, units[i].segment, units[i].partial, stop_asked);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(failure_mutex);
        failure = std::current_exception();
        stop = true;
      }
    };

    const std::int64_t threads = std::clamp<std::int64_t>(a.threads, 1, static_cast<std::int64_t>(units.size()));
    std::vector<std::thread> others;
    try {
      for (std::int64_t i = 1; i < threads; ++i) others.emplace_back(work, [&] { return stop.load(); });
    } catch (...) {
      // No more threads to be had: the ones that started and this one do the work.
    }
    auto asked = std::chrono::steady_clock::now();
    work([&] {
      const auto now = std::chrono::steady_clock::now();
      if (a.interrupted && now - asked > std::chrono::milliseconds(100)) {
        asked = now;
        if (a.interrupted()) throw Interrupted();
      }
      return stop.load();
    });
    for (std::thread& thread : others) thread.join();
    if (failure) std::rethrow_exception(failure);

    // In the order of the bank, whichever thread did what.
    for (std::size_t i = 0; i < units.size();) {
      Partial total = std::move(units[i].partial);
      const std::int64_t b = units[i].query;
      for (++i; i < units.size() && units[i].query == b; ++i) merge(total, units[i].partial);
      sink.take(b, total);
    }
  }
}

}  // namespace pyels
