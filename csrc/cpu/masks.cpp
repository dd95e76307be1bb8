// Windows that are masks: blocks of images against all pixels of a query. Threads share out the same segments of the
// bank however many they are, and what these give is merged in the order of the bank.
#include "cpu/masks.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>

#include "cpu/maps.h"
#include "cpu/sums.h"
#include "threads.h"
#include "weighing.h"

namespace pyels {
namespace {

// ---- Masks as sums -----------------------------------------------------------------------------------------------

using Rows = std::vector<std::vector<Entry>>;  // the inputs of each output, ascending

Rows transposed(const Rows& rows, std::int64_t inputs) {
  Rows out(static_cast<std::size_t>(inputs));
  for (std::size_t o = 0; o < rows.size(); ++o)
    for (const Entry& entry : rows[o]) out[entry.input].push_back({static_cast<std::uint32_t>(o), entry.weight});
  return out;
}

// WeightedSums, and what they point to.
class Sums {
 public:
  Sums(const Rows& rows, std::int64_t inputs) : groups_((inputs + group_inputs - 1) / group_inputs) {
    by_table(rows, inputs);
    std::vector<bool> done(rows.size());
    for (const std::uint32_t o : output_) done[o] = true;
    begin_.push_back(0);
    for (std::size_t o = 0; o < rows.size(); ++o) {
      if (!done[o]) entries_.insert(entries_.end(), rows[o].begin(), rows[o].end());
      begin_.push_back(std::ssize(entries_));
    }
    view_ = {std::ssize(rows), inputs,         begin_.data(),  entries_.data(),     std::ssize(output_),
             groups_,          output_.data(), weight_.data(), group_begin_.data(), words_.data()};
  }
  Sums(Sums&&) = default;

  const WeightedSums& view() const { return view_; }

 private:
  // Of the outputs that are cheaper this way. In time, measured, a word is worth `word_entries` of the inputs that are
  // gathered, and to fill a table `table_entries`.
  static constexpr std::int64_t word_entries = 6, table_entries = 300;
  void by_table(const Rows& rows, std::int64_t inputs) {
    std::int64_t gain = -groups_ * table_entries;
    std::vector<std::vector<std::uint64_t>> words(static_cast<std::size_t>(groups_));
    std::vector<std::uint64_t> own(static_cast<std::size_t>(groups_));
    for (std::size_t o = 0; o < rows.size() && std::ssize(output_) < most_tabled; ++o) {
      const std::vector<Entry>& row = rows[o];
      if (std::ssize(row) * group_inputs <= inputs * word_entries / 4) continue;
      if (std::any_of(row.begin(), row.end(), [&](const Entry& one) { return one.weight != row[0].weight; })) continue;
      std::fill(own.begin(), own.end(), 0);
      for (const Entry& one : row) own[one.input / group_inputs] |= std::uint64_t{1} << one.input % group_inputs;
      const std::int64_t used = groups_ - std::count(own.begin(), own.end(), 0u);
      if (std::ssize(row) <= used * word_entries) continue;
      gain += std::ssize(row) - used * word_entries;
      for (std::size_t group = 0; group < own.size(); ++group)
        if (own[group]) words[group].push_back(own[group] | static_cast<std::uint64_t>(output_.size()) << group_inputs);
      output_.push_back(static_cast<std::uint32_t>(o)), weight_.push_back(row[0].weight);
    }
    if (gain <= 0) output_.clear(), words.clear(), groups_ = 0;
    group_begin_.push_back(0);
    for (const auto& some : words) {
      words_.insert(words_.end(), some.begin(), some.end());
      group_begin_.push_back(std::ssize(words_));
    }
  }
  static constexpr std::int64_t most_tabled = std::int64_t{1} << (64 - group_inputs);

