// What the C++ tests and benchmarks share: the machines by name, images to try them on, and a Problem that owns its
// arrays. Everything follows from fixed seeds; no distribution of the standard library is used, since these differ
// between implementations.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/engine.h"
#include "pyels.h"

namespace cases {

struct Machine {
  const char* name;
  pyels::Window window;
  pyels::Sources sources;

  bool whole_image() const { return window == pyels::Window::image; }
  bool wraps() const {  // a square window must then not be larger than the image
    return sources == pyels::Sources::circular || sources == pyels::Sources::interior;
  }
};

inline constexpr Machine machines[] = {{"is", pyels::Window::image, pyels::Sources::same_position},
                                       {"es", pyels::Window::image, pyels::Sources::circular},
                                       {"ls", pyels::Window::square, pyels::Sources::same_position},
                                       {"els_circular", pyels::Window::square, pyels::Sources::circular},
                                       {"els_interior", pyels::Window::square, pyels::Sources::interior},
                                       {"els_zeros", pyels::Window::square, pyels::Sources::zeros}};

// The number of source patches |S(p)| in one image, summed over its pixels p: as Machine.pairs in pyels/machines.py.
inline std::int64_t pairs_per_image(const Machine& machine, std::int64_t height, std::int64_t width, std::int64_t k) {
  const auto along = [&](std::int64_t n) -> std::int64_t {
    const std::int64_t inside = std::max<std::int64_t>(n - k + 1, 0);
    switch (machine.sources) {
      case pyels::Sources::same_position: return n;
      case pyels::Sources::circular: return n * n;
      case pyels::Sources::interior: return n * inside;
      case pyels::Sources::zeros: return n - inside + inside * inside;  // a pixel near the border meets its like only
    }
    return 0;
  };
  return along(height) * along(width);
}

class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed) {}
  std::uint64_t bits() {  // splitmix64
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-53; }  // [0, 1)
  double normal() {
    const double radius = std::sqrt(-2 * std::log(1 - uniform()));
    return radius * std::cos(6.283185307179586 * uniform());
  }

 private:
  std::uint64_t state_;
};

struct Shape {
  std::int64_t channels, height, width;
  std::int64_t pixels() const { return height * width; }
  std::int64_t size() const { return channels * pixels(); }
};

// n images of soft bright blobs on a plain background, black with one channel. Like real ones they are smooth, and flat
// over many windows, which then tie. `grain` roughens every other image by so many grey levels.
inline std::vector<std::uint8_t> blob_images(std::int64_t n, Shape shape, double grain, std::uint64_t seed) {
  Random random(seed);
  const auto profile = [&](std::int64_t length) {
    const double centre = length * random.uniform(), width = length * (0.08 + 0.2 * random.uniform());
    std::vector<double> values;
    for (std::int64_t i = 0; i < length; ++i) values.push_back(std::exp(-0.5 * std::pow((i - centre) / width, 2)));
    return values;
  };
  std::vector<std::uint8_t> images;
  std::vector<double> image(shape.size());
  for (std::int64_t i = 0; i < n; ++i) {
    std::fill(image.begin(), image.end(), shape.channels == 1 ? -20.0 : 200 * random.uniform());
    for (int blob = 0; blob < 4; ++blob) {
      const std::vector<double> down = profile(shape.height), across = profile(shape.width);
      for (std::int64_t c = 0; c < shape.channels; ++c) {
        const double peak = 300 * random.uniform() - 60;
        for (std::int64_t p = 0; p < shape.pixels(); ++p)
          image[c * shape.pixels() + p] += peak * down[p / shape.width] * across[p % shape.width];
      }
    }
    for (double v : image) {
      if (grain > 0 && i % 2 == 1) v += grain * (2 * random.uniform() - 1);
      images.push_back(static_cast<std::uint8_t>(std::clamp(v, 0.0, 255.0)));
    }
  }
  return images;
}

struct Level {
  double alpha, sigma;
};

// A bank, queries at given noise levels, and a machine.
struct Case {
  Machine machine;
  Shape shape;
  std::int64_t n, k;
  std::vector<std::uint8_t> bytes;  // (N, C, H, W), one of the two
  std::vector<float> floats;
  std::vector<float> x;  // (B, C, H, W)
  std::vector<double> alpha, sigma;
  std::vector<std::int64_t> order, begin, end;

