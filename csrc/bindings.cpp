// The seam to Python: addresses and sizes in, engines called without the GIL, results written where Python says.
// Python has validated everything before it comes here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>

#include "cuda_plan.h"
#include "pyels.h"

namespace py = pybind11;

namespace {

template <class T>
T* at(std::uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Copies each query's partial posterior into the arrays Python allocated.
struct CopyOut : pyels::Sink {
  double *m, *s, *y, *e, *top;  // (B, H, W), (B, H, W), (B, C, H, W), (B, H, W), (B, H, W)
  std::int64_t* source;         // (B, H, W)
  double *ss, *sy, *yy, *chance;  // (B, H, W), (B, C, H, W), (B, C, H, W), (B, H, W)

  void take(std::int64_t b, const pyels::Partial& from) override {
    const auto put = [b](const auto& values, auto* to) {
      std::copy(values.begin(), values.end(), to + b * static_cast<std::int64_t>(values.size()));
    };
    put(from.m, m), put(from.s, s), put(from.y, y);
    if (from.full) put(from.e, e), put(from.top, top), put(from.source, source);
    if (!from.sampled) return;
    put(from.ss, ss), put(from.sy, sy), put(from.yy, yy), put(from.chance, chance);
  }
};

bool signal_pending() {
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;  // leaves KeyboardInterrupt set
}

using Addresses = std::vector<std::uintptr_t>;

pyels::Problem bank_problem(std::uintptr_t pixels, bool is_uint8, std::array<std::int64_t, 4> shape, int sources,
                            std::int64_t patch_size, int threads) {
  pyels::Problem a;
  (is_uint8 ? void(a.pixels_uint8 = at<const std::uint8_t>(pixels)) : void(a.pixels_float = at<const float>(pixels)));
  a.images = shape[0], a.channels = shape[1], a.height = shape[2], a.width = shape[3];
  a.sources = static_cast<pyels::Sources>(sources);
  a.patch_size = patch_size, a.threads = threads, a.interrupted = signal_pending;
  return a;
}

pyels::Lists make_lists(std::int64_t count, std::int64_t directions, const Addresses& arrays) {
  pyels::Lists lists;
  lists.count = count, lists.directions_count = directions;
  lists.begin = at<const std::int64_t>(arrays[0]), lists.end = at<const std::int64_t>(arrays[1]);
  lists.image = at<const std::int32_t>(arrays[2]), lists.place = at<const std::uint16_t>(arrays[3]);
  lists.origin = at<const float>(arrays[4]), lists.directions = at<const float>(arrays[5]);
  lists.mean = at<const float>(arrays[6]), lists.spread = at<const float>(arrays[7]);
  lists.code = at<const std::int8_t>(arrays[8]);
  lists.norm = at<const float>(arrays[9]), lists.rest = at<const float>(arrays[10]);
  lists.step = at<const float>(arrays[11]);
  return lists;
}

template <class Work>
void without_gil(Work work) {
  try {
    const py::gil_scoped_release release;  // nothing below touches a Python object; the caller keeps the arrays alive
    work();
  } catch (const pyels::Interrupted&) {
    throw py::error_already_set();
  }
}

pyels::Problem make_problem(std::uintptr_t pixels, bool is_uint8, std::array<std::int64_t, 4> bank_shape,
                            std::uintptr_t order, std::int64_t queries, std::uintptr_t x, std::uintptr_t alpha,
                            std::uintptr_t sigma, std::uintptr_t begin, std::uintptr_t end, int window, int sources,
                            std::int64_t patch_size, int threads, bool full, bool tensor_cores) {
  pyels::Problem a = bank_problem(pixels, is_uint8, bank_shape, sources, patch_size, threads);
  a.order = at<const std::int64_t>(order);
  a.queries = queries, a.x = at<const float>(x);
  a.alpha = at<const double>(alpha), a.sigma = at<const double>(sigma);
  a.begin = at<const std::int64_t>(begin), a.end = at<const std::int64_t>(end);
  a.window = static_cast<pyels::Window>(window), a.full = full, a.tensor_cores = tensor_cores;
  return a;
}

// What every engine is told: the arguments of make_problem, by name.
template <class... Extra>
void define(py::module_& module, const char* name, auto function, Extra... extra) {
  module.def(name, function, py::kw_only(), py::arg("pixels"), py::arg("is_uint8"), py::arg("bank_shape"),
             py::arg("order"), py::arg("queries"), py::arg("x"), py::arg("alpha"), py::arg("sigma"), py::arg("begin"),
             py::arg("end"), py::arg("window"), py::arg("sources"), py::arg("patch_size"), py::arg("threads"),
             py::arg("full"), py::arg("tensor_cores"), extra...);
}

CopyOut copy_out(const Addresses& out) {
  CopyOut sink{};
  sink.m = at<double>(out[0]), sink.s = at<double>(out[1]), sink.y = at<double>(out[2]);
  sink.e = at<double>(out[3]), sink.top = at<double>(out[4]), sink.source = at<std::int64_t>(out[5]);
  if (out.size() == 6) return sink;
  sink.ss = at<double>(out[6]), sink.sy = at<double>(out[7]), sink.yy = at<double>(out[8]);
  sink.chance = at<double>(out[9]);
  return sink;
}

// The engines as Python calls them: the arguments of make_problem, and their own.
template <class... Arguments>
struct Engines {
  static void partial_posterior(Arguments... arguments, const std::string& engine, const Addresses& out) {
    const pyels::Problem a = make_problem(arguments...);
    CopyOut sink = copy_out(out);
    without_gil([&] { (engine == "reference" ? pyels::reference_engine : pyels::cpu_engine)(a, sink); });
  }

  static void sampled_posterior(Arguments... arguments, const Addresses& out, std::int64_t list_count,
                                std::int64_t list_directions, const Addresses& lists, double tolerance) {
    const pyels::Problem a = make_problem(arguments...);
    CopyOut sink = copy_out(out);
    without_gil([&] { pyels::lists_engine(a, make_lists(list_count, list_directions, lists), tolerance, sink); });
  }

#if defined(PYELS_CUDA)
  static std::int64_t cuda_workspace(Arguments... arguments, int device) {
    return pyels::cuda_workspace(make_problem(arguments...), device);
  }

  static void cuda_posterior(Arguments... arguments, const Addresses& out, std::uintptr_t workspace, int device,
                             std::uintptr_t stream) {
    const pyels::Problem a = make_problem(arguments...);
    const pyels::CudaOut to{at<double>(out[0]), at<double>(out[1]), at<double>(out[2]),
                            at<double>(out[3]), at<double>(out[4]), at<std::int64_t>(out[5])};
    without_gil([&] { pyels::cuda_engine(a, to, at<void>(workspace), device, at<void>(stream)); });
  }
#endif
};
template <class... Arguments>
Engines<Arguments...> engines_taking(pyels::Problem (*)(Arguments...));
using AllEngines = decltype(engines_taking(make_problem));

void describe_lists(std::uintptr_t pixels, bool is_uint8, std::array<std::int64_t, 4> bank_shape,
                    std::int64_t patch_size, int threads, std::int64_t list_count, std::int64_t list_directions,
                    const Addresses& lists) {
  const pyels::Problem a = bank_problem(pixels, is_uint8, bank_shape, 0, patch_size, threads);
  without_gil([&] {
    pyels::describe_lists(a, make_lists(list_count, list_directions, lists), at<float>(lists[6]),
                          at<float>(lists[7]), at<std::int8_t>(lists[8]), at<float>(lists[9]), at<float>(lists[10]));
  });
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled engines of pyels; use the Python interface instead.";
  define(module, "partial_posterior", &AllEngines::partial_posterior, py::arg("engine"), py::arg("out"));
  define(module, "sampled_posterior", &AllEngines::sampled_posterior, py::arg("out"), py::arg("list_count"),
         py::arg("list_directions"), py::arg("lists"), py::arg("tolerance"));
#if defined(PYELS_CUDA)
  module.def("cuda_driver_lacks", &pyels::cuda_driver_lacks);
  define(module, "cuda_workspace", &AllEngines::cuda_workspace, py::arg("device"));
  define(module, "cuda_posterior", &AllEngines::cuda_posterior, py::arg("out"), py::arg("workspace"),
         py::arg("device"), py::arg("stream"));
  module.attr("HAS_CUDA") = true;
#else
  module.attr("HAS_CUDA") = false;
#endif
  module.def("describe_lists", &describe_lists, py::kw_only(), py::arg("pixels"), py::arg("is_uint8"),
             py::arg("bank_shape"), py::arg("patch_size"), py::arg("threads"), py::arg("list_count"),
             py::arg("list_directions"), py::arg("lists"));
  module.attr("LIST_INTERVAL") = pyels::list_interval;
  module.attr("LIST_BLOCK") = pyels::list_block;
  module.def("available_isas", &pyels::available_isas, "Instruction sets this CPU can run, best first.");
  module.def("isa_in_use", &pyels::isa_in_use, "The one the cpu engine uses (PYELS_ISA, else the best).");
}
