// Which lists can matter; see prospects.h.
#include "sampled/prospects.h"

#include <cmath>

namespace pyels {
namespace {

// The model of a list: its windows spread towards a pixel as along any of their values, of which a pixel's channels count
// as one, since they go together; and around their mean in so many directions. Of the descriptions in lists whose weights
// it predicts to be less than 2^-reach of the whole none is looked at.
constexpr double directions = 32;
constexpr float reach = 20;
constexpr float nothing = -1e30f;  // log2 of no members
// Beyond so many nats float32 distances spoil the weights.
constexpr double most_nats = 3000;
// So many windows, a part of every list, are weighed by description at first.
constexpr double pilot_members = 5e4;

// From the query's own pixels, so that others do not matter to it; of other dice another one, and where it is searched
// again, as what was found before must not say what is picked then.
std::uint32_t seed(const Pixel& q, std::uint32_t dice) {
  std::uint32_t hash = 2166136261u ^ dice * golden ^ (q.wider > 1 ? ~golden : 0);
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

Prospects::Prospects(const Problem& a, const Lists& lists, std::uint32_t dice)
    : lists_(lists),
      dice_(dice),
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
    const auto members = static_cast<double>(size(l));
    sizes_.push_back(
        members > 0 ? Size{static_cast<float>(std::log2(members)), static_cast<float>(std::sqrt(2 * std::log(members)))}
                    : Size{nothing, 0});
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
  const float* from = q.x - region_.skipped_rows(q.overhang) * layout_.row - region_.skipped_columns(q.overhang);
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
  const double weight = static_cast<double>(q.tempering) * q.scale;  // of a squared distance, in log2
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
  s.seed = seed(q, dice_);
  return std::max(0.0, whole - inside);
}

// Squared distances of a query window to the windows of a list have the mean D + spread, D being that to the list's
// mean, and are close to normal, so weights are close to log-normal.
void Prospects::model(const Pixel& q, double outside, Room& room) const {
  const std::int64_t lanes = scan_.lanes, n = lists_.directions_count, count = lists_.count;
  room.distances.resize(static_cast<std::size_t>(count + lanes));
  for (std::int64_t l = 0; l < count; l += lanes)
    scan_.point_distances(means_.get() + l * n, room.z.data(), usable(q), room.distances.data() + l);
  room.models.resize(static_cast<std::size_t>(count));
  const auto unit = static_cast<float>(layout_.unit * layout_.unit), scale = static_cast<float>(q.scale);
  const auto apart = static_cast<float>(4 * q.wider * static_cast<double>(channels_) / values(q)),
             alone = static_cast<float>(2 / std::min(directions, values(q)));
  const float* spread = lists_.spread + (q.overhang - 1) * count;
  for (std::int64_t l = 0; l < count; ++l) {
    const auto i = static_cast<std::size_t>(l);
    const float v = spread[l] * unit, distance = static_cast<float>(outside) + room.distances[i];
    room.distances[i] = distance;
    room.models[i] = {-scale * (distance + v),
                      scale * static_cast<float>(ln2) * std::sqrt(v * (apart * distance + alone * v)),
                      sizes_[i].furthest, sizes_[i].log2};
  }
}

std::vector<Entry> Prospects::begin(Pixel& q, std::int32_t number, Room& room) const {
  model(q, describe(q, room.z), room);
  float least = -infinity, nearest = infinity;
  for (std::size_t l = 0; l < room.models.size(); ++l) {
    // There is at least so much: the mean of weights is above the weight of the mean.
    least = std::max(least, room.models[l].mean + room.models[l].log2_n);
    if (room.models[l].log2_n >= 0) nearest = std::min(nearest, room.distances[l]);
  }
  std::vector<Entry> entries;
  if (q.scale * static_cast<double>(nearest) * ln2 > most_nats) return entries;

  room.sums.clear();
  float top = -infinity;
  for (std::size_t l = 0; l < room.models.size(); ++l) {
    const Model& m = room.models[l];
    if (m.sum() <= least - reach) continue;
    const Model t = m.tempered(q.tempering);
    entries.push_back(
        {.pixel = number, .list = static_cast<std::int32_t>(l), .largest = m.largest(), .typical = t.typical()});
    q.members += static_cast<double>(size(static_cast<std::int64_t>(l)));
    room.sums.push_back(t.sum()), top = std::max(top, t.sum());
  }
  double total = 0;  // of tempered weights, relative to 2^top
  for (const float sum : room.sums) total += static_cast<double>(std::exp2(std::max(-100.0f, sum - top)));
  const auto part = static_cast<float>(std::min(1.0, pilot_members / q.members));
  const float log_total = top + static_cast<float>(std::log2(total));
  for (Entry& e : entries) e.part = part, e.typical -= log_total;
  return entries;
}

}  // namespace pyels
