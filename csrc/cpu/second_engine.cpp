// The second pass of the CPU engine: the same segments of the bank as the first pass, whose answers add up in the order of
// the bank.
#include "cpu/engine.h"
#include "cpu/masks.h"
#include "cpu/plan.h"
#include "cpu/second.h"

namespace pyels {
namespace {

struct Source {
  double weight;
  std::int64_t number;
  bool operator<(const Source& other) const {  // the heavier first, and of equals the lower
    return weight != other.weight ? weight > other.weight : number < other.number;
  }
};

// What is asked for over a part of the bank.
struct Answers {
  std::vector<double> folded, variance, derivative;
  std::vector<std::vector<Source>> heaviest;  // of each chosen pixel a heap, the least heavy on top
};

class Worker {
 public:
  Worker(const Plan& plan, const Second& second, const std::vector<std::int64_t>& chosen)
      : plan_(plan),
        a_(plan.a),
        second_(second),
        kernel_(second_in_use()),
        lanes_(plan.kernel.lanes),
        loaded_(plan),
        reference_(aligned<double>(plan.pixels)),
        influence_(aligned<double>(lanes_)),
        offset_(floats(plan.pixels)),
        rest_(floats(plan.pixels)),
        weights_(floats(row_size() * lanes_)),
        mean_(floats(plan.answer_channels * plan.pixels)),
        cotangent_(floats(plan.answer_channels * plan.pixels)),
        shift_(floats(plan.pixels)),
        centre_(floats(a_.channels * plan.pixels)),
        variance_(floats(second.variance ? plan.answer_channels * plan.pixels * lanes_ : 1)),
        noted_(floats(plan.pixels)),
        floor_(floats(plan.pixels)),
        fold_(plan, second.folded ? plan.answer_channels : 0),
        derivative_(plan, second.derivative ? a_.channels : 0),
        sums_(static_cast<std::size_t>(std::max(a_.channels, plan.answer_channels) * plan.pixels)),
        chosen_(chosen),
        number_of_(static_cast<std::size_t>(plan.pixels)) {
    for (std::size_t i = 0; i < chosen.size(); ++i) number_of_[static_cast<std::size_t>(chosen[i])] = i;
    if (second.fold_taps) fold_.weigh(taps(second.fold_taps, plan.row_axis), taps(second.fold_taps, plan.column_axis));
    if (plan.uneven() && !plan.whole_image())
      derivative_.weigh(taps(a_.taps, plan.row_axis), taps(a_.taps, plan.column_axis));
  }

  // Adds the images of one segment of query b to `total`.
  template <class Stop>
  void run(std::int64_t b, std::int64_t segment, Answers& total, Stop stop) {
    b_ = b, total_ = &total;
    task_ = {};
    loaded_.load_query(b, task_);
    load_second();
    work_off(plan_, b, segment, *this, stop);
    for (std::size_t i = 0; i < total.heaviest.size(); ++i)
      if (is_full(total.heaviest[i])) raise(floor_[chosen_[i]], total.heaviest[i]);
  }

  // The steps of work_off.
  void load(std::int64_t block) {
    loaded_.load_block(b_, block), block_ = block;
    // Of equally heavy sources those of earlier blocks stay: where a background is flat, there are thousands.
    for (std::size_t i = 0; i < total_->heaviest.size(); ++i)
      if (is_full(total_->heaviest[i])) noted_[chosen_[i]] = static_cast<float>(total_->heaviest[i].front().weight);
  }
  void add(const Plan::Call& call, std::int32_t) {
    tell(task_, call);
    if (task_.influence) std::fill_n(influence_.get(), lanes_, 0.0);
    kernel_.accumulate(task_);
    if (!task_.influence) return;
    double* influence = second_.influence + b_ * a_.images;  // an image is in one segment only
    for (std::int64_t lane = 0; lane < live(); ++lane) influence[plan_.image(b_, block_, lane)] += influence_[lane];
  }
  void flush(std::int64_t, std::int64_t live) {
    const auto move = [&](float* lanes, std::vector<double>& total) {
      const auto n = static_cast<std::int64_t>(total.size());
      if (n == 0) return;
      plan_.kernel.sum_lanes(lanes, n, static_cast<int>(live), sums_.data());
      for (std::size_t i = 0; i < total.size(); ++i) total[i] += sums_[i];
      std::fill_n(lanes, n * lanes_, 0.0f);
    };
    move(variance_.get(), total_->variance);
    move(fold_.out.get(), total_->folded);
    move(derivative_.out.get(), total_->derivative);
  }

