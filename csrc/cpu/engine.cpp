// The exact CPU engine: cuts the bank into fixed segments, lets threads work through them,
// and merges their partial posteriors in the order of the bank. Neither the segments nor the order of any sum depends
// on the number of threads or on the other queries, so the result does not either.
#include "cpu/engine.h"

#include <numeric>

#include "cpu/masks.h"
#include "cpu/plan.h"

namespace pyels {
namespace {

// Channels of y: none where no mean is wanted.
std::int64_t answers_of(const Problem& a) { return a.want & want_mean ? a.answer_channels() : 0; }

class Worker {
 public:
  explicit Worker(const Plan& plan)
      : plan_(plan),
        a_(plan.a),
        lanes_(plan.kernel.lanes),
        states_(plan.whole_image() ? 1 : plan.pixels),
        means_(answers_of(a_) * plan.pixels),
        wide_(means_ && a_.want & want_second && !a_.full()),
        loaded_(plan),
        reference_(aligned<double>(states_)),
        offset_(aligned<float>(states_)),
        s_(aligned<float>(states_ * lanes_)),
        y_(aligned<float>(means_ && !wide_ ? means_ * lanes_ : 1)),
        wide_s_(aligned<double>(wide_ ? states_ * lanes_ : 1)),
        wide_y_(aligned<double>(wide_ ? means_ * lanes_ : 1)),
        e_(aligned<float>(a_.full() ? states_ * lanes_ : 1)),
        near_(aligned<float>(a_.full() ? states_ * lanes_ : 1)),
        near_at_(aligned<std::int32_t>(a_.full() ? states_ * lanes_ : 1)),
        far_(aligned<double>(a_.full() ? states_ * lanes_ : 1)),
        far_at_(aligned<std::int32_t>(a_.full() ? states_ * lanes_ : 1)),
        flushed_(plan.pixels, answers_of(a_), a_.full()) {}

  // Adds the images of one segment of query b to `total`.
  template <class Stop>
  void run(std::int64_t b, std::int64_t segment, Partial& total, Stop stop) {
    task_ = {};
    loaded_.load_query(b, task_);
    task_.full = a_.full(), task_.all_exact = a_.want & want_second;
    task_.reference = reference_.get(), task_.offset = offset_.get(), task_.s = s_.get();
    if (wide_) task_.wide_s = wide_s_.get(), task_.wide_y = wide_y_.get();
    if (means_ && !wide_) task_.y = y_.get();
    task_.e = e_.get();
    task_.near = near_.get(), task_.near_at = near_at_.get(), task_.far = far_.get(), task_.far_at = far_at_.get();
    // The reference stays from flush to flush, so that weights are measured against the whole segment's maximum.
    std::fill_n(reference_.get(), states_, -std::numeric_limits<double>::infinity());
    std::fill_n(offset_.get(), states_, std::numeric_limits<float>::infinity());
    clear();
    b_ = b, total_ = &total;
    work_off(plan_, b, segment, *this, stop);
  }

  // The steps of work_off.
  void load(std::int64_t block) { loaded_.load_block(b_, block); }
  void add(const Plan::Call& call, std::int32_t at) {
    tell(task_, call);
    task_.at = at;
    plan_.kernel.accumulate(task_);
  }
  void flush(std::int64_t first_block, std::int64_t live) {
    sum(first_block, live);
    merge(*total_, flushed_);
    clear();
  }

 private:
  double scale(std::int64_t b) const { return 0.5 / (a_.sigma[b] * a_.sigma[b]) / ln2; }

  void clear() {
    std::fill_n(s_.get(), states_ * lanes_, 0.0f);
    if (wide_)
      std::fill_n(wide_s_.get(), states_ * lanes_, 0.0), std::fill_n(wide_y_.get(), means_ * lanes_, 0.0);
    else
      std::fill_n(y_.get(), means_ * lanes_, 0.0f);
    if (!a_.full()) return;
    std::fill_n(e_.get(), states_ * lanes_, 0.0f);
    std::fill_n(near_.get(), states_ * lanes_, std::numeric_limits<float>::infinity());
    std::fill_n(near_at_.get(), states_ * lanes_, 0);
    std::fill_n(far_.get(), states_ * lanes_, std::numeric_limits<double>::infinity());
    std::fill_n(far_at_.get(), states_ * lanes_, 0);
  }