  std::int64_t groups_;
  std::vector<std::int64_t> begin_, group_begin_;
  std::vector<Entry> entries_;
  std::vector<std::uint32_t> output_;
  std::vector<float> weight_;
  std::vector<std::uint64_t> words_;
  WeightedSums view_;
};

// Of 16 weights: by their bits, so that it is quick.
template <class Weight>
bool all_zero(const Weight* weights) {
  std::uint64_t bits[2 * sizeof(Weight)], joined = 0;
  std::memcpy(bits, weights, sizeof bits);
  for (const std::uint64_t one : bits) joined |= one;
  return joined == 0;
}

// To start a thread, and to wait until it has ended, takes as long as thousands of pairs of a pixel and an image.
int useful_threads(int threads, std::int64_t pairs) {
  return static_cast<int>(std::clamp<std::int64_t>(pairs >> 15, 1, threads));
}

// The masks of the pixels first .. first + pixels - 1, as the sums that are wanted of them, with weights up to 1.
struct Band {
  std::int64_t first, pixels;
  double largest = 0.0;  // weight, that of the sums' 1
  double window = 1.0;   // the largest sum of a mask's weights, in these units
  std::optional<Sums> distances, derivative, fold;

  Band(const Problem& a, int threads, std::int64_t first_, std::int64_t pixels_, const Second* second)
      : first(first_), pixels(pixels_) {
    const std::int64_t plane = a.height * a.width, values = a.channels * plane;
    Rows rows(static_cast<std::size_t>(pixels));
    std::vector<double> most(rows.size());
    // What does not weigh nothing of each mask; weights are left to `give`.
    const auto fill = [&](const auto* masks, auto give) {
      in_threads(useful_threads(threads, pixels * values / 64), pixels, a.interrupted, [&](auto take) {
        std::vector<Entry> found(static_cast<std::size_t>(values), {0, 1.0f});
        take([&](std::int64_t p, auto) {
          const auto* mask = masks + (first + p) * values;
          std::size_t n = 0;
          for (std::int64_t z = 0; z < values; z += 16) {
            const std::int64_t end = std::min(z + 16, values);
            if (end - z == 16 && all_zero(mask + z)) continue;
            for (std::int64_t i = z; i < end; ++i) found[n].input = static_cast<std::uint32_t>(i), n += mask[i] > 0;
          }
          std::vector<Entry>& row = rows[static_cast<std::size_t>(p)];
          row.assign(found.begin(), found.begin() + static_cast<std::ptrdiff_t>(n));
          give(mask, row, most[static_cast<std::size_t>(p)]);
        });
      });
    };
    if (a.sets)
      fill(a.sets, [](const bool*, const std::vector<Entry>&, double& own) { own = 1.0; });
    else
      fill(a.masks, [](const double* mask, std::vector<Entry>& row, double& own) {
        for (const Entry& one : row) own = std::max(own, mask[one.input]);
        for (Entry& one : row) one.weight = static_cast<float>(mask[one.input] / own);
      });
    for (const double one : most) largest = std::max(largest, one);
    if (largest == 0.0) largest = 1.0;
    for (std::size_t p = 0; p < rows.size(); ++p) {
      if (a.sets) {
        window = std::max(window, static_cast<double>(rows[p].size()));
        continue;
      }
      const auto share = static_cast<float>(most[p] / largest);
      double sum = 0.0;
      for (Entry& one : rows[p]) sum += one.weight *= share;
      window = std::max(window, sum);
    }
    distances.emplace(rows, values);
    if (second && second->derivative) derivative.emplace(transposed(rows, values), pixels);
    if (!second || !second->folded) return;
    for (std::vector<Entry>& row : rows) {  // the support of any channel
      for (Entry& one : row) one = {static_cast<std::uint32_t>(one.input % plane), 1.0f};
      std::sort(row.begin(), row.end(), [](const Entry& u, const Entry& v) { return u.input < v.input; });
      const auto same = [](const Entry& u, const Entry& v) { return u.input == v.input; };
      row.erase(std::unique(row.begin(), row.end(), same), row.end());
    }
    fold.emplace(transposed(rows, plane), pixels);
  }
};

// ---- What is to be done ------------------------------------------------------------------------------------------

struct Plan {
  const Problem& a;
  const Second* second;
  const Kernel& spreading;
  const SumsKernel& kernel;
  std::int64_t plane, values, answers, block;  // H * W, C * H * W, R, images
  std::int64_t partial_bytes;                  // of a segment