  // Called by the kernel.
  void note(std::int64_t p, std::int64_t q, const float* weights) {
    std::vector<Source>& heap = total_->heaviest[number_of_[static_cast<std::size_t>(p)]];
    for (std::int64_t lane = 0; lane < live(); ++lane) {
      if (!(weights[lane] > noted_[p])) continue;
      const Source source{weights[lane], plan_.image(b_, block_, lane) * plan_.pixels + q};
      if (is_full(heap)) {
        if (!(source < heap.front())) continue;
        std::pop_heap(heap.begin(), heap.end()), heap.pop_back();
      }
      heap.push_back(source), std::push_heap(heap.begin(), heap.end());
      if (is_full(heap)) raise(noted_[p], heap);
    }
  }

 private:
  // Room for an answer by windows.
  struct Room {
    Aligned<float> out, map, sums, band;
    Aligned<const float*> sums_at;
    std::vector<float> row_taps, column_taps;

    Room(const Plan& plan, std::int64_t channels) {
      if (channels == 0) return;
      const std::int64_t lanes = plan.kernel.lanes, row = spread_row(plan.a.width, plan.column_axis.window) * lanes;
      out = floats(channels * plan.pixels * lanes), map = floats(row), sums = floats((1 + plan.a.height) * row);
      band = floats((kernel_band + 1) * row);
      sums_at = aligned<const float*>(spread_map_rows(plan.a.height, plan.row_axis.window));
    }
    // Taps from the last to the first; none where all are one.
    void weigh(std::vector<double> rows, std::vector<double> columns) {
      const auto is_one = [](double tap) { return tap == 1.0; };
      if (std::all_of(rows.begin(), rows.end(), is_one) && std::all_of(columns.begin(), columns.end(), is_one)) return;
      row_taps.assign(rows.rbegin(), rows.rend()), column_taps.assign(columns.rbegin(), columns.rend());
    }
    void describe(Spread& spread) {
      spread.out = out.get(), spread.map = map.get(), spread.sums = sums.get(), spread.sums_at = sums_at.get(),
      spread.band = band.get();
      spread.row_taps = row_taps.empty() ? nullptr : row_taps.data();
      spread.column_taps = column_taps.empty() ? nullptr : column_taps.data();
    }
  };

  bool is_full(const std::vector<Source>& heap) const { return static_cast<std::int64_t>(heap.size()) == second_.top; }
  static float just_below(float weight) { return std::nextafter(weight, 0.0f); }
  // What a source of the pixel has to be above, beside so many.
  static void raise(float& least, const std::vector<Source>& heap) {
    least = std::max(least, just_below(static_cast<float>(heap.front().weight)));
  }
  static Aligned<float> floats(std::int64_t n) { return aligned<float>(n); }
  std::int64_t row_size() const { return spread_row(a_.width, plan_.column_axis.window); }
  std::int64_t live() const { return std::min(lanes_, plan_.images(b_) - block_ * lanes_); }
  std::vector<double> taps(const double* all, const SourceAxis& axis) const { return taps_of(a_, all, axis.window); }

