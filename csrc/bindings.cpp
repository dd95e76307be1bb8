// The seam to Python: addresses and sizes in, engines called without the GIL, results written where Python says.
// Python has validated everything before it comes here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <string>

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

  void take(std::int64_t b, const pyels::Partial& from) override {
    const auto put = [b](const auto& values, auto* to) {
      std::copy(values.begin(), values.end(), to + b * static_cast<std::int64_t>(values.size()));
    };
    put(from.m, m), put(from.s, s), put(from.y, y);
    if (from.full) put(from.e, e), put(from.top, top), put(from.source, source);
  }
};

bool signal_pending() {
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;  // leaves KeyboardInterrupt set
}

void partial_posterior(const std::string& engine, std::uintptr_t pixels, bool is_uint8,
                       std::array<std::int64_t, 4> bank_shape, std::uintptr_t order, std::int64_t queries,
                       std::uintptr_t x, std::uintptr_t alpha, std::uintptr_t sigma, std::uintptr_t begin,
                       std::uintptr_t end, int window, int sources, std::int64_t patch_size, int threads, bool full,
                       std::array<std::uintptr_t, 6> out) {
  pyels::Problem a;
  (is_uint8 ? void(a.pixels_uint8 = at<const std::uint8_t>(pixels)) : void(a.pixels_float = at<const float>(pixels)));
  a.channels = bank_shape[1], a.height = bank_shape[2], a.width = bank_shape[3];
  a.order = at<const std::int64_t>(order);
  a.queries = queries, a.x = at<const float>(x);
  a.alpha = at<const double>(alpha), a.sigma = at<const double>(sigma);
  a.begin = at<const std::int64_t>(begin), a.end = at<const std::int64_t>(end);
  a.window = static_cast<pyels::Window>(window), a.sources = static_cast<pyels::Sources>(sources);
  a.patch_size = patch_size, a.threads = threads, a.full = full, a.interrupted = signal_pending;
  CopyOut sink;
  sink.m = at<double>(out[0]), sink.s = at<double>(out[1]), sink.y = at<double>(out[2]);
  sink.e = at<double>(out[3]), sink.top = at<double>(out[4]), sink.source = at<std::int64_t>(out[5]);
  try {
    const py::gil_scoped_release release;  // nothing below touches a Python object; the caller keeps the arrays alive
    (engine == "reference" ? pyels::reference_engine : pyels::cpu_engine)(a, sink);
  } catch (const pyels::Interrupted&) {
    throw py::error_already_set();
  }
}

}  // namespace

PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled engines of pyels; use the Python interface instead.";
  module.def("partial_posterior", &partial_posterior, py::kw_only(), py::arg("engine"), py::arg("pixels"),
             py::arg("is_uint8"), py::arg("bank_shape"), py::arg("order"), py::arg("queries"), py::arg("x"),
             py::arg("alpha"), py::arg("sigma"), py::arg("begin"), py::arg("end"), py::arg("window"),
             py::arg("sources"), py::arg("patch_size"), py::arg("threads"), py::arg("full"), py::arg("out"));
  module.def("available_isas", &pyels::available_isas, "Instruction sets this CPU can run, best first.");
  module.def("isa_in_use", &pyels::isa_in_use, "The one the cpu engine uses (PYELS_ISA, else the best).");
}