  // Sums the first `live` lanes of the state in double.
  void sum(std::int64_t first_block, std::int64_t live) {
    Partial& out = flushed_;
    const auto sum_lanes = [&](const Aligned<float>& lanes, std::int64_t n, std::vector<double>& sums) {
      plan_.kernel.sum_lanes(lanes.get(), n, static_cast<int>(live), sums.data());
    };
    const auto sum_wide = [&](const Aligned<double>& wide, std::int64_t n, std::vector<double>& sums) {
      for (std::int64_t i = 0; i < n; ++i)
        sums[i] = std::accumulate(wide.get() + i * lanes_, wide.get() + i * lanes_ + live, 0.0);
    };
    if (wide_)
      sum_wide(wide_s_, states_, out.s), sum_wide(wide_y_, means_, out.y);
    else
      sum_lanes(s_, states_, out.s), sum_lanes(y_, means_, out.y);
    for (double& y : out.y) y *= loaded_.answer_unit;
    if (a_.full()) sum_lanes(e_, states_, out.e);
    for (std::vector<double>* sums : {&out.s, &out.e})  // one weight for the whole image
      if (!sums->empty()) std::fill(sums->begin() + states_, sums->end(), sums->front());
    for (std::int64_t p = 0; p < plan_.pixels; ++p) {
      const std::int64_t state = plan_.whole_image() ? 0 : p;
      const double noise = loaded_.noise_of_window(p);
      out.m[p] = (reference_[state] - noise) * ln2;
      if (!a_.full()) continue;
      out.e[p] *= ln2;
      double nearest = std::numeric_limits<double>::infinity();
      out.source[p] = -1;
      std::int64_t first = 0;  // image and displacement of the nearest so far: the lower goes before its equals
      const auto consider = [&](double distance, std::int64_t at, std::int64_t lane) {
        if (distance > nearest || std::isinf(distance)) return;
        const std::int64_t number = plan_.image(b_, first_block + at / plan_.pixels, lane);
        const std::int64_t candidate = number * plan_.pixels + at % plan_.pixels;
        if (distance == nearest && candidate > first) return;
        nearest = distance;
        out.source[p] = number * plan_.pixels + source_pixel(p, at % plan_.pixels);
        first = candidate;
      };
      for (std::int64_t i = state * lanes_, lane = 0; lane < live; ++i, ++lane) {
        consider(near_[i], near_at_[i], lane);
        consider(far_[i], far_at_[i], lane);
      }
      out.top[p] = (-scale(b_) * nearest - noise) * ln2;  // rounded as m is: they may be far from 0 and equal
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
  const std::int64_t lanes_, states_, means_;  // means_: values of y
  const bool wide_;                            // s and y are in double
  Lanes loaded_;
  Aligned<double> reference_;
  Aligned<float> offset_, s_, y_;
  Aligned<double> wide_s_, wide_y_;
  Aligned<float> e_;
  Aligned<float> near_;
  Aligned<std::int32_t> near_at_;
  Aligned<double> far_;
  Aligned<std::int32_t> far_at_;
  Partial flushed_;
  // Of the segment that is worked off.
  KernelTask task_{};
  std::int64_t b_ = 0;
  Partial* total_ = nullptr;
};

}  // namespace

void cpu_engine(const Problem& a, const CpuOptions& options, Sink& sink) {
  if (a.window == Window::masks) return masks_engine(a, options, sink);
  const std::int64_t channels = answers_of(a);
  const Plan plan(a, options.regions, (channels + (a.full() ? 5 : 2)) * 8);
  in_segments(
      plan, options.threads, Partial(plan.pixels, channels, a.full()), [&] { return Worker(plan); },
      [&](std::int64_t b, std::span<Partial> parts) {
        for (std::size_t i = 1; i < parts.size(); ++i) merge(parts[0], parts[i]);
        sink.take(b, parts[0]);
      });
}

}  // namespace pyels