  Plan(const Problem& problem, const Second* second_)
      : a(problem),
        second(second_),
        spreading(kernel_in_use()),
        kernel(sums_in_use()),
        plane(a.height * a.width),
        values(a.channels * plane),
        answers(a.answer_channels()),
        block(block_vectors * kernel.lanes),
        partial_bytes(plane * 8 * (second ? 2 * answers + a.channels : answers + (a.full() ? 5 : 2))) {}

  // The entries of the masks in memory at a time, as those of the largest band may be.
  static constexpr std::int64_t band_bytes = std::int64_t{32} << 20, partials_bytes = std::int64_t{64} << 20;
  std::int64_t band_pixels() const {
    const auto pixels = [&](std::int64_t entries) {
      return std::clamp<std::int64_t>(band_bytes / (entries * static_cast<std::int64_t>(sizeof(Entry))), 1, plane);
    };
    if (!a.sets || pixels(values) == plane) return pixels(values);
    std::int64_t most = 1;  // sets, a byte a value, are quick to count
    for (const bool* set = a.sets; set < a.sets + plane * values; set += values)
      most = std::max<std::int64_t>(most, std::count(set, set + values, true));
    return pixels(most);
  }
  std::int64_t images(std::int64_t b) const { return a.end[b] - a.begin[b]; }
  std::int64_t image(std::int64_t b, std::int64_t n) const {
    return a.order ? a.order[a.begin[b] + n] : a.begin[b] + n;
  }
  std::int64_t blocks(std::int64_t b) const { return (images(b) + block - 1) / block; }
  std::int64_t max_segments() const { return std::clamp<std::int64_t>(partials_bytes / partial_bytes, 8, 64); }
  // None so short that to merge it, and to find its first weights, takes longer than its sums.
  std::int64_t segments(std::int64_t b) const {
    const std::int64_t few = std::min<std::int64_t>(images(b) / 48, 4);
    return std::clamp<std::int64_t>(std::max(few, images(b) / 250), 1, max_segments());
  }
  std::int64_t queries_in_group() const {
    return std::clamp<std::int64_t>(partials_bytes / (max_segments() * partial_bytes), 1, 64);
  }
};

// The second pass over a segment, but for influence and heaviest, of which every image and pixel has its own.
struct Answers {
  std::vector<double> folded, variance, derivative;
  explicit Answers(const Plan& plan) {
    const auto some = [](const double* wanted, std::int64_t n) { return std::vector<double>(wanted ? n : 0); };
    folded = some(plan.second->folded, plan.answers * plan.plane);
    variance = some(plan.second->variance, plan.answers * plan.plane);
    derivative = some(plan.second->derivative, plan.values);
  }
};

// The heaviest sources of the chosen pixels so far; which they are does not depend on the order in which they come.
class Heaviest {
 public:
  Heaviest(const Plan& plan)
      : plan_(plan), to_(plan.second), found_(static_cast<std::size_t>(to_ ? plan.a.queries * to_->pixels : 0)) {}

  // Of a block of query b from image n on: weights (band.pixels)[V][L].
  void add(std::int64_t b, std::int64_t n, const Band& band, const float* weights) {
    if (!to_ || to_->top == 0) return;
    const std::int64_t live = std::min(plan_.block, plan_.images(b) - n);
    const std::lock_guard<std::mutex> lock(mutex_);
    for (std::int64_t i = 0; i < to_->pixels; ++i) {
      const std::int64_t p = to_->pixel[i] - band.first, list = b * to_->pixels + i;
      if (p < 0 || p >= band.pixels) continue;
      double* weight = to_->heaviest + list * to_->top;
      std::int64_t* source = to_->heaviest_source + list * to_->top;
      std::int64_t& found = found_[static_cast<std::size_t>(list)];
      for (std::int64_t lane = 0; lane < live; ++lane) {
        const double w = weights[p * plan_.block + lane];
        const std::int64_t own = plan_.image(b, n + lane) * plan_.plane + to_->pixel[i];
        const auto before = [&](std::int64_t k) { return weight[k] > w || (weight[k] == w && source[k] < own); };
        if (w == 0.0 || (found == to_->top && before(found - 1))) continue;
        if (found < to_->top) ++found;
        std::int64_t k = found - 1;
        for (; k > 0 && !before(k - 1); --k) weight[k] = weight[k - 1], source[k] = source[k - 1];
        weight[k] = w, source[k] = own;
      }
    }
  }