  // Every other query starts from an image of the bank, the others from images it does not hold.
  Case(const Machine& machine_, Shape shape_, std::int64_t n_, std::int64_t k_, const std::vector<Level>& levels,
       double grain = 40, std::uint64_t seed = 1)
      : machine(machine_), shape(shape_), n(n_), k(k_), begin(levels.size(), 0), end(levels.size(), n_) {
    const auto queries = static_cast<std::int64_t>(levels.size());
    bytes = blob_images(n + queries, shape, grain, seed);
    Random random(seed + 1000);
    for (std::int64_t b = 0; b < queries; ++b) {
      alpha.push_back(levels[b].alpha), sigma.push_back(levels[b].sigma);
      const std::int64_t from = (b % 2 == 0 ? n + b : b % n) * shape.size();
      for (std::int64_t i = 0; i < shape.size(); ++i) {
        const double x0 = bytes[from + i] / 127.5 - 1;
        x.push_back(static_cast<float>(levels[b].alpha * x0 + levels[b].sigma * random.normal()));
      }
    }
    bytes.resize(n * shape.size());
  }

  // The bank as float32; each value is the nearest to what the uint8 stood for.
  Case& to_float() {
    for (const std::uint8_t v : bytes) floats.push_back(static_cast<float>(v / 127.5 - 1));
    bytes.clear();
    return *this;
  }

  // Image i is of class i mod `classes`; query b asks for class b mod (classes + 1), and the last of these for any.
  Case& with_classes(std::int64_t classes) {
    std::vector<std::int64_t> ends{0};
    for (std::int64_t label = 0; label < classes; ++label) {
      for (std::int64_t i = label; i < n; i += classes) order.push_back(i);
      ends.push_back(static_cast<std::int64_t>(order.size()));
    }
    for (std::size_t b = 0; b < begin.size(); ++b) {
      const std::size_t label = b % (classes + 1);
      if (label < static_cast<std::size_t>(classes)) begin[b] = ends[label], end[b] = ends[label + 1];
    }
    return *this;
  }

  pyels::Problem problem(bool full = true) const {
    pyels::Problem a;
    (bytes.empty() ? void(a.pixels_float = floats.data()) : void(a.pixels_uint8 = bytes.data()));
    a.images = n, a.channels = shape.channels, a.height = shape.height, a.width = shape.width;
    a.order = order.empty() ? nullptr : order.data();
    a.queries = static_cast<std::int64_t>(alpha.size());
    a.x = x.data(), a.alpha = alpha.data(), a.sigma = sigma.data(), a.begin = begin.data(), a.end = end.data();
    a.window = machine.window, a.sources = machine.sources, a.patch_size = k;
    a.want = full ? pyels::want_posterior : pyels::want_mean;
    return a;
  }

  std::string text() const {
    return std::string(machine.name) + " C=" + std::to_string(shape.channels) + " H=" + std::to_string(shape.height) +
           " W=" + std::to_string(shape.width) + " k=" + std::to_string(k) + " N=" + std::to_string(n) +
           (bytes.empty() ? " float" : " uint8");
  }
};

// One query of a problem.
inline pyels::Problem only(pyels::Problem a, std::int64_t b) {
  a.x += b * a.channels * a.height * a.width;
  a.alpha += b, a.sigma += b, a.begin += b, a.end += b;
  a.queries = 1;
  return a;
}

struct Collect : pyels::Sink {
  std::vector<pyels::Partial> partials;  // one per query
  void take(std::int64_t b, const pyels::Partial& partial) override {
    if (b != static_cast<std::int64_t>(partials.size())) throw std::logic_error("queries out of order");
    partials.push_back(partial);
  }
};

// An engine with the options that it is to have.
using Engine = std::function<void(const pyels::Problem&, pyels::Sink&)>;

inline Engine cpu_engine(int threads = 1) {
  return [=](const pyels::Problem& a, pyels::Sink& sink) { pyels::cpu_engine(a, {.threads = threads}, sink); };
}

inline std::vector<pyels::Partial> run(const Engine& engine, const pyels::Problem& a) {
  Collect sink;
  engine(a, sink);
  if (static_cast<std::int64_t>(sink.partials.size()) != a.queries) throw std::logic_error("queries left out");
  return std::move(sink.partials);
}

// Largest difference of two posterior means; infinite where one is not a number.
inline double mean_error(const pyels::Partial& a, const pyels::Partial& b) {
  double worst = 0;
  for (std::size_t i = 0; i < a.y.size(); ++i) {
    const std::size_t p = i % static_cast<std::size_t>(a.pixels);
    const double error = std::abs(a.y[i] / a.s[p] - b.y[i] / b.s[p]);
    worst = std::isfinite(error) ? std::max(worst, error) : HUGE_VAL;
  }
  return worst;
}

inline void use_isa(const char* isa) { setenv("PYELS_ISA", isa, 1); }

}  // namespace cases
