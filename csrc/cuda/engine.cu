// The exact engine on NVIDIA GPUs: launches of its kernels, of which those in maps.cuh, or for precision "high"
// in products.cuh, do nearly all of the work. Each block fills in the partial posterior of a segment of the bank,
// and the last kernel merges these in the order of the bank, so nothing depends on which block was first.
#include <stdexcept>
#include <string>

#include "cuda/device.cuh"
#include "cuda/direct.cuh"
#include "cuda/images.cuh"
#include "cuda/maps.cuh"
#include "cuda/products.cuh"
#include "cuda/second.cuh"

namespace pyels {
namespace cuda {
namespace {

// ---- Merging -----------------------------------------------------------------------------------------------------

// The segments of every pixel, in the order of the bank, after what `out` holds already (more) or not.
__global__ void __launch_bounds__(most_threads)
    merge_segments(const __grid_constant__ Task t, Out out, bool by_entries, bool more) {
  const Query& query = t.query[blockIdx.z];
  const std::int64_t pixels = std::int64_t{t.height} * t.width;
  const std::int64_t p = std::int64_t{blockIdx.x} * most_threads + threadIdx.x, at = query.b * pixels + p;
  if (p >= pixels) return;
  const auto y_of = [&](int c) -> double& { return out.y[(query.b * t.channels + c) * pixels + p]; };
  Sums total{-infinite, 0.0, 0.0, -infinite, -1};
  if (more) {
    total.m = out.m[at], total.s = out.s[at];
    if (t.full) total.e = out.e[at], total.top = out.top[at], total.source = out.source[at];
  } else {
    for (int c = 0; c < t.channels; ++c) y_of(c) = 0.0;
  }
  const std::int64_t images = query.end - query.begin;
  for (int segment = 0; segment < query.segments; ++segment) {
    const PartialAt part = partial_at(t, query, segment);
    if (!(part.s(p) > 0.0)) continue;
    Sums own{part.m(p) * ln2, part.s(p), 0.0, 0.0, 0};
    if (t.full) {
      // Sources are numbered from the segment's first image.
      const std::int64_t first = by_entries ? 0 : first_of(segment, query.segments, images);
      const std::int64_t source = part.source(p), image = image_number(t, query.begin + first + source / pixels);
      own.e = part.e(p) * ln2;
      own.top = -query.weighing.scale * part.nearest(p) * ln2;
      own.source = image * pixels + source % pixels;
    }
    const Scales scales = merge_sums(total, own, t.full, pixels);
    for (int c = 0; c < t.channels; ++c) y_of(c) = scales.into * y_of(c) + scales.from * (part.y(c, p) * t.unit);
  }
  out.m[at] = total.m, out.s[at] = total.s;
  if (t.full) out.e[at] = total.e, out.top[at] = total.top, out.source[at] = total.source;
}

// ---- Launches ----------------------------------------------------------------------------------------------------

void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Makes a device the current one of this thread, as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_));
    if (device == before_)
      before_ = -1;  // nothing to go back to: that would open a context there
    else
      check(cudaSetDevice(device));
  }
  ~OnDevice() {
    if (before_ >= 0) (void)cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
};

// What a block of the current device may have.
int shared_bytes() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 blocks, int threads, std::int64_t shared, cudaStream_t stream,
            Arguments... arguments) {
  if (shared > 48 * 1024)
    // Always the most: other threads launch the same kernel for other sizes.
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                               shared_bytes()));
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<std::size_t>(shared), config.stream = stream;
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

using Kernel = void (*)(Task);

// The kernels for K, or those for any larger window (K = 0); for one channel, or for up to y_channels at a time.
template <int K>
Kernel maps_kernel(bool one_channel, bool full) {
  return one_channel ? (full ? maps<K, 1, true> : maps<K, 1, false>)
                     : (full ? maps<K, y_channels, true> : maps<K, y_channels, false>);
}
Kernel maps_kernel(int k, bool one_channel, bool full) {
  switch (k) {
    case 1: return maps_kernel<1>(one_channel, full);
    case 3: return maps_kernel<3>(one_channel, full);
    case 5: return maps_kernel<5>(one_channel, full);
    case 7: return maps_kernel<7>(one_channel, full);
    default: return maps_kernel<0>(one_channel, full);
  }
}

// The kernels for windows of up to 8 STEPS values; channels as above.
template <int STEPS, int YC>
Kernel products_kernel(bool full) {
  return full ? products<STEPS, YC, true> : products<STEPS, YC, false>;
}
Kernel products_kernel(std::int64_t values, bool one_channel, bool full) {
  static_assert(most_product_values == 80);
  if (!one_channel) return values <= 32 ? products_kernel<4, y_channels>(full) : products_kernel<10, y_channels>(full);
  if (values <= 16) return products_kernel<2, 1>(full);
  return values <= 32 ? products_kernel<4, 1>(full) : products_kernel<7, 1>(full);  // k up to 7
}