 private:
  const Plan& plan_;
  const Second* to_;
  std::vector<std::int64_t> found_;
  std::mutex mutex_;
};

// ---- One thread's work -------------------------------------------------------------------------------------------

class Worker {
 public:
  Worker(const Plan& plan, const Band& band)
      : plan_(plan),
        a_(plan.a),
        to_(plan.second),
        band_(band),
        lanes_(plan.kernel.lanes),
        image_unit_(a_.pixels_uint8 ? 1 / 127.5 : 1.0),
        answer_unit_((a_.others_answer() ? a_.responses_uint8 : a_.pixels_uint8) ? 1 / 127.5 : 1.0),
        images_(aligned<float>(plan.values * plan.block)),
        responses_(aligned<float>(a_.others_answer() ? plan.answers * plan.plane * plan.block : 1)),
        squares_(aligned<float>(plan.values * plan.block)),
        distances_(aligned<double>(band.pixels * plan.block)),
        alive_(aligned<std::int32_t>(plan.block)),
        scratch_(aligned<float>(scratch_floats(std::max(plan.values, plan.plane), lanes_))) {
    const auto doubles = [&](bool wanted, std::int64_t n) { return aligned<double>(wanted ? n * lanes_ : 1); };
    const auto floats = [&](bool wanted, std::int64_t n) { return aligned<float>(wanted ? n : 1); };
    const bool first = !to_, full = first && a_.full(), projected = to_ && to_->derivative;
    const bool off = projected || (to_ && to_->variance);
    const std::int64_t n = band.pixels;
    reference_ = aligned<double>(n);
    s_ = doubles(first, n), y_ = doubles(first, plan.answers * n);
    e_ = doubles(full, n), nearest_ = doubles(full, n), near_ = aligned<std::int32_t>(full ? n * lanes_ : 1);
    weights_ = floats(to_, n * plan.block), projected_ = floats(projected, n * plan.block);
    mean_ = aligned<double>(off ? plan.answers * n : 1), cotangent_ = aligned<double>(off ? plan.answers * n : 1);
    variance_ = doubles(to_ && to_->variance, plan.answers * n), influence_ = doubles(to_, block_vectors);
    folded_ = doubles(to_ && to_->folded, plan.answers * plan.plane), derivative_ = doubles(projected, plan.values);
    products_ = doubles(to_ && (to_->folded || projected), (projected ? plan.values : plan.plane) * block_vectors);
  }

  // Adds the images of one segment of query b, for the pixels of the band, to `total`.
  template <class Stop>
  void run(std::int64_t b, std::int64_t segment, Partial& total, Stop stop) {
    if (plan_.images(b) == 0) return;
    MaskTask task = make_task(b);
    std::fill_n(reference_.get(), band_.pixels, -std::numeric_limits<double>::infinity());
    zero(s_, band_.pixels), zero(y_, plan_.answers * band_.pixels);
    if (task.full) {
      zero(e_, band_.pixels);
      std::fill_n(nearest_.get(), band_.pixels * lanes_, std::numeric_limits<double>::infinity());
    }
    const std::int64_t first = first_image(b, segment);
    for (std::int64_t n = first; n < first_image(b, segment + 1); n += plan_.block) {
      if (stop()) return;
      task.at = static_cast<std::int32_t>(n - first);
      distances(task, b, n);
      plan_.kernel.weigh(task);
    }
    finish(b, first, task.scale, total);
  }

