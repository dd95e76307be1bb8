// Tiles, kernels and memory of the CUDA engine; see plan.h.
#include "cuda/plan.h"

#include <algorithm>
#include <cmath>

namespace pyels::cuda {
namespace {

Span largest_tile(Span span) {
  span.count = ceil_div(span.count, tiles_of(span));
  return span;
}

Layout plan_layout(const Plan& plan, std::int64_t channels) {
  Layout layout{};
  const std::int32_t reach_rows = plan.rows.window - 1, reach_columns = plan.columns.window - 1;
  std::int32_t strips = 1;
  for (std::int32_t i = 0; i < plan.rows.spans; ++i) {
    const Span span = largest_tile(plan.rows.span[i]);
    const std::int32_t tall = strips_of(span) * strip;
    layout.v_rows = std::max(layout.v_rows, tall);
    layout.x_rows = std::max(layout.x_rows, tall + reach_rows);
    const std::int32_t phi = span.meets == Meets::itself ? tall : strip;
    layout.phi_rows = std::max(layout.phi_rows, phi + reach_rows + together - 1);
  }
  for (std::int32_t i = 0; i < plan.columns.spans; ++i) {
    const Span span = largest_tile(plan.columns.span[i]);
    const std::int32_t wide = strips_of(span) * strip;
    strips = std::max(strips, strips_of(span));
    layout.x_pitch = std::max(layout.x_pitch, wide + reach_columns);
    const std::int32_t phi = span.meets == Meets::all ? steps_of(span) + strip - 1 : wide + steps_of(span) - 1;
    layout.phi_pitch = std::max(layout.phi_pitch, phi + reach_columns);
    layout.v_pitch = std::max(layout.v_pitch, wide + pieces_of(span) * reach_columns);
  }
  layout.threads = std::max(32, ceil_div(layout.v_rows * strips, 32) * 32);
  if (plan.columns.window <= largest_fixed) {
    layout.x_pitch = x_pitch_of(plan.columns.window), layout.v_pitch = v_pitch_of(plan.columns.window);
    layout.v_rows = tile_side;
  }
  // Odd, so that neighbouring threads, which are at neighbouring rows, read from different banks.
  layout.phi_pitch |= 1, layout.v_pitch |= 1;
  layout.floats =
      channels * (std::int64_t{layout.x_rows} * layout.x_pitch + std::int64_t{layout.phi_rows} * layout.phi_pitch) +
      std::int64_t{together} * layout.v_rows * layout.v_pitch;
  return layout;
}

// Sums of the pixels of each thread, a tile of an image, and its norms.
std::int64_t product_shared_bytes(const Problem& a) {
  const std::int64_t sums = 2 * product_threads * total_bytes(a.channels == 1 ? 1 : y_channels);
  return sums + 4 * (a.channels * (tile_side + a.patch_size - 1) * product_pitch + tile_side * tile_side);
}

}  // namespace

Plan make_plan(const Problem& a, const CudaOptions& options, std::int64_t shared_bytes) {
  Plan plan{};
  plan.rows = source_axis(a, a.height), plan.columns = source_axis(a, a.width);
  const std::int64_t pixels = a.height * a.width;
  plan.fields = 2 + a.channels + (a.full() ? 3 : 0);
  plan.partial_size = pixels * plan.fields;
  if (a.window == Window::image) {
    plan.method = Method::images;
    plan.moves = static_cast<std::int32_t>(a.sources == Sources::circular ? pixels : 1);
  } else {
    plan.layout = plan_layout(plan, a.channels);
    // Windows that reach beyond the image, or too far for shared memory: few sources, or a rare size.
    const bool square = plan.rows.window == a.patch_size && plan.columns.window == a.patch_size;
    plan.method = square && plan.layout.floats * 4 <= shared_bytes ? Method::maps : Method::direct;
    const bool met_by_all = plan.rows.span[0].meets != Meets::itself && plan.columns.span[0].meets != Meets::itself;
    if (options.tensor_cores && plan.method == Method::maps && a.pixels_uint8 && met_by_all &&
        a.channels * a.patch_size * a.patch_size <= most_product_values) {
      const std::int64_t shared = product_shared_bytes(a);
      if (shared <= shared_bytes) plan.product_shared = shared;
    }
  }
  const std::int64_t bytes = plan.partial_size * 8;
  plan.segments = static_cast<std::int32_t>(std::clamp<std::int64_t>(workspace_bytes / bytes, 1, most_segments));
  plan.queries =
      static_cast<std::int32_t>(std::clamp<std::int64_t>(workspace_bytes / (bytes * plan.segments), 1, most_queries));
  std::int64_t most = 1;
  for (std::int64_t b = 0; b < a.queries; ++b)
    most = std::max<std::int64_t>(most, segments_of(a, plan, a.end[b] - a.begin[b]));
  const std::int64_t queries = std::clamp<std::int64_t>(a.queries, 1, plan.queries);
  plan.workspace = queries * most * bytes;
  if (plan.method == Method::images) plan.workspace += queries * images_at_once(a, plan) * plan.moves * 8;
  return plan;
}

bool by_products(const Problem& a, const Plan& plan, std::int64_t b) {
  if (plan.product_shared == 0 || a.want & want_second) return false;
  // Of pixels within [-1, 1] and their noise: (2 alpha |x| |phi| + |alpha phi|^2) / (2 sigma^2).
  const double alpha = a.alpha[b], sigma = a.sigma[b],
               values = static_cast<double>(a.channels) * a.patch_size * a.patch_size;
  const double nats = values * alpha * (2 * std::sqrt(alpha * alpha + sigma * sigma) + alpha) / (2 * sigma * sigma);
  return nats <= most_product_nats;
}

std::int64_t images_at_once(const Problem& a, const Plan& plan) {
  std::int64_t most = 1;
  for (std::int64_t b = 0; b < a.queries; ++b) most = std::max(most, a.end[b] - a.begin[b]);
  return plan.method == Method::images ? std::clamp<std::int64_t>(most_entries / plan.moves, 1, most) : most;
}

std::int32_t segments_of(const Problem& a, const Plan& plan, std::int64_t images) {
  std::int64_t segments = std::clamp<std::int64_t>(images, 1, plan.segments);
  if (plan.method == Method::images) {
    const std::int64_t entries = std::min(images * plan.moves, most_entries);
    segments = std::clamp<std::int64_t>(entries / 64, 1, std::min(plan.segments, 64));
  }
  // Sources of a segment are numbered in 32 bits.
  const std::int64_t pixels = a.height * a.width;
  return static_cast<std::int32_t>(std::max(segments, images * pixels / (0x7fffffff - pixels) + 1));
}

SecondPlan make_second_plan(const Problem& a, const Second& second, std::int64_t shared_bytes) {
  SecondPlan plan{};
  plan.rows = source_axis(a, a.height), plan.columns = source_axis(a, a.width);
  const std::int64_t pixels = a.height * a.width;
  plan.values =
      a.channels * ((second.folded != nullptr) + (second.variance != nullptr) + (second.derivative != nullptr));
  plan.pitch = (ceil_div(plan.columns.length, strip) * strip + plan.columns.window - 1) | 1;  // odd, as of Layout
  const SecondMaps maps = second_maps(plan.rows, plan.pitch, second.derivative != nullptr);
  plan.floats = maps.sums + plan.values * pixels;
  plan.shared = plan.floats * 4 <= shared_bytes;
  plan.prepared = plan.rows.window + plan.columns.window + (2 * a.channels + 1) * pixels;
  plan.segment_size = plan.values * pixels * 8 + (plan.shared ? 0 : plan.floats * 4);
  plan.segments =
      static_cast<std::int32_t>(std::clamp<std::int64_t>(workspace_bytes / plan.segment_size, 1, most_segments));
  plan.queries = static_cast<std::int32_t>(
      std::clamp<std::int64_t>(workspace_bytes / (plan.segment_size * plan.segments), 1, most_queries));
  std::int64_t most = 1;
  for (std::int64_t b = 0; b < a.queries; ++b)
    most = std::max<std::int64_t>(most, segments_of(a, plan, a.end[b] - a.begin[b]));
  const std::int64_t queries = std::clamp<std::int64_t>(a.queries, 1, plan.queries);
  plan.workspace = queries * (most * plan.segment_size + plan.prepared * 4);
  return plan;
}

std::int32_t segments_of(const Problem&, const SecondPlan& plan, std::int64_t images) {
  return static_cast<std::int32_t>(std::clamp<std::int64_t>(images * shifts_of(plan.rows), 1, plan.segments));
}

}  // namespace pyels::cuda