dim3 grid(std::int64_t x, std::int64_t y, std::int64_t z) {
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

// The kernels of the second pass, for K, or for any windows (K = 0).
void (*second_kernel(const SecondPlan& plan))(SecondTask) {
  switch (plan.rows.window == plan.columns.window ? plan.rows.window : 0) {
    case 3: return second_pass<3>;
    case 5: return second_pass<5>;
    case 7: return second_pass<7>;
    default: return second_pass<0>;
  }
}

Task make_task(const Problem& a, const SourceAxis& rows, const SourceAxis& columns, void* workspace) {
  Task t{};
  t.bytes = a.pixels_uint8, t.floats = a.pixels_float, t.order = a.order, t.x = a.x;
  t.unit = a.pixels_uint8 ? 1 / 127.5 : 1.0;
  t.partials = static_cast<double*>(workspace);
  t.channels = static_cast<std::int32_t>(a.channels);
  t.height = static_cast<std::int32_t>(a.height), t.width = static_cast<std::int32_t>(a.width);
  t.full = a.full(), t.rows = rows, t.columns = columns;
  return t;
}

// What the queries of a launch have: the most of one, of all together, and the most of one.
struct Launched {
  std::int32_t segments = 0;
  std::int64_t partials = 0, images = 0;
};
// Queries b0 .. of a launch, whose windows have so many values, and pixels so many sources in an image.
template <class Plan>
Launched load_queries(const Problem& a, const Plan& plan, std::int64_t b0, double sources, std::int64_t window_values,
                      Task& t) {
  Launched all;
  t.queries = static_cast<std::int32_t>(std::min<std::int64_t>(plan.queries, a.queries - b0));
  for (std::int32_t i = 0; i < t.queries; ++i) {
    const std::int64_t b = b0 + i, own = a.end[b] - a.begin[b];
    Query& query = t.query[i];
    query = {b,
             a.begin[b],
             a.end[b],
             all.partials,
             segments_of(a, plan, own),
             a.alpha[b] * t.unit,
             false,
             weighing(a, b, std::max<double>(1.0, static_cast<double>(own)) * sources, window_values)};
    if (a.want & want_second) query.weighing.always_exact_above = query.weighing.exact_above;
    all.partials += query.segments;
    all.segments = std::max(all.segments, query.segments), all.images = std::max(all.images, own);
  }
  return all;
}

}  // namespace
}  // namespace cuda

std::int64_t cuda_workspace(const Problem& a, const CudaOptions& options, int device) {
  const cuda::OnDevice on_device(device);
  return cuda::make_plan(a, options, cuda::shared_bytes()).workspace;
}

int cuda_driver_lacks() {
  int driver = 0, runtime = 0;
  cuda::check(cudaDriverGetVersion(&driver)), cuda::check(cudaRuntimeGetVersion(&runtime));
  return driver / 1000 < runtime / 1000 ? runtime : 0;  // within a major version any driver will do
}

