// Masks on the CPU engine, both passes, against the definition in double precision, written out here; on every
// instruction set that this CPU runs.
#include <cstring>
#include <memory>

#include "exact.h"

using namespace exact;
using pyels::Second;

namespace {

// How the masks of a case are filled: weight(p, z) of pixel p and value z.
struct Kind {
  const char* name;
  std::function<double(std::int64_t p, std::int64_t z, Random& random)> weight;
};

const Kind kinds[] = {
    {"nothing", [](auto, auto, Random&) { return 0.0; }},
    {"a few", [](auto, auto, Random& random) { return random.uniform() < 0.02 ? 1.0 : 0.0; }},
    {"half", [](auto, auto, Random& random) { return random.uniform() < 0.5 ? 1.0 : 0.0; }},
    {"all of some", [](auto p, auto, Random&) { return p % 3 ? 2.5 : 0.0; }},
    {"all weights", [](auto, auto, Random& random) { return random.uniform() < 0.8 ? 40 * random.uniform() : 0.0; }},
    {"few weights", [](auto, auto, Random& random) { return random.uniform() < 0.05 ? random.uniform() : 0.0; }},
};

// A case with masks, and with what else enters: responses of `answers` channels (0: the images answer), a precision.
struct Masked : Case {
  std::vector<double> masks;
  std::unique_ptr<bool[]> sets;  // the same, where asked for
  std::vector<std::uint8_t> responses;
  std::vector<float> precision;
  std::int64_t answers;

  Masked(Shape shape_, std::int64_t n_, const std::vector<Level>& levels, const Kind& kind, std::int64_t answers_ = 0,
         bool precise = false, double grain = 40)
      : Case(machines[0], shape_, n_, 1, levels, grain), answers(answers_) {
    Random random(11);
    for (std::int64_t p = 0; p < shape.pixels(); ++p)
      for (std::int64_t z = 0; z < shape.size(); ++z) masks.push_back(kind.weight(p, z, random));
    if (answers) responses = blob_images(n, {answers, shape.height, shape.width}, 90, 5);
    for (std::size_t i = 0; precise && i < x.size(); ++i)
      precision.push_back(random.uniform() < 0.3 ? 0.0f : static_cast<float>(3 * random.uniform()));
  }

  void as_sets() {
    sets = std::make_unique<bool[]>(masks.size());
    for (std::size_t i = 0; i < masks.size(); ++i) masks[i] = sets[i] = masks[i] > 0;
  }

  Problem problem(bool full = true) const {
    Problem a = Case::problem(full);
    a.window = pyels::Window::masks, a.sources = pyels::Sources::same_position;
    if (sets)
      a.sets = sets.get();
    else
      a.masks = masks.data();
    if (answers) a.responses_uint8 = responses.data(), a.response_channels = answers;
    if (!precision.empty()) a.precision = precision.data();
    return a;
  }
};

double pixel(const Problem& a, std::int64_t image, std::int64_t z) {
  const std::int64_t at = image * a.channels * a.height * a.width + z;
  return a.pixels_uint8 ? a.pixels_uint8[at] / 127.5 - 1 : static_cast<double>(a.pixels_float[at]);
}

double response(const Problem& a, std::int64_t image, std::int64_t z) {
  return a.others_answer() ? a.responses_uint8[image * a.response_channels * a.height * a.width + z] / 127.5 - 1
                           : pixel(a, image, z);
}

// What one query is to give. The second pass is told the mean and the log of the sum of weights that stand here.
struct Naive {
  std::vector<double> mean, log_sum, entropy, folded, variance, derivative, influence;
  std::vector<std::vector<std::pair<double, std::int64_t>>> heaviest;  // of each pixel, (-share, source), ascending