  void load_second() {
    const std::int64_t pixels = plan_.pixels, answers = plan_.answer_channels * pixels;
    for (std::int64_t p = 0; p < pixels; ++p) {
      const double log_sum = second_.log_sum[b_ * pixels + p];
      reference_[p] =
          std::isinf(log_sum) ? std::numeric_limits<double>::infinity() : log_sum / ln2 + loaded_.noise_of_window(p);
      const double offset = -reference_[p] * (static_cast<float>(task_.scale) / task_.scale);
      offset_[p] = static_cast<float>(offset);
      rest_[p] = std::isinf(offset) ? 1.0f : static_cast<float>(std::exp2(offset - offset_[p]));
      if (!std::isinf(offset)) task_.most_offset = std::max(task_.most_offset, std::abs(offset_[p]));
    }
    task_.reference = reference_.get(), task_.offset = offset_.get(), task_.rest = rest_.get();
    fold_.describe(task_.fold), derivative_.describe(task_.derivative);
    task_.weights = task_.fold.map ? task_.fold.map : weights_.get();
    task_.fold.image = task_.answers, task_.fold.channels = plan_.answer_channels;
    task_.derivative.image = task_.panel, task_.derivative.channels = a_.channels;
    if (second_.variance || second_.derivative)
      for (std::int64_t i = 0; i < answers; ++i)
        mean_[i] = static_cast<float>(second_.mean[b_ * answers + i] / loaded_.answer_unit);
    task_.mean = mean_.get();
    if (second_.variance) task_.variance = variance_.get();
    if (second_.derivative) load_derivative();
    if (second_.influence) task_.influence = influence_.get();
    if (!second_.top || chosen_.empty()) return;
    std::fill_n(noted_.get(), pixels, std::numeric_limits<float>::infinity());
    if (std::exchange(floor_query_, b_) != b_) std::fill_n(floor_.get(), pixels, just_below(std::exp2(-task_.skip)));
    for (const std::int64_t p : chosen_) noted_[p] = floor_[p];
    task_.noted = noted_.get(), task_.notes = this;
    task_.note = [](void* worker, std::int64_t p, std::int64_t q, const float* weights) {
      static_cast<Worker*>(worker)->note(p, q, weights);
    };
  }

  void load_derivative() {
    const std::int64_t pixels = plan_.pixels, answers = plan_.answer_channels * pixels;
    const double* mean = second_.mean + b_ * answers;
    const double* cotangent = second_.cotangent + b_ * answers;
    std::fill_n(shift_.get(), pixels, 0.0f);
    for (std::int64_t p = 0; p < pixels; ++p) {
      double shift = 0.0;
      for (std::int64_t i = p; i < answers; i += pixels) {
        cotangent_[i] = static_cast<float>(cotangent[i] * loaded_.answer_unit);
        shift += cotangent_[i] * (mean[i] / loaded_.answer_unit - mean_[i]);
      }
      shift_[p] = static_cast<float>(shift);
    }
    // Since the sum of W A is nothing, images may be less by anything: the nearer to what is found in their place, the
    // fewer digits are lost. Where other images answer, that is not known but from the query.
    const double alpha = a_.alpha[b_], most = a_.pixels_uint8 ? 1.0 : 10.0;
    for (std::int64_t i = 0; i < a_.channels * pixels; ++i) {
      const double x = a_.x[b_ * a_.channels * pixels + i];
      const double near = alpha > 0 ? std::clamp(x / alpha, -most, most) : 0.0;
      const bool found = !a_.others_answer() && !std::isinf(reference_[i % pixels]);
      centre_[i] = static_cast<float>((found ? mean[i] : near) / loaded_.unit);
    }
    task_.cotangent = cotangent_.get(), task_.shift = shift_.get(), task_.derivative.centre = centre_.get();
  }

