// Which lists can matter; see prospects.h.
#include "sampled/prospects.h"

#include <cmath>

namespace pyels {
namespace {

// The model of a list: its windows spread alike in so many directions. Of the descriptions in lists whose weights it
// predicts to be less than 2^-reach of the whole none is looked at.
constexpr double directions = 32, reach = 20;
// Beyond so many nats float32 distances spoil the weights.
constexpr double most_nats = 3000;
// So many windows, a part of every list, are weighed by description at first.
constexpr double pilot_members = 5e4;

// From the query's own pixels, so that others do not matter to it.
std::uint32_t seed(const Pixel& q) {
  std::uint32_t hash = 2166136261u;
  for (std::int16_t value : q.z) hash = (hash ^ static_cast<std::uint16_t>(value)) * 16777619u;
  return hash;
}

// What two coordinates with codes of 2 bits take off log2 w, for all 16 of both: at(i) is the i-th of the query, in steps,
// and scale(i) what the square of such a step takes off. In units, which are returned, of which nearly all sums have no
// more than 255; the least of each table is left out, for all alike.
template <class At, class Scale>
float fill_tables(std::vector<std::uint8_t>& tables, std::int64_t count, At at, Scale scale) {
  std::vector<double> entries;
  double mean = 0, variance = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    double sum = 0, squares = 0, least = infinity;
    for (int code = 0; code < 16; ++code) {
      const double first = at(2 * i) - (code & 3), second = at(2 * i + 1) - (code >> 2);
      entries.push_back(scale(2 * i) * first * first + scale(2 * i + 1) * second * second);
      least = std::min(least, entries.back());
    }
    for (auto entry = entries.end() - 16; entry != entries.end(); ++entry)
      *entry -= least, sum += *entry / 16, squares += *entry * *entry / 16;
    mean += sum, variance += squares - sum * sum;
  }
  const double unit = std::max(1e-3, (mean + 3 * std::sqrt(variance)) / 255);
  for (const double entry : entries)
    tables.push_back(static_cast<std::uint8_t>(std::lround(std::min(255.0, entry / unit))));
  return static_cast<float>(unit);
}

}  // namespace

Prospects::Prospects(const Problem& a, const Lists& lists)
    : lists_(lists),
      scan_(scan_in_use()),
      layout_(a),
      region_(a, lists.region),
      channels_(a.channels),
      rows_(region_.rows()),
      columns_(region_.columns()),
      dims_(channels_ * rows_ * columns_),
      values_(static_cast<std::size_t>(region_.overhangs())) {
  for (std::int64_t row = 0; row < rows_; ++row)
    for (std::int64_t column = 0; column < columns_; ++column)
      for (std::int64_t o = 0; o < region_.seen(row, column); ++o)
        values_[static_cast<std::size_t>(o)] += static_cast<double>(channels_);
  for (std::int64_t l = 0; l < lists.count; ++l) {
    const double members = std::max(1.0, static_cast<double>(size(l)));
    sizes_.push_back({std::log2(members), std::sqrt(2 * std::log(members))});
    windows_ += static_cast<double>(size(l));
  }
  // Directions turned, so that coordinates are summed side by side.
  const std::int64_t lanes = scan_.lanes, n = lists_.directions_count;
  turned_.resize(static_cast<std::size_t>(dims_ * n));
  for (std::int64_t i = 0; i < n; ++i)
    for (std::int64_t j = 0; j < dims_; ++j) turned_[j * n + i] = lists_.directions[i * dims_ + j];
  means_ = aligned<float>((lists_.count + lanes - 1) / lanes * lanes * n);
  for (std::int64_t l = 0; l < lists_.count; ++l)
    for (std::int64_t i = 0; i < n; ++i)
      means_[(l / lanes * n + i) * lanes + l % lanes] = static_cast<float>(layout_.unit) * lists_.mean[l * n + i];
}