  // The second pass, likewise.
  template <class Stop>
  void run(std::int64_t b, std::int64_t segment, Answers& total, Heaviest& heaviest, Stop stop) {
    MaskTask task = make_task(b);
    const double l = band_.largest * a_.alpha[b] / (a_.sigma[b] * a_.sigma[b]) * image_unit_ * answer_unit_;
    if (to_->variance) zero(variance_, plan_.answers * band_.pixels);
    if (to_->folded) zero(folded_, plan_.answers * plan_.plane);
    if (to_->derivative) zero(derivative_, plan_.values);
    for (std::int64_t n = first_image(b, segment); n < first_image(b, segment + 1); n += plan_.block) {
      if (stop()) return;
      distances(task, b, n);
      zero(influence_, block_vectors);
      if (!plan_.kernel.second(task)) continue;
      heaviest.add(b, n, band_, weights_.get());
      if (to_->influence)
        for (std::int64_t lane = 0; lane < std::min(plan_.block, plan_.images(b) - n); ++lane)
          to_->influence[b * a_.images + plan_.image(b, n + lane)] += influence_[lane];
      if (to_->folded) {
        plan_.kernel.sum(band_.fold->view(), weights_.get(), products_.get(), scratch_.get());
        for (std::int64_t r = 0; r < plan_.answers; ++r)
          plan_.kernel.add_products(products_.get(), task.responses + r * plan_.plane * lanes_,
                                    plan_.answers * plan_.plane * lanes_, plan_.plane,
                                    folded_.get() + r * plan_.plane * lanes_);
      }
      if (!to_->derivative) continue;
      plan_.kernel.sum(band_.derivative->view(), projected_.get(), products_.get(), scratch_.get());
      plan_.kernel.add_products(products_.get(), task.images, plan_.values * lanes_, plan_.values, derivative_.get());
    }
    for (std::size_t i = 0; i < total.folded.size(); ++i) total.folded[i] += answer_unit_ * sum_lanes(folded_, i);
    for (std::size_t i = 0; i < total.variance.size() / plan_.plane * band_.pixels; ++i)
      total.variance[i / band_.pixels * plan_.plane + band_.first + i % band_.pixels] =
          answer_unit_ * answer_unit_ * sum_lanes(variance_, i);
    for (std::size_t i = 0; i < total.derivative.size(); ++i)
      total.derivative[i] += l * (task.precision ? task.precision[i] : 1.0) * sum_lanes(derivative_, i);
  }

 private:
  std::int64_t first_image(std::int64_t b, std::int64_t segment) const {
    return std::min(plan_.images(b), segment * plan_.blocks(b) / plan_.segments(b) * plan_.block);
  }

  void zero(Aligned<double>& values, std::int64_t n) const { std::fill_n(values.get(), n * lanes_, 0.0); }

  double sum_lanes(const Aligned<double>& values, std::size_t i) const {
    const double* lane = values.get() + static_cast<std::int64_t>(i) * lanes_;
    double sum = 0.0;
    for (std::int64_t k = 0; k < lanes_; ++k) sum += lane[k];
    return sum;
  }

