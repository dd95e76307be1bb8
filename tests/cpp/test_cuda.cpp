// The CUDA engine without a GPU: its very source, on an emulation of blocks and threads (emulated/cuda_runtime.h), against
// the definition in double precision; and what it plans on the host.
#include <cstring>

#include <cuda_runtime.h>

#include "cuda_plan.h"
#include "exact.h"

using namespace exact;

namespace {

// As an engine that writes into a sink. What memory holds at first must not matter.
void cuda_engine(const Problem& a, pyels::Sink& sink) {
  const auto pixels = static_cast<std::size_t>(a.height * a.width), queries = static_cast<std::size_t>(a.queries);
  const auto channels = static_cast<std::size_t>(a.channels);
  const auto poisoned = [](std::size_t n) { return std::vector<double>(n, std::nan("")); };
  std::vector<double> m = poisoned(queries * pixels), s = m, e = m, top = m, y = poisoned(queries * channels * pixels);
  std::vector<std::int64_t> source(queries * pixels, -7);
  std::vector<double> workspace = poisoned(static_cast<std::size_t>(pyels::cuda_workspace(a, 0)) / 8);
  pyels::CudaOut out{m.data(), s.data(), y.data(), nullptr, nullptr, nullptr};
  if (a.full) out.e = e.data(), out.top = top.data(), out.source = source.data();
  pyels::cuda_engine(a, out, workspace.data(), 0, nullptr);
  for (std::size_t b = 0; b < queries; ++b) {
    Partial partial(a.height * a.width, a.channels, a.full);
    const auto take = [&](const auto& from, auto& to) {
      std::copy_n(from.begin() + static_cast<std::ptrdiff_t>(b * to.size()), to.size(), to.begin());
    };
    take(m, partial.m), take(s, partial.s), take(y, partial.y);
    if (a.full) take(e, partial.e), take(top, partial.top), take(source, partial.source);
    sink.take(static_cast<std::int64_t>(b), partial);
  }
}

}  // namespace

int main() {
  on_every_engine = [](const std::string& what, const std::function<void(Engine)>& body) {
    context = what;
    body(cuda_engine);
  };
  const int failed = run_tests({{"bank sizes and classes", bank_sizes_and_classes},
                                {"every source counts once", every_source_counts_once},
                                {"every window size", every_window_size},
                                {"extreme noise", extreme_noise},
                                {"parts of a bank merge to the whole", parts_of_a_bank_merge_to_the_whole}});
  report();
  return failed != 0;
}