  const Plan& plan_;
  const Problem& a_;
  const Second& second_;
  const SecondKernel& kernel_;
  const std::int64_t lanes_;
  Lanes loaded_;
  Aligned<double> reference_, influence_;
  Aligned<float> offset_, rest_, weights_, mean_, cotangent_, shift_, centre_, variance_;
  Aligned<float> noted_, floor_;  // of this segment; of those of the query so far, which later ones begin with
  Room fold_, derivative_;
  std::vector<double> sums_;
  const std::vector<std::int64_t>& chosen_;
  std::vector<std::size_t> number_of_;  // of a chosen pixel
  // Of the segment that is worked off.
  SecondTask task_{};
  std::int64_t b_ = 0, block_ = 0, floor_query_ = -1;
  Answers* total_ = nullptr;
};

// Adds the answers over all parts to those of query b.
void deliver(const Problem& a, const Second& second, std::int64_t b, std::span<Answers> parts,
             const std::vector<std::int64_t>& chosen) {
  const double answer_unit = a.others_answer() ? (a.responses_uint8 ? 1 / 127.5 : 1.0) : a.pixels_uint8 ? 1 / 127.5 : 1;
  const auto add = [&](std::vector<double> Answers::*answer, double* to, auto factor) {
    const auto n = static_cast<std::int64_t>((parts[0].*answer).size());
    for (std::int64_t i = 0; i < n; ++i) {
      double sum = 0.0;
      for (const Answers& part : parts) sum += (part.*answer)[static_cast<std::size_t>(i)];
      to[b * n + i] += factor(b * n + i) * sum;
    }
  };
  add(&Answers::folded, second.folded, [&](std::int64_t) { return answer_unit; });
  add(&Answers::variance, second.variance, [&](std::int64_t) { return answer_unit * answer_unit; });
  add(&Answers::derivative, second.derivative, [&](std::int64_t i) {
    return a.alpha[b] / (a.sigma[b] * a.sigma[b]) * (a.pixels_uint8 ? 1 / 127.5 : 1.0) *
           (a.precision ? static_cast<double>(a.precision[i]) : 1.0);
  });
  if (chosen.empty()) return;
  for (std::size_t i = 0; i < chosen.size(); ++i) {
    std::vector<Source>& all = parts[0].heaviest[i];
    for (std::size_t part = 1; part < parts.size(); ++part)
      all.insert(all.end(), parts[part].heaviest[i].begin(), parts[part].heaviest[i].end());
    std::sort(all.begin(), all.end());
  }
  for (std::int64_t i = 0; i < second.pixels; ++i) {
    const auto at = std::lower_bound(chosen.begin(), chosen.end(), second.pixel[i]) - chosen.begin();
    const std::vector<Source>& all = parts[0].heaviest[static_cast<std::size_t>(at)];
    const std::int64_t first = (b * second.pixels + i) * second.top;
    for (std::int64_t j = 0; j < std::min(second.top, static_cast<std::int64_t>(all.size())); ++j) {
      second.heaviest[first + j] = all[static_cast<std::size_t>(j)].weight;
      second.heaviest_source[first + j] = all[static_cast<std::size_t>(j)].number;
    }
  }
}

}  // namespace

void cpu_second(const Problem& a, const CpuOptions& options, const Second& second) {
  if (a.window == Window::masks) return masks_second(a, options, second);
  const std::int64_t answers = a.others_answer() ? a.response_channels : a.channels;
  std::vector<std::int64_t> chosen;  // ascending, each once
  if (second.top > 0) chosen.assign(second.pixel, second.pixel + second.pixels);
  std::sort(chosen.begin(), chosen.end());
  chosen.erase(std::unique(chosen.begin(), chosen.end()), chosen.end());
  const std::int64_t values =
      (second.folded ? answers : 0) + (second.variance ? answers : 0) + (second.derivative ? a.channels : 0);
  Plan plan(a, options.regions, 8 * std::max<std::int64_t>(1, values));
  if (!chosen.empty()) {
    plan.partial_bytes += static_cast<std::int64_t>(chosen.size()) * second.top * 16;
    plan.max_segments = std::clamp<std::int64_t>(Plan::partials_bytes / plan.partial_bytes, 1, 64);
  }
  Answers empty;
  if (second.folded) empty.folded.resize(static_cast<std::size_t>(answers * plan.pixels));
  if (second.variance) empty.variance.resize(static_cast<std::size_t>(answers * plan.pixels));
  if (second.derivative) empty.derivative.resize(static_cast<std::size_t>(a.channels * plan.pixels));
  empty.heaviest.resize(chosen.size());
  in_segments(
      plan, options.threads, empty, [&] { return Worker(plan, second, chosen); },
      [&](std::int64_t b, std::span<Answers> parts) { deliver(a, second, b, parts, chosen); });
}

}  // namespace pyels