  MaskTask make_task(std::int64_t b) {
    MaskTask t{};
    t.plane = plan_.plane, t.values = plan_.values, t.first = band_.first, t.pixels = band_.pixels;
    t.x = a_.x + b * plan_.values;
    t.precision = a_.precision ? a_.precision + b * plan_.values : nullptr;
    t.masks = a_.masks ? a_.masks + band_.first * plan_.values : nullptr;
    t.sets = a_.sets ? a_.sets + band_.first * plan_.values : nullptr;
    t.sums = &band_.distances->view();
    const auto largest = [&](const float* values) {
      float most = 0.0f;
      for (std::int64_t i = 0; i < plan_.values; ++i) most = std::max(most, std::abs(values[i]));
      return most;
    };
    precision_unit_ = t.precision && largest(t.precision) > 0.0f ? 1 / largest(t.precision) : 1.0f;
    const double unit = band_.largest / precision_unit_;
    t.unit = 1 / unit;
    t.alpha = a_.alpha[b] * image_unit_;
    t.images = images_.get();
    t.answers = plan_.answers;
    t.responses = a_.others_answer() ? responses_.get() : images_.get();
    t.alive = alive_.get(), t.distances = distances_.get();
    // In the units of the distances, where no weight is above 1.
    const double sigma = a_.sigma[b] / std::sqrt(unit);
    Problem there = a_;
    there.sigma = &sigma;
    const Weighing w = weighing(there, 0, static_cast<double>(plan_.images(b)),
                                static_cast<std::int64_t>(std::ceil(band_.window)), largest(t.x));
    t.scale = w.scale, t.least_scale = w.least_scale, t.skip = w.skip, t.slack = w.slack;
    // Both passes alike, whatever else weighs: what is left to float32 errs by less than 1e-4.
    t.exact_above = w.exact_above, t.always_exact_above = std::min(w.always_exact_above, 3 * w.exact_above);
    t.full = a_.full();
    t.reference = reference_.get(), t.s = s_.get(), t.y = y_.get(), t.e = e_.get();
    t.nearest = nearest_.get(), t.near = near_.get();
    if (!to_) return t;
    for (std::int64_t p = 0; p < band_.pixels; ++p)
      reference_[p] = to_->log_sum[b * plan_.plane + band_.first + p] / ln2;
    for (std::int64_t r = 0; r < plan_.answers && (to_->variance || to_->derivative); ++r)
      for (std::int64_t p = 0; p < band_.pixels; ++p) {
        const std::int64_t from = (b * plan_.answers + r) * plan_.plane + band_.first + p, at = r * band_.pixels + p;
        mean_[at] = to_->mean[from] / answer_unit_;
        if (to_->derivative) cotangent_[at] = to_->cotangent[from];
      }
    t.log_sum = reference_.get(), t.weights = weights_.get(), t.mean = mean_.get(), t.cotangent = cotangent_.get();
    t.variance = to_->variance ? variance_.get() : nullptr;
    t.projected = to_->derivative ? projected_.get() : nullptr;
    t.influence = to_->influence ? influence_.get() : nullptr;
    return t;
  }

  // Of the block of images from n on. Lanes without an image repeat the last, and are not alive.
  void distances(const MaskTask& task, std::int64_t b, std::int64_t n) {
    const std::int64_t live = std::min(plan_.block, plan_.images(b) - n);
    for (std::int64_t lane = 0; lane < plan_.block; ++lane) alive_[lane] = lane < live ? -1 : 0;
    const auto spread = [&](const auto* pixels, auto spread_row, std::int64_t size, float* to) {
      const std::remove_reference_t<decltype(*pixels)>* rows[64];
      for (std::int64_t v = 0; v < block_vectors; ++v) {
        for (std::int64_t lane = 0; lane < lanes_; ++lane)
          rows[lane] = pixels + plan_.image(b, n + std::min(v * lanes_ + lane, live - 1)) * size;
        spread_row(rows, size, to + v * size * lanes_);
      }
    };
    const auto fill = [&](const std::uint8_t* bytes, const float* floats, std::int64_t size, float* to) {
      if (bytes) spread(bytes, plan_.spreading.spread_uint8, size, to);
      if (floats) spread(floats, plan_.spreading.spread_float, size, to);
    };
    fill(a_.pixels_uint8, a_.pixels_float, plan_.values, images_.get());
    fill(a_.responses_uint8, a_.responses_float, plan_.answers * plan_.plane, responses_.get());
    plan_.kernel.squares(task, precision_unit_, squares_.get());
    plan_.kernel.sum(band_.distances->view(), squares_.get(), distances_.get(), scratch_.get());
  }

  // The first pass over a segment, whose first image is `first`, as part of `total`.
  void finish(std::int64_t b, std::int64_t first, double scale, Partial& total) const {
    for (std::int64_t p = 0; p < band_.pixels; ++p) {
      const std::int64_t at = band_.first + p;
      total.m[at] = reference_[p] * ln2;
      total.s[at] = sum_lanes(s_, p);
      for (std::int64_t r = 0; r < plan_.answers; ++r)
        total.y[r * plan_.plane + at] = answer_unit_ * sum_lanes(y_, r * band_.pixels + p);
      if (!a_.full()) continue;
      total.e[at] = sum_lanes(e_, p) * ln2;
      double nearest = std::numeric_limits<double>::infinity();
      std::int64_t image = 0;
      for (std::int64_t lane = 0; lane < lanes_; ++lane) {
        const double distance = nearest_[p * lanes_ + lane];
        if (std::isinf(distance)) continue;
        const std::int64_t own = plan_.image(b, first + near_[p * lanes_ + lane] + lane);
        if (distance < nearest || (distance == nearest && own < image)) nearest = distance, image = own;
      }
      total.source[at] = image * plan_.plane + at;
      total.top[at] = -scale * nearest * ln2;  // rounded as m is: they may be far from 0 and equal
    }
  }