  Naive(const Problem& a, std::int64_t b, const std::vector<double>& cotangent) {
    const std::int64_t plane = a.height * a.width, values = a.channels * plane, answers = a.answer_channels();
    const float *x = a.x + b * values, *precision = a.precision ? a.precision + b * values : nullptr;
    mean.resize(answers * plane), folded.resize(answers * plane), variance.resize(answers * plane);
    log_sum.resize(plane), entropy.resize(plane), derivative.resize(values), influence.resize(a.images);
    heaviest.resize(plane);
    for (std::int64_t p = 0; p < plane; ++p) {
      const auto l = [&](std::int64_t z) {
        return a.mask(p * values + z) * (precision ? precision[z] : 1.0) / (a.sigma[b] * a.sigma[b]);
      };
      std::vector<double> w;
      for (std::int64_t n = a.begin[b]; n < a.end[b]; ++n) {
        double log_w = 0;
        for (std::int64_t z = 0; z < values; ++z)
          log_w -= l(z) * std::pow(x[z] - a.alpha[b] * pixel(a, a.order ? a.order[n] : n, z), 2) / 2;
        w.push_back(log_w);
      }
      const double top = *std::max_element(w.begin(), w.end());
      double sum = 0;
      for (const double one : w) sum += std::exp(one - top);
      log_sum[p] = top + std::log(sum);
      for (double& one : w) {
        const double share = std::exp(one - log_sum[p]);
        if (share > 0) entropy[p] -= share * std::log(share);
        one = share;
      }
      const auto image = [&](std::size_t i) {
        const std::int64_t n = a.begin[b] + static_cast<std::int64_t>(i);
        return a.order ? a.order[n] : n;
      };
      for (std::size_t i = 0; i < w.size(); ++i) {
        influence[image(i)] += w[i];
        heaviest[p].emplace_back(-w[i], image(i) * plane + p);
        for (std::int64_t r = 0; r < answers; ++r) mean[r * plane + p] += w[i] * response(a, image(i), r * plane + p);
      }
      std::sort(heaviest[p].begin(), heaviest[p].end());
      for (std::size_t i = 0; i < w.size(); ++i) {
        double projected = 0;
        for (std::int64_t r = 0; r < answers; ++r) {
          const double off = response(a, image(i), r * plane + p) - mean[r * plane + p];
          variance[r * plane + p] += w[i] * off * off;
          projected += cotangent[r * plane + p] * off;
        }
        for (std::int64_t z = 0; z < values; ++z)
          derivative[z] += l(z) * a.alpha[b] * w[i] * projected * pixel(a, image(i), z);
        for (std::int64_t z = 0; z < plane; ++z) {
          bool answering = false;
          for (std::int64_t c = 0; c < a.channels; ++c) answering |= a.mask(p * values + c * plane + z) > 0;
          for (std::int64_t r = 0; answering && r < answers; ++r)
            folded[r * plane + z] += w[i] * response(a, image(i), r * plane + z);
        }
      }
    }
  }
};

// The second pass with arrays of its own.
struct Asked {
  std::vector<double> log_sum, mean, cotangent, folded, variance, derivative, influence, heaviest;
  std::vector<std::int64_t> pixel, source;
  std::int64_t top;

  Asked(const Problem& a, std::int64_t top_) : top(top_) {
    const std::int64_t plane = a.height * a.width, answers = a.answer_channels();
    for (std::int64_t p = 0; p < plane; p += 2) pixel.push_back(p);
    Random random(3);
    for (std::int64_t i = 0; i < a.queries * answers * plane; ++i) cotangent.push_back(random.normal());
    folded.resize(cotangent.size()), variance.resize(cotangent.size());
    derivative.resize(a.queries * a.channels * plane), influence.resize(a.queries * a.images);
    heaviest.resize(a.queries * std::ssize(pixel) * top), source.resize(heaviest.size(), -1);
  }

  std::vector<double> cotangent_of(std::int64_t b, std::int64_t queries) const {
    const std::int64_t size = std::ssize(cotangent) / queries;
    return {cotangent.begin() + b * size, cotangent.begin() + (b + 1) * size};
  }

