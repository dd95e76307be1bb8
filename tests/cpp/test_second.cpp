// The second pass of the CPU engine, and what the first one knows beyond squares whose places weigh alike, against a
// definition in double precision that shares nothing with any engine.
#include "checks.h"
#include "exact.h"

using namespace exact;
using pyels::Second;

namespace {

// A case and what may be added to it.
struct Work {
  Case base;
  std::vector<double> taps, fold_taps, cotangent;
  std::vector<float> precision, responses_float;
  std::vector<std::uint8_t> responses_bytes;
  std::int64_t response_channels = 0;
  std::vector<std::int64_t> pixel;
  std::int64_t top = 5;

  Work(const Case& of, std::uint64_t seed, bool with_taps, bool with_precision, int responses) : base(of) {
    Random random(seed);
    const std::int64_t pixels = base.shape.pixels(), queries = std::ssize(base.alpha);
    const bool even = seed % 2 == 0;
    for (std::int64_t i = 0; i < base.k; ++i) {
      const double u = static_cast<double>(i - base.k / 2);
      if (with_taps) taps.push_back(std::exp(-u * u / 8) * (1 + 0.1 * random.uniform()));
      fold_taps.push_back(even ? 1.0 : std::exp(-u * u / 6) + 0.2 * random.uniform());
    }
    if (with_precision)  // some pixels are not known at all, some well
      for (std::int64_t i = 0; i < queries * base.shape.size(); ++i)
        precision.push_back(random.uniform() < 0.3 ? 0.0f : static_cast<float>(4 * random.uniform()));
    response_channels = responses ? responses : base.shape.channels;
    if (responses && even)
      responses_bytes = blob_images(base.n, {responses, base.shape.height, base.shape.width}, 30, seed + 7);
    else if (responses)
      for (std::int64_t i = 0; i < base.n * responses * pixels; ++i)
        responses_float.push_back(static_cast<float>(2 * random.uniform() - 1));
    for (std::int64_t i = 0; i < queries * response_channels * pixels; ++i) cotangent.push_back(random.normal());
    pixel = {pixels - 1, 0, pixels / 2, 0};
  }

  Problem problem(int want = pyels::want_mean) const {
    Problem a = base.problem();
    a.want = want;
    a.taps = taps.empty() ? nullptr : taps.data();
    a.precision = precision.empty() ? nullptr : precision.data();
    a.responses_uint8 = responses_bytes.empty() ? nullptr : responses_bytes.data();
    a.responses_float = responses_float.empty() ? nullptr : responses_float.data();
    a.response_channels = response_channels;
    return a;
  }
  std::int64_t answers() const { return response_channels * base.shape.pixels(); }
  std::string text() const {
    return base.text() + " sigma=" + std::to_string(base.sigma[0]) + (taps.empty() ? "" : " taps") +
           (precision.empty() ? "" : " precision") + (response_channels == base.shape.channels ? "" : " responses");
  }
};

// All answers of the second pass, and what it is told.
struct Answers {
  // cover: what `folded` is to be divided by; of the definition.
  std::vector<double> log_sum, mean, folded, cover, variance, derivative, influence, heaviest;
  std::vector<std::int64_t> heaviest_source;

  explicit Answers(const Work& work) {
    const std::int64_t queries = std::ssize(work.base.alpha), pixels = work.base.shape.pixels();
    log_sum.resize(queries * pixels), mean.resize(queries * work.answers());
    folded.resize(mean.size()), cover.resize(mean.size()), variance.resize(mean.size()),
        derivative.resize(queries * work.base.shape.size());
    influence.resize(queries * work.base.n);
    heaviest.assign(queries * std::ssize(work.pixel) * work.top, 0.0), heaviest_source.assign(heaviest.size(), -1);
  }

  Second second(const Work& work) {
    Second s;
    s.log_sum = log_sum.data(), s.mean = mean.data(), s.cotangent = work.cotangent.data();
    if (!work.base.machine.whole_image()) s.fold_taps = work.fold_taps.data(), s.folded = folded.data();
    s.variance = variance.data(), s.derivative = derivative.data(), s.influence = influence.data();
    s.top = work.top, s.pixels = std::ssize(work.pixel), s.pixel = work.pixel.data();
    s.heaviest = heaviest.data(), s.heaviest_source = heaviest_source.data();
    return s;
  }