  const Plan& plan_;
  const Problem& a_;
  const Second* to_;
  const Band& band_;
  const std::int64_t lanes_;
  const double image_unit_, answer_unit_;  // uint8 v is v - 127.5, exactly, in units of 1 / 127.5
  float precision_unit_ = 1.0f;
  Aligned<float> images_, responses_, squares_;
  Aligned<double> distances_;
  Aligned<std::int32_t> alive_;
  Aligned<float> scratch_;
  Aligned<double> reference_, s_, y_, e_, nearest_;  // reference: log_sum of the second pass
  Aligned<std::int32_t> near_;
  Aligned<float> weights_, projected_;
  Aligned<double> mean_, cotangent_, variance_, influence_, folded_, derivative_, products_;
};

// Works off all segments of all queries: make() is what a segment adds to, work(worker, unit, stop) adds it, and
// take(b, units) gets those of a query, in the order of the bank.
template <class Made>
struct Unit {
  std::int64_t query, segment;
  Made made;
};

template <class Make, class Work, class Take>
void in_segments(const Plan& plan, int threads, Make make, Work work, Take take) {
  const std::int64_t group = plan.queries_in_group(), step = plan.band_pixels();
  std::optional<Band> band;
  for (std::int64_t b0 = 0; b0 < plan.a.queries; b0 += group) {
    std::vector<Unit<decltype(make())>> units;
    std::int64_t images = 0;
    for (std::int64_t b = b0; b < std::min(plan.a.queries, b0 + group); images += plan.images(b++))
      for (std::int64_t segment = 0; segment < plan.segments(b); ++segment) units.push_back({b, segment, make()});
    for (std::int64_t first = 0; first < plan.plane; first += step) {
      if (!band || band->first != first)
        band.emplace(plan.a, threads, first, std::min(step, plan.plane - first), plan.second);
      const int useful = useful_threads(threads, images * band->pixels);
      in_threads(useful, std::ssize(units), plan.a.interrupted, [&](auto take_units) {
        Worker worker(plan, *band);
        take_units([&](std::int64_t i, auto stop) { work(worker, units[static_cast<std::size_t>(i)], stop); });
      });
    }
    for (auto& unit : units) take(unit);
  }
}

}  // namespace

void masks_engine(const Problem& a, const CpuOptions& options, Sink& sink) {
  const Plan plan(a, nullptr);
  std::optional<Partial> total;
  in_segments(
      plan, options.threads, [&] { return Partial(plan.plane, plan.answers, a.full()); },
      [](Worker& worker, Unit<Partial>& unit, auto stop) { worker.run(unit.query, unit.segment, unit.made, stop); },
      [&](Unit<Partial>& unit) {
        if (unit.segment == 0)
          total = std::move(unit.made);
        else
          merge(*total, unit.made);
        if (unit.segment + 1 == plan.segments(unit.query)) sink.take(unit.query, *total);
      });
}

void masks_second(const Problem& a, const CpuOptions& options, const Second& second) {
  const Plan plan(a, &second);
  Heaviest heaviest(plan);
  in_segments(
      plan, options.threads, [&] { return Answers(plan); },
      [&](Worker& worker, Unit<Answers>& unit, auto stop) {
        worker.run(unit.query, unit.segment, unit.made, heaviest, stop);
      },
      [&](const Unit<Answers>& unit) {
        const auto add = [&](const std::vector<double>& from, double* to) {
          for (std::size_t i = 0; i < from.size(); ++i)
            to[unit.query * std::ssize(from) + static_cast<std::int64_t>(i)] += from[i];
        };
        add(unit.made.folded, second.folded);
        add(unit.made.variance, second.variance);
        add(unit.made.derivative, second.derivative);
      });
}

}  // namespace pyels