void cuda_engine(const Problem& a, const CudaOptions& options, const Out& out, void* workspace, int device,
                 void* stream_) {
  using namespace cuda;
  const OnDevice on_device(device);
  const auto stream = static_cast<cudaStream_t>(stream_);
  const Plan plan = make_plan(a, options, shared_bytes());
  const std::int64_t pixels = a.height * a.width;
  const bool whole_images = plan.method == Method::images;
  const std::int64_t window_values =
      a.channels * (whole_images ? pixels : std::int64_t{plan.rows.window} * plan.columns.window);
  const double sources =
      whole_images ? plan.moves : static_cast<double>(most_sources(plan.rows)) * most_sources(plan.columns);
  const std::int64_t pixel_blocks = (pixels + most_threads - 1) / most_threads;

  for (std::int64_t b0 = 0; b0 < a.queries; b0 += plan.queries) {
    Task t = make_task(a, plan.rows, plan.columns, workspace);
    t.moves = plan.moves, t.layout = plan.layout;
    const auto [segments, partials, images] = load_queries(a, plan, b0, sources, window_values, t);
    for (std::int32_t i = 0; i < t.queries; ++i) t.query[i].by_products = by_products(a, plan, b0 + i);
    t.distances = t.partials + partials * plan.partial_size;

    // Every launch has as many channels of y as a thread holds sums of.
    const bool one_channel = a.channels == 1;
    const auto for_all_channels = [&](Task task, Kernel kernel, dim3 blocks, int threads, std::int64_t shared) {
      for (task.first_channel = 0; task.first_channel < task.channels; task.first_channel += y_channels) {
        task.channel_count = std::min(y_channels, task.channels - task.first_channel);
        launch(kernel, blocks, threads, shared, stream, task);
      }
    };
    const auto merge_all = [&](const Task& task, bool more) {
      launch(merge_segments, grid(pixel_blocks, 1, t.queries), most_threads, 0, stream, task, out, whole_images, more);
    };
    if (plan.method == Method::maps) {
      const bool some = std::any_of(t.query, t.query + t.queries, [](const Query& query) { return query.by_products; });
      if (some) {
        const std::int64_t met_by_all = std::int64_t{plan.rows.span[0].count} * plan.columns.span[0].count;
        for_all_channels(t, products_kernel(window_values, one_channel, a.full()),
                         grid((met_by_all + product_pixels - 1) / product_pixels, segments, t.queries), product_threads,
                         plan.product_shared);
      }
      const std::int64_t tiles = std::int64_t{tiles_of(plan.rows)} * tiles_of(plan.columns);
      for_all_channels(t, maps_kernel(plan.rows.window, one_channel, a.full()), grid(tiles, segments, t.queries),
                       plan.layout.threads, plan.layout.floats * 4);
      merge_all(t, false);
    } else if (plan.method == Method::direct) {
      if (one_channel)
        for_all_channels(t, direct<1>, grid(pixels, segments, t.queries), most_threads,
                         most_threads * sizeof(Total<1>));
      else
        for_all_channels(t, direct<y_channels>, grid(pixels, segments, t.queries), most_threads,
                         most_threads * sizeof(Total<y_channels>));
      merge_all(t, false);
    } else {
      const std::int64_t step = images_at_once(a, plan), entries = step * t.moves;
      t.distances_most = entries;
      for (std::int64_t done = 0; done == 0 || done < images; done += step) {
        Task part = t;
        for (std::int32_t i = 0; i < t.queries; ++i) {
          Query& query = part.query[i];
          query.begin = std::min(query.begin + done, query.end), query.end = std::min(query.begin + step, query.end);
        }
        const std::int64_t warps = most_threads / 32;
        launch(image_distances, grid((entries + warps - 1) / warps, 1, t.queries), most_threads, 0, stream, part);
        launch(exact_distances, grid(segments, 1, t.queries), most_threads, most_threads * 8, stream, part);
        for_all_channels(part, one_channel ? weigh_images<1> : weigh_images<y_channels>,
                         grid(pixel_blocks, segments, t.queries), most_threads, most_threads * 8);
        merge_all(part, done > 0);
      }
    }
  }
}

std::int64_t cuda_workspace(const Problem& a, const Second& second, int device) {
  const cuda::OnDevice on_device(device);
  return cuda::make_second_plan(a, second, cuda::shared_bytes()).workspace;
}

void cuda_second(const Problem& a, const Second& second, void* workspace, int device, void* stream_) {
  using namespace cuda;
  const OnDevice on_device(device);
  const auto stream = static_cast<cudaStream_t>(stream_);
  const SecondPlan plan = make_second_plan(a, second, shared_bytes());
  const std::int64_t pixels = a.height * a.width, window_values = a.channels * plan.rows.window * plan.columns.window;
  const double sources = static_cast<double>(most_sources(plan.rows)) * most_sources(plan.columns);
  const auto blocks = [](std::int64_t threads) { return (threads + most_threads - 1) / most_threads; };

  for (std::int64_t b0 = 0; b0 < a.queries; b0 += plan.queries) {
    SecondTask t{};
    static_cast<Task&>(t) = make_task(a, plan.rows, plan.columns, workspace), t.second = second;
    const Launched all = load_queries(a, plan, b0, sources, window_values, t);
    t.prepared = reinterpret_cast<float*>(t.partials + all.partials * plan.values * pixels);
    t.prepared_size = plan.prepared, t.floats = plan.floats;
    if (!plan.shared) t.maps = t.prepared + t.queries * plan.prepared;
    t.patch_size = static_cast<std::int32_t>(a.patch_size), t.pitch = plan.pitch;
    t.most_segments = all.segments, t.values = static_cast<std::int32_t>(plan.values);
    const std::int64_t most = std::max<std::int64_t>({pixels, plan.rows.window, plan.columns.window});
    launch(prepare_second, grid(blocks(most), 1, t.queries), most_threads, 0, stream, t);
    launch(second_kernel(plan), grid(all.segments, 1, t.queries), most_threads, plan.shared ? plan.floats * 4 : 0,
           stream, t);
    launch(add_segments, grid(blocks(plan.values * pixels), 1, t.queries), most_threads, 0, stream, t);
  }
}

}  // namespace pyels