// The query along the principal directions; the squared length of what they leave.
double Prospects::describe(Pixel& q, std::vector<float>& z) const {
  const std::int64_t n = usable(q);
  std::vector<float> x(static_cast<std::size_t>(dims_));
  double whole = 0, inside = 0;
  // What is not on the image stays 0.
  const float* from =
      q.x - region_.skipped_rows(q.overhang) * layout_.row - region_.skipped_columns(q.overhang);
  std::int64_t j = 0;
  for (std::int64_t c = 0; c < channels_; ++c)
    for (std::int64_t row = 0; row < rows_; ++row)
      for (std::int64_t column = 0; column < columns_; ++column, ++j) {
        if (region_.seen(row, column) < q.overhang) continue;
        const float pixel = from[c * layout_.channel + row * layout_.row + column];
        const float value =
            pixel - static_cast<float>(layout_.unit * static_cast<double>(lists_.origin[j]) + layout_.zero);
        x[static_cast<std::size_t>(j)] = value;
        whole += static_cast<double>(value) * static_cast<double>(value);
      }
  z.resize(static_cast<std::size_t>(lists_.directions_count));
  scan_.project(x.data(), dims_, turned_.data(), lists_.directions_count, z.data());
  for (std::int64_t i = 0; i < n; ++i)
    inside += static_cast<double>(z[static_cast<std::size_t>(i)]) * static_cast<double>(z[static_cast<std::size_t>(i)]);

  // In steps. Far from all windows, where differences need no longer fit, all are alike.
  const double weight = tempering * q.scale;  // of a squared distance, in log2
  const auto step = [&](std::int64_t i) { return layout_.unit * static_cast<double>(lists_.step[i]); };
  const auto along = [&](std::int64_t i) { return static_cast<double>(z[static_cast<std::size_t>(i)]); };
  for (std::int64_t i = 0; i < leading; ++i)
    q.z.push_back(static_cast<std::int16_t>(std::lround(std::clamp(along(i) / step(i), -8000.0, 8000.0))));
  ScanQuery& s = q.scan;
  s.z = q.z.data();
  s.lead_scale = static_cast<float>(weight * step(0) * step(0));
  s.tail_scale = fill_tables(
      q.tables, (n - leading) / 2, [&](std::int64_t i) { return along(leading + i) / step(leading + i) + 1.5; },
      [&](std::int64_t i) { return weight * step(leading + i) * step(leading + i); });
  s.tables = q.tables.data(), s.tail_bytes = (n - leading) / 4;
  s.seed = seed(q);
  return std::max(0.0, whole - inside);
}

// Squared distances of a query window to the windows of a list have the mean D + spread, D being that to the list's
// mean, and are close to normal, so weights are close to log-normal.
Model Prospects::model(const Pixel& q, std::int64_t l, double distance) const {
  const double v = static_cast<double>(lists_.spread[(q.overhang - 1) * lists_.count + l]) * layout_.unit * layout_.unit;
  const double values = values_[static_cast<std::size_t>(q.overhang - 1)], n = std::min(directions, values);
  const double variance = 4 * distance / values * v + 2 * v * v / n;
  const Size& size = sizes_[static_cast<std::size_t>(l)];
  return {-q.scale * (distance + v), q.scale * ln2 * std::sqrt(variance), size.furthest, size.log2};
}

std::vector<Entry> Prospects::begin(Pixel& q, std::int32_t number, Room& room) const {
  const std::int64_t lanes = scan_.lanes, n = lists_.directions_count;
  const double outside = describe(q, room.z);
  room.distances.resize(static_cast<std::size_t>(lists_.count + lanes));
  for (std::int64_t l = 0; l < lists_.count; l += lanes)
    scan_.point_distances(means_.get() + l * n, room.z.data(), usable(q), room.distances.data() + l);
  room.models.clear();
  double least = -infinity, nearest = infinity;
  for (std::int64_t l = 0; l < lists_.count; ++l) {
    const double distance = outside + static_cast<double>(room.distances[static_cast<std::size_t>(l)]);
    room.models.push_back(model(q, l, distance));
    if (size(l) == 0) continue;
    // There is at least so much: the mean of weights is above the weight of the mean.
    least = std::max(least, room.models.back().mean + room.models.back().log2_n);
    nearest = std::min(nearest, distance);
  }
  std::vector<Entry> entries;
  if (q.scale * nearest * ln2 > most_nats) return entries;

  double total = 0;  // of tempered weights, relative to 2^(tempering * least)
  for (std::int64_t l = 0; l < lists_.count; ++l) {
    const Model& m = room.models[static_cast<std::size_t>(l)];
    if (size(l) == 0 || m.sum() <= least - reach) continue;
    const Model t = m.tempered();
    entries.push_back({.pixel = number,
                       .list = static_cast<std::int32_t>(l),
                       .part = 1,
                       .largest = static_cast<float>(m.largest()),
                       .typical = static_cast<float>(t.typical())});
    q.members += static_cast<double>(size(l));
    if (const double log_share = t.sum() - tempering * least; log_share > -reach) total += std::exp2(log_share);
  }
  for (Entry& e : entries) {
    e.part = static_cast<float>(std::min(1.0, pilot_members / q.members));
    e.typical -= static_cast<float>(tempering * least + std::log2(total));
  }
  return entries;
}

}  // namespace pyels