  void run(const Problem& a, int threads) {
    Second second;
    second.log_sum = log_sum.data(), second.mean = mean.data(), second.cotangent = cotangent.data();
    second.folded = folded.data(), second.variance = variance.data(), second.derivative = derivative.data();
    second.influence = influence.data();
    second.top = top, second.pixels = std::ssize(pixel), second.pixel = pixel.data();
    second.heaviest = heaviest.data(), second.heaviest_source = source.data();
    pyels::cpu_second(a, {.threads = threads}, second);
  }
};

struct SecondBounds {
  // Absolute; of the largest value.
  Bounded folded{"folded", 1e-4}, variance{"variance", 1e-4}, derivative{"derivative", 1e-4};  // 4e-6, 2e-6, 4e-6
  Bounded influence{"influence", 1e-4}, heaviest{"heaviest", 1e-4};                            // 1e-6, 1e-5
} second_bounds;

double most(const std::vector<double>& values) {
  double most = 0;
  for (const double v : values) most = std::max(most, std::abs(v));
  return most;
}

void see(Bounded& bound, const double* ours, const std::vector<double>& theirs, double unit) {
  for (std::size_t i = 0; i < theirs.size(); ++i) bound.see(std::abs(ours[i] - theirs[i]) / unit);
}

void compare_both_passes(const Masked& work, const std::string& what) {
  const Problem a = work.problem();
  const std::int64_t plane = a.height * a.width, top = 5;
  Asked asked(a, top);
  std::vector<Naive> naive;
  for (std::int64_t b = 0; b < a.queries; ++b) {
    naive.emplace_back(a, b, asked.cotangent_of(b, a.queries));
    const Naive& of = naive.back();
    asked.log_sum.insert(asked.log_sum.end(), of.log_sum.begin(), of.log_sum.end());
    asked.mean.insert(asked.mean.end(), of.mean.begin(), of.mean.end());
  }
  on_every_isa(work.text() + ", " + what, [&] {
    for (const bool full : {false, true}) {
      const std::vector<Partial> ours = run(cpu_engine(), work.problem(full));
      for (std::int64_t b = 0; b < a.queries; ++b)
        for (std::int64_t p = 0; p < plane; ++p) {
          const Partial& one = ours[b];
          const double log_sum = one.m[p] + std::log(one.s[p]), expected = naive[b].log_sum[p];
          (full ? exact_bounds.evidence : exact_bounds.quick_evidence)
              .see(std::abs(log_sum - expected) / (1 + std::abs(expected)));
          for (std::int64_t r = 0; r < one.channels; ++r)
            exact_bounds.mean.see(std::abs(one.y[r * plane + p] / one.s[p] - naive[b].mean[r * plane + p]));
          if (!full) continue;
          exact_bounds.entropy.see(std::abs(std::log(one.s[p]) - one.e[p] / one.s[p] - naive[b].entropy[p]));
          const auto& heaviest = naive[b].heaviest[p];
          exact_bounds.source_weight.see(std::abs(std::exp(one.top[p] - log_sum) + heaviest[0].first));
          if (heaviest.size() == 1 || heaviest[1].first - heaviest[0].first > 1e-4)
            check(one.source[p] == heaviest[0].second, "the heaviest source is another");
        }
    }
    Asked once = asked;
    once.run(a, 1);
    for (std::int64_t b = 0; b < a.queries; ++b) {
      const Naive& of = naive[b];
      const auto at = [&](const std::vector<double>& values) {
        return values.data() + b * std::ssize(values) / a.queries;
      };
      see(second_bounds.folded, at(once.folded), of.folded, static_cast<double>(plane));
      see(second_bounds.variance, at(once.variance), of.variance, 1);
      // Weights in float32 that cancel, such as those of images that are alike there, leave 2e-7 alpha / sigma^2.
      const double left = std::max(1e-3, 2e-3 * a.alpha[b] / (a.sigma[b] * a.sigma[b]));
      see(second_bounds.derivative, at(once.derivative), of.derivative, std::max(left, most(of.derivative)));
      see(second_bounds.influence, at(once.influence), of.influence, most(of.influence));
      for (std::size_t i = 0; i < once.pixel.size(); ++i)
        for (std::int64_t k = 0; k < top; ++k) {
          const std::int64_t put = (b * std::ssize(once.pixel) + static_cast<std::int64_t>(i)) * top + k;
          const auto& heaviest = of.heaviest[once.pixel[i]];
          const double expected = k < std::ssize(heaviest) ? -heaviest[k].first : 0;
          second_bounds.heaviest.see(std::abs(once.heaviest[put] - expected));
        }
    }
    for (const int threads : {2, 3}) {
      Asked again = asked;
      again.run(a, threads);
      check(again.folded == once.folded && again.variance == once.variance && again.derivative == once.derivative &&
                again.influence == once.influence && again.heaviest == once.heaviest && again.source == once.source,
            std::to_string(threads) + " threads change the second pass");
    }
  });
}

const std::vector<Level> levels{level(0.05), level(0.3), level(0.9), {1.0, 20.0}, {0.0, 0.5}, level(1e-3)};

void masks_of_every_kind() {
  for (const Kind& kind : kinds)
    for (const std::int64_t channels : {1, 3})
      for (const Shape shape : {Shape{channels, 5, 7}, Shape{channels, 9, 12}}) {
        if (!large && (shape.height == 9) == (channels == 1)) continue;
        Masked work(shape, 37, large ? levels : std::vector<Level>(levels.begin(), levels.begin() + 3), kind);
        if (channels == 3) work.to_float();
        compare_both_passes(work, kind.name);
        if (&kind >= &kinds[4]) continue;
        work.as_sets();
        compare_both_passes(work, kind.name + std::string(", as sets"));
      }
}

void precision_responses_and_classes() {
  for (const Kind& kind : {kinds[2], kinds[4], kinds[5]}) {
    Masked work({3, 6, 5}, 25, levels, kind, 2, true);
    work.with_classes(3);
    compare_both_passes(work, kind.name);
    Masked mono({1, 8, 9}, 70, {level(0.1), level(0.7)}, kind, 3);
    mono.to_float();
    compare_both_passes(mono, kind.name);
  }
}

// Hundreds of nats, where float32 sums would show, of masks as large as images are.
void large_masks_and_distances() {
  for (const Kind& kind : {kinds[2], kinds[3], kinds[4]}) {
    Masked work({3, 16, 16}, large ? 150 : 40, {level(0.02), level(0.3), level(0.8)}, kind);
    if (kind.name != kinds[4].name) work.as_sets();
    compare_both_passes(work, kind.name);
  }
}

// Pixels of the query beyond what float32 differences of can be told apart.
void beyond_float32() {
  for (const Kind& kind : {kinds[1], kinds[2], kinds[5]}) {
    Masked work({1, 6, 7}, 20, {level(1e-4), {1.0, 3e-4}}, kind, 0, false, 0);
    for (float& v : work.x) v *= 3;
    if (kind.name == kinds[1].name) work.as_sets();
    compare_both_passes(work, kind.name);
  }
}

void threads_and_batches_change_no_bit() {
  std::vector<Level> many;
  for (int b = 0; b < 70; ++b) many.push_back(level((b + 1) / 71.0));
  for (const Kind& kind : {kinds[1], kinds[2], kinds[4]}) {
    Masked queries({1, 9, 10}, 40, many, kind);
    queries.with_classes(2);
    const Masked images({3, 9, 10}, 1500, {level(0.2), level(0.9)}, kind);
    for (const Masked* work : {&std::as_const(queries), &images})
      on_every_isa(work->text() + ", " + kind.name, [&] {
        for (const bool full : {false, true}) {
          const std::vector<Partial> once = run(cpu_engine(), work->problem(full));
          for (const int threads : {2, 3, 5}) {
            const std::vector<Partial> again = run(cpu_engine(threads), work->problem(full));
            for (std::size_t b = 0; b < once.size(); ++b)
              check(identical(once[b], again[b]), std::to_string(threads) + " threads, query " + std::to_string(b));
          }
          for (std::size_t b = 0; b < once.size(); b += b < 5 ? 1 : 29) {
            const Problem one = only(work->problem(full), static_cast<std::int64_t>(b));
            check(identical(once[b], run(cpu_engine(2), one)[0]), "query " + std::to_string(b) + " alone");
          }
        }
      });
  }
}

// Of equally heavy images; and a mask of nothing weighs all alike.
void equal_images_weigh_alike() {
  for (const Kind& kind : kinds) {
    Masked work({1, 4, 5}, 700, {level(0.1), level(0.9)}, kind);
    for (std::int64_t n = 1; n < work.n; ++n)
      std::copy_n(work.bytes.begin(), work.shape.size(), work.bytes.begin() + n * work.shape.size());
    on_every_isa(work.text() + ", " + kind.name, [&] {
      for (const Partial& partial : run(cpu_engine(2), work.problem()))
        for (std::size_t p = 0; p < partial.s.size(); ++p) {
          check(partial.source[p] == static_cast<std::int64_t>(p), "the source is in another image");
          check(std::abs(partial.s[p] * std::exp(partial.m[p] - partial.top[p]) - 700) < 1e-2, "not all weigh alike");
        }
    });
  }
}

}  // namespace

int main(int count, char** arguments) {
  return run_tests(count, arguments,
                   {{"masks of every kind", masks_of_every_kind},
                    {"precision, responses and classes", precision_responses_and_classes},
                    {"large masks and distances", large_masks_and_distances},
                    {"beyond float32", beyond_float32},
                    {"threads and batches change no bit", threads_and_batches_change_no_bit},
                    {"equal images weigh alike", equal_images_weigh_alike}},
                   [] {
                     exact_bounds.report();
                     for (const Bounded& seen : {second_bounds.folded, second_bounds.variance, second_bounds.derivative,
                                                 second_bounds.influence, second_bounds.heaviest})
                       std::printf("%s: worst error %.1e, bound %.0e\n", seen.what, seen.worst, seen.bound);
                   });
}