  void tell_of(const Answers& other) { log_sum = other.log_sum, mean = other.mean; }
};

// The definition. log_sum and mean are found as well.
Answers definition(const Work& work) {
  const Problem a = work.problem();
  const std::int64_t height = a.height, width = a.width, pixels = height * width, r = a.patch_size / 2;
  const std::int64_t answers = work.response_channels;
  const bool wraps = work.base.machine.wraps(), whole = work.base.machine.whole_image();
  Answers all(work);
  const auto value = [&](const std::uint8_t* bytes, const float* floats, std::int64_t i) {
    return bytes ? bytes[i] / 127.5 - 1 : static_cast<double>(floats[i]);
  };
  const auto phi = [&](std::int64_t n, std::int64_t c, std::int64_t q) {
    return value(a.pixels_uint8, a.pixels_float, (n * a.channels + c) * pixels + q);
  };
  const auto psi = [&](std::int64_t n, std::int64_t c, std::int64_t q) {
    return a.others_answer() ? value(a.responses_uint8, a.responses_float, (n * answers + c) * pixels + q)
                             : phi(n, c, q);
  };
  // Calls body(place of the query, place of the source, row and column in the window) for the window around p at q.
  const auto window = [&](std::int64_t p, std::int64_t q, auto body) {
    const std::int64_t up = whole ? p / width : r, down = whole ? height - 1 - up : r;
    const std::int64_t left = whole ? p % width : r, right = whole ? width - 1 - left : r;
    for (std::int64_t i = -up; i <= down; ++i)
      for (std::int64_t j = -left; j <= right; ++j) {
        std::int64_t z_row = p / width + i, z = p % width + j, s_row = q / width + i, s = q % width + j;
        if (wraps) {
          z_row = (z_row + height) % height, z = (z + width) % width;
          s_row = (s_row + height) % height, s = (s + width) % width;
        } else if (z_row < 0 || z_row >= height || z < 0 || z >= width) {
          continue;
        }
        body(z_row * width + z, s_row * width + s, i + r, j + r);
      }
  };
  const auto overhang = [&](std::int64_t p, std::int64_t n, bool before) {
    return std::max<std::int64_t>(0, before ? r - p : p + r - (n - 1));
  };
  const auto same = [&](std::int64_t p, std::int64_t q, std::int64_t n) {
    return overhang(p, n, true) == overhang(q, n, true) && overhang(p, n, false) == overhang(q, n, false);
  };
  const auto meets = [&](std::int64_t p, std::int64_t q) {
    const std::int64_t row = q / width, column = q % width;
    switch (a.sources) {
      case pyels::Sources::same_position: return p == q;
      case pyels::Sources::circular: return true;
      case pyels::Sources::interior: return row >= r && row < height - r && column >= r && column < width - r;
      default: return same(p / width, row, height) && same(p % width, column, width);
    }
  };
  for (std::int64_t b = 0; b < a.queries; ++b) {
    const float* x = a.x + b * a.channels * pixels;
    const double nats = 0.5 / (a.sigma[b] * a.sigma[b]);
    const auto precision = [&](std::int64_t c, std::int64_t z, std::int64_t i, std::int64_t j) {
      return (a.precision ? a.precision[(b * a.channels + c) * pixels + z] : 1.0) *
             (a.taps && !whole ? a.taps[i] * a.taps[j] : 1.0);
    };
    for (std::int64_t p = 0; p < pixels; ++p) {
      struct Pair {
        double log_w;
        std::int64_t image, q;
      };
      std::vector<Pair> pairs;
      double most = -HUGE_VAL;
      for (std::int64_t n = a.begin[b]; n < a.end[b]; ++n)
        for (std::int64_t q = 0; q < pixels; ++q) {
          if (!meets(p, q)) continue;
          const std::int64_t image = a.order ? a.order[n] : n;
          double log_w = 0;
          window(p, q, [&](std::int64_t z, std::int64_t s, std::int64_t i, std::int64_t j) {
            for (std::int64_t c = 0; c < a.channels; ++c) {
              const double difference = x[c * pixels + z] - a.alpha[b] * phi(image, c, s);
              log_w -= nats * precision(c, z, i, j) * difference * difference;
            }
          });
          pairs.push_back({log_w, image, q}), most = std::max(most, log_w);
        }
      double sum = 0;
      for (const Pair& pair : pairs) sum += std::exp(pair.log_w - most);
      all.log_sum[b * pixels + p] = most + std::log(sum);
      std::vector<double> mean(answers);
      for (Pair& pair : pairs) {
        pair.log_w = std::exp(pair.log_w - most) / sum;  // from here on W
        for (std::int64_t c = 0; c < answers; ++c) mean[c] += pair.log_w * psi(pair.image, c, pair.q);
      }
      for (std::int64_t c = 0; c < answers; ++c) {
        all.mean[(b * answers + c) * pixels + p] = mean[c];
        window(p, p, [&](std::int64_t z, std::int64_t, std::int64_t i, std::int64_t j) {
          if (!whole) all.cover[(b * answers + c) * pixels + z] += work.fold_taps[i] * work.fold_taps[j];
        });
      }
      for (const Pair& pair : pairs) {
        const double w = pair.log_w;
        double along = 0;
        for (std::int64_t c = 0; c < answers; ++c) {
          const double difference = psi(pair.image, c, pair.q) - mean[c];
          all.variance[(b * answers + c) * pixels + p] += w * difference * difference;
          along += work.cotangent[(b * answers + c) * pixels + p] * difference;
        }
        all.influence[b * a.images + pair.image] += w;
        window(p, pair.q, [&](std::int64_t z, std::int64_t s, std::int64_t i, std::int64_t j) {
          for (std::int64_t c = 0; c < a.channels; ++c)
            all.derivative[(b * a.channels + c) * pixels + z] +=
                precision(c, z, i, j) * 2 * nats * a.alpha[b] * w * along *
                (phi(pair.image, c, s) - x[c * pixels + z] / std::max(a.alpha[b], 1e-9));  // the term in x is nothing
          if (!whole)
            for (std::int64_t c = 0; c < answers; ++c)
              all.folded[(b * answers + c) * pixels + z] +=
                  work.fold_taps[i] * work.fold_taps[j] * w * psi(pair.image, c, s);
        });
      }
      std::sort(pairs.begin(), pairs.end(), [&](const Pair& one, const Pair& other) {
        if (one.log_w != other.log_w) return one.log_w > other.log_w;
        return one.image * pixels + one.q < other.image * pixels + other.q;
      });
      for (std::int64_t i = 0; i < std::ssize(work.pixel); ++i)
        if (work.pixel[i] == p)
          for (std::int64_t j = 0; j < std::min(work.top, std::ssize(pairs)); ++j) {
            const std::int64_t at = (b * std::ssize(work.pixel) + i) * work.top + j;
            all.heaviest[at] = pairs[j].log_w, all.heaviest_source[at] = pairs[j].image * pixels + pairs[j].q;
          }
    }
  }
  return all;
}

Bounded mean_bound{"mean", 1e-4}, folded_bound{"folded", 1e-4}, variance_bound{"variance", 1e-4},
    derivative_bound{"derivative", 1e-4}, influence_bound{"influence", 1e-4}, heaviest_bound{"heaviest", 1e-4},
    others_derivative_bound{"derivative where other images answer", 1e-4};  // the mean of the bank is not known then

void compare(const Work& work, const Answers& ours, const Answers& oracle, bool mean_rounds) {
  const auto worst = [](const std::vector<double>& a, const std::vector<double>& b) {
    double most = 0;
    for (std::size_t i = 0; i < a.size(); ++i) {
      const double error = std::abs(a[i] - b[i]);
      most = std::isfinite(error) ? std::max(most, error) : HUGE_VAL;
    }
    return most;
  };
  const auto largest = [](const std::vector<double>& a) {
    double most = 1e-30;
    for (const double v : a) most = std::max(most, std::abs(v));
    return most;
  };
  if (!work.base.machine.whole_image())
    for (std::size_t i = 0; i < ours.folded.size(); ++i)
      folded_bound.see(std::abs(ours.folded[i] - oracle.folded[i]) / std::max(oracle.cover[i], 1e-3));
  variance_bound.see(worst(ours.variance, oracle.variance));
  // Where the posterior is all but one source the derivative is all but nothing, and rounding is what is left.
  const double steepest = work.base.alpha[0] / (work.base.sigma[0] * work.base.sigma[0]);
  Bounded& bound = work.problem().others_answer() ? others_derivative_bound : derivative_bound;
  bound.see(worst(ours.derivative, oracle.derivative) /
            std::max(largest(oracle.derivative), mean_rounds ? std::min(0.03 * steepest, 3e-3) : 1e-3));
  influence_bound.see(worst(ours.influence, oracle.influence) / largest(oracle.influence));
  heaviest_bound.see(worst(ours.heaviest, oracle.heaviest));
  for (std::size_t i = 0; i < ours.heaviest.size(); ++i) {
    const double w = oracle.heaviest[i];
    const bool alone = (i % work.top == 0 || oracle.heaviest[i - 1] > w + 1e-3) &&
                       (i % work.top == static_cast<std::size_t>(work.top) - 1 || oracle.heaviest[i + 1] < w - 1e-3);
    if (alone && w > 1e-3) check(ours.heaviest_source[i] == oracle.heaviest_source[i], "the source is another");
  }
}

// Both passes of the CPU engine, the second one told what the first found.
Answers both_passes(const Work& work, int threads = 1) {
  Answers all(work);
  const std::vector<Partial> first = run(cpu_engine(threads), work.problem(pyels::want_mean | pyels::want_second));
  const std::int64_t pixels = work.base.shape.pixels();
  for (std::size_t b = 0; b < first.size(); ++b)
    for (std::int64_t i = 0; i < work.answers(); ++i) {
      const std::int64_t p = i % pixels;
      all.mean[b * work.answers() + i] = first[b].y[i] / first[b].s[p];
      all.log_sum[b * pixels + p] = first[b].m[p] + std::log(first[b].s[p]);
    }
  pyels::cpu_second(work.problem(), {.threads = threads}, all.second(work));
  return all;
}

void compare_with_definition(const Work& work) {
  const Answers oracle = definition(work);
  on_every_isa(work.text(), [&] {
    const Answers ours = both_passes(work);
    for (std::size_t i = 0; i < ours.mean.size(); ++i) mean_bound.see(std::abs(ours.mean[i] - oracle.mean[i]));
    compare(work, ours, oracle, true);
    Answers told(work);
    told.tell_of(oracle);
    pyels::cpu_second(work.problem(), {}, told.second(work));
    compare(work, told, oracle, false);
  });
}

void every_answer() {
  const Level levels[] = {level(0.05), level(0.7), level(0.2), level(0.95), level(0.4), level(0.99), level(0.02)};
  std::uint64_t number = 0;
  for (const Machine& machine : machines)
    for (const std::int64_t k : {1, 3, 5, 7, 9, 11, 15, 17, 19, 25}) {
      if (machine.whole_image() && k > 3) continue;
      if (machine.wraps() && !machine.whole_image() && k > 11 && !large) continue;
      for (const std::int64_t channels : {1, 3}) {
        if (++number * 7 / 3 % 2 && !large) continue;
        std::pair<std::int64_t, std::int64_t> size{6, 9};
        if (machine.wraps() && !machine.whole_image()) size = number % 2 ? std::pair{k, k + 3} : std::pair{k + 2, k};
        const bool plain = number % 4 < 2;
        Case work(machine, {channels, size.first, size.second}, k > 9 ? 2 : 11, k, {levels[number % 7]}, 40, number);
        if (number % 3 == 0) work.to_float();
        if (number % 5 == 0) work.with_classes(2);
        compare_with_definition(Work(work, number, !plain && number % 3 != 1, !plain && number % 3 != 2,
                                     plain ? 0 : static_cast<int>(number % 4)));
      }
    }
}

void extreme_noise_levels() {
  std::uint64_t number = 0;
  for (const Machine& machine : machines)
    for (const double sigma : {1e-3, 1e-2, 10.0, 1e3})
      for (const bool plain : {true, false}) {
        if (++number * 7 / 3 % 2 && !large) continue;
        const Case work(machine, {1 + 2 * static_cast<std::int64_t>(number % 2), 7, 10}, 5, number % 3 ? 3 : 7,
                        {level(sigma), {0.0, sigma}}, number % 4 < 2 ? 40 : 0, number);
        compare_with_definition(Work(work, number, !plain, !plain, 0));
      }
}

void threads_and_batches_change_no_bit() {
  for (const Machine& machine : machines) {
    const Case base = Case(machine, {1, 6, 7}, 90, 3, {level(0.1), level(0.9), level(0.4)}).with_classes(2);
    const Work work(base, 3, machine.wraps(), true, 2);
    on_every_isa(work.text(), [&] {
      const Answers once = both_passes(work);
      for (const int threads : {2, 3}) {
        const Answers again = both_passes(work, threads);
        check(once.folded == again.folded && once.variance == again.variance && once.derivative == again.derivative &&
                  once.influence == again.influence && once.heaviest == again.heaviest &&
                  once.heaviest_source == again.heaviest_source,
              std::to_string(threads) + " threads");
      }
      // The last query by itself.
      Answers alone(work);
      alone.tell_of(once);
      Problem a = work.problem();
      Second second = alone.second(work);
      const std::int64_t b = 2, pixels = a.height * a.width;
      a = only(a, b), a.precision += b * a.channels * pixels;
      second.log_sum += b * pixels, second.mean += b * work.answers(), second.cotangent += b * work.answers();
      pyels::cpu_second(a, {.threads = 2}, second);
      check(std::equal(once.folded.end() - work.answers(), once.folded.end(), alone.folded.begin()) &&
                std::equal(once.derivative.end() - pixels, once.derivative.end(), alone.derivative.begin()),
            "a query alone");
    });
  }
}

void parts_of_a_bank_add_up() {
  for (const Machine& machine : machines) {
    Work work(Case(machine, {1, 6, 7}, 40, 3, {level(0.3)}), 5, false, false, 0);
    on_every_isa(work.text(), [&] {
      const Answers whole = both_passes(work);
      Answers parts(work);
      parts.tell_of(whole);
      for (const auto& [begin, end] : {std::pair{0, 17}, {17, 24}, {24, 40}}) {
        Work part = work;
        part.base.begin = {begin}, part.base.end = {end};
        pyels::cpu_second(part.problem(), {}, parts.second(work));
      }
      const auto same = [](const std::vector<double>& a, const std::vector<double>& b) {
        double most = 0;
        for (std::size_t i = 0; i < a.size(); ++i) most = std::max(most, std::abs(a[i] - b[i]));
        return most < 1e-5;
      };
      check(same(whole.folded, parts.folded) && same(whole.variance, parts.variance) &&
                same(whole.derivative, parts.derivative) && same(whole.influence, parts.influence),
            "the parts do not add up");
    });
  }
}

// A pixel without a window answers nothing, and nothing it would answer is in what others do.
void pixels_without_windows() {
  const Work work(Case(machines[4], {1, 6, 7}, 9, 3, {level(0.5)}), 4, false, false, 0);
  Answers some = definition(work);
  for (std::size_t p = 0; p < some.log_sum.size(); ++p)
    if (p % 7 != 3) some.log_sum[p] = HUGE_VAL;
  on_every_isa(work.text(), [&] {
    Answers ours(work);
    ours.tell_of(some);
    pyels::cpu_second(work.problem(), {}, ours.second(work));
    double weights = 0;
    for (const double influence : ours.influence) weights += influence;
    check(std::abs(weights - 6) < 1e-4, "not the weights of the pixels that have a window");
    check(std::abs(ours.folded[0]) < 1e-20 && ours.folded[2] != 0 && ours.variance[0] < 1e-20,
          "an answer from nowhere");
    check(ours.heaviest[0] == 0 && ours.heaviest_source[0] == -1, "a source of nothing");
  });
}

// Equally heavy sources: here all images are the same, and flat.
void of_equals_the_lower_source_is_first() {
  for (const Machine& machine : machines) {
    Work work(Case(machine, {1, 6, 9}, 21, 5, {level(0.4)}), 2, false, false, 0);
    work.base.bytes.assign(work.base.bytes.size(), 90);
    work.pixel = {22};  // inside
    const Answers oracle = definition(work);
    on_every_isa(work.text(), [&] {
      const Answers ours = both_passes(work, 2);
      check(ours.heaviest_source == oracle.heaviest_source, "other sources");
    });
  }
}

bool stop_now() { return true; }

void work_stops_when_asked() {
  const Work work(Case(machines[3], {1, 24, 24}, 2000, 9, std::vector<Level>(8, level(0.5))), 2, false, false, 0);
  Answers all(work);
  Problem a = work.problem();
  a.interrupted = stop_now;
  on_every_isa("long work", [&] {
    for (const int threads : {1, 3})
      check_throws<pyels::Interrupted>([&] { pyels::cpu_second(a, {.threads = threads}, all.second(work)); },
                                       "Interrupted");
  });
}

}  // namespace

int main(int count, char** arguments) {
  return run_tests(count, arguments,
                   {{"every answer", every_answer},
                    {"extreme noise", extreme_noise_levels},
                    {"threads and batches change no bit", threads_and_batches_change_no_bit},
                    {"parts of a bank add up", parts_of_a_bank_add_up},
                    {"pixels without windows", pixels_without_windows},
                    {"of equals the lower source is first", of_equals_the_lower_source_is_first},
                    {"threads stop when asked", work_stops_when_asked}},
                   [] {
                     for (const Bounded& seen : {mean_bound, folded_bound, variance_bound, derivative_bound,
                                                 others_derivative_bound, influence_bound, heaviest_bound})
                       std::printf("%s: worst error %.1e, bound %.0e\n", seen.what, seen.worst, seen.bound);
                   });
}
