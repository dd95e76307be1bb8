// The seam to Python: the structs of the engines, bound by name, and the engines, called without the GIL. Addresses are
// ints there. Python has validated everything before it comes here, and keeps the arrays alive.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <type_traits>

#include "cpu/engine.h"
#include "cuda/engine.h"
#include "mapped.h"
#include "pyels.h"
#include "sampled/engine.h"
#include "weighing.h"

namespace py = pybind11;

namespace {

using pyels::CpuOptions;
using pyels::CudaOptions;
using pyels::Lists;
using pyels::Out;
using pyels::Problem;
using pyels::SampledOptions;
using pyels::Second;

// A struct as a Python class; a name that it lacks raises AttributeError.
template <class Struct>
class Bound {
 public:
  Bound(py::module_& module, const char* name) : class_(module, name) { class_.def(py::init<>()); }

  // A field, as a number: pointers are addresses.
  template <class T>
  Bound& field(const char* name, T Struct::*member) {
    if constexpr (std::is_pointer_v<T>)
      class_.def_property(
          name, [=](const Struct& s) { return reinterpret_cast<std::uintptr_t>(s.*member); },
          [=](Struct& s, std::uintptr_t address) { s.*member = reinterpret_cast<T>(address); });
    else if constexpr (std::is_enum_v<T>)
      class_.def_property(
          name, [=](const Struct& s) { return static_cast<int>(s.*member); },
          [=](Struct& s, int number) { s.*member = static_cast<T>(number); });
    else
      class_.def_readwrite(name, member);
    return *this;
  }

 private:
  py::class_<Struct> class_;
};

bool signal_pending() {
  const py::gil_scoped_acquire gil;
  return PyErr_CheckSignals() != 0;  // leaves KeyboardInterrupt set
}

// Calls work(problem) without the GIL: nothing in there touches a Python object.
template <class Work>
void without_gil(Problem problem, Work work) {
  problem.interrupted = signal_pending;
  try {
    const py::gil_scoped_release release;
    work(problem);
  } catch (const pyels::Interrupted&) {
    throw py::error_already_set();
  }
}

// Copies each query's partial posterior to the arrays that Python allocated: of what is not wanted there is none.
struct CopyOut : pyels::Sink {
  const Out out;
  explicit CopyOut(const Out& out_) : out(out_) {}

  void take(std::int64_t b, const pyels::Partial& from) override {
    const auto put = [b](const auto& values, auto* to) {
      if (to) std::copy(values.begin(), values.end(), to + b * static_cast<std::int64_t>(values.size()));
    };
    put(from.m, out.m), put(from.s, out.s), put(from.y, out.y);
    if (from.full) put(from.e, out.e), put(from.top, out.top), put(from.source, out.source);
    if (!from.sampled) return;
    put(from.ss, out.ss), put(from.sy, out.sy), put(from.yy, out.yy), put(from.chance, out.chance);
  }
};

}  // namespace

// clang-format off
PYBIND11_MODULE(_core, module) {
  module.doc() = "Compiled engines of pyels; use the Python interface instead.";

  Bound<Problem>(module, "Problem")
      .field("pixels_uint8", &Problem::pixels_uint8)
      .field("pixels_float", &Problem::pixels_float)
      .field("images", &Problem::images)
      .field("channels", &Problem::channels)
      .field("height", &Problem::height)
      .field("width", &Problem::width)
      .field("order", &Problem::order)
      .field("responses_uint8", &Problem::responses_uint8)
      .field("responses_float", &Problem::responses_float)
      .field("response_channels", &Problem::response_channels)
      .field("queries", &Problem::queries)
      .field("x", &Problem::x)
      .field("alpha", &Problem::alpha)
      .field("sigma", &Problem::sigma)
      .field("begin", &Problem::begin)
      .field("end", &Problem::end)
      .field("precision", &Problem::precision)
      .field("window", &Problem::window)
      .field("sources", &Problem::sources)
      .field("patch_size", &Problem::patch_size)
      .field("taps", &Problem::taps)
      .field("masks", &Problem::masks)
      .field("sets", &Problem::sets)
      .field("want", &Problem::want);

  Bound<Out>(module, "Out")
      .field("m", &Out::m)
      .field("s", &Out::s)
      .field("y", &Out::y)
      .field("e", &Out::e)
      .field("top", &Out::top)
      .field("source", &Out::source)
      .field("ss", &Out::ss)
      .field("sy", &Out::sy)
      .field("yy", &Out::yy)
      .field("chance", &Out::chance);

  Bound<Second>(module, "Second")
      .field("log_sum", &Second::log_sum)
      .field("fold_taps", &Second::fold_taps)
      .field("folded", &Second::folded)
      .field("mean", &Second::mean)
      .field("variance", &Second::variance)
      .field("cotangent", &Second::cotangent)
      .field("derivative", &Second::derivative)
      .field("influence", &Second::influence)
      .field("top", &Second::top)
      .field("pixels", &Second::pixels)
      .field("pixel", &Second::pixel)
      .field("heaviest", &Second::heaviest)
      .field("heaviest_source", &Second::heaviest_source);

  Bound<Lists>(module, "Lists")
      .field("region", &Lists::region)
      .field("count", &Lists::count)
      .field("begin", &Lists::begin)
      .field("end", &Lists::end)
      .field("window", &Lists::window)
      .field("mean", &Lists::mean)
      .field("spread", &Lists::spread)
      .field("directions_count", &Lists::directions_count)
      .field("usable", &Lists::usable)
      .field("origin", &Lists::origin)
      .field("directions", &Lists::directions)
      .field("step", &Lists::step)
      .field("lead", &Lists::lead)
      .field("tail", &Lists::tail);

  Bound<CpuOptions>(module, "CpuOptions")
      .field("threads", &CpuOptions::threads);

  Bound<SampledOptions>(module, "SampledOptions")
      .field("threads", &SampledOptions::threads)
      .field("tolerance", &SampledOptions::tolerance)
      .field("dice", &SampledOptions::dice);

  Bound<CudaOptions>(module, "CudaOptions")
      .field("tensor_cores", &CudaOptions::tensor_cores);

  module.def("reference_engine", [](const Problem& problem, const Out& out) {
    CopyOut sink(out);
    without_gil(problem, [&](const Problem& a) { pyels::reference_engine(a, sink); });
  }, py::arg("problem"), py::arg("out"));

  module.def("reference_second", [](const Problem& problem, const Second& second) {
    without_gil(problem, [&](const Problem& a) { pyels::reference_second(a, second); });
  }, py::arg("problem"), py::arg("second"));

  module.def("cpu_engine", [](const Problem& problem, CpuOptions options, const Out& out) {
    CopyOut sink(out);
    without_gil(problem, [&](const Problem& a) { pyels::cpu_engine(a, options, sink); });
  }, py::arg("problem"), py::arg("options"), py::arg("out"));

  module.def("cpu_second", [](const Problem& problem, CpuOptions options, const Second& second) {
    without_gil(problem, [&](const Problem& a) { pyels::cpu_second(a, options, second); });
  }, py::arg("problem"), py::arg("options"), py::arg("second"));

  module.def("sampled_engine", [](const Problem& problem, SampledOptions options, const std::vector<Lists>& lists, const Out& out) {
    CopyOut sink(out);
    without_gil(problem, [&](const Problem& a) { pyels::sampled_engine(a, options, lists, sink); });
  }, py::arg("problem"), py::arg("options"), py::arg("lists"), py::arg("out"));

  module.def("describe_lists", [](const Problem& problem, CpuOptions options, Lists lists) {
    without_gil(problem, [&](const Problem& a) { pyels::describe_lists(a, options, lists); });
  }, py::arg("problem"), py::arg("options"), py::arg("lists"),
  "Fills in mean, spread, lead and tail of the lists.");

#if defined(PYELS_CUDA)
  module.def("cuda_workspace", py::overload_cast<const Problem&, const CudaOptions&, int>(&pyels::cuda_workspace),
             py::arg("problem"), py::arg("options"), py::arg("device"));
  module.def("cuda_workspace", py::overload_cast<const Problem&, const Second&, int>(&pyels::cuda_workspace),
             py::arg("problem"), py::arg("second"), py::arg("device"));

  module.def("cuda_engine", [](const Problem& problem, CudaOptions options, Out out, std::uintptr_t workspace,
                               int device, std::uintptr_t stream) {
    without_gil(problem, [&](const Problem& a) {
      pyels::cuda_engine(a, options, out, reinterpret_cast<void*>(workspace), device, reinterpret_cast<void*>(stream));
    });
  }, py::arg("problem"), py::arg("options"), py::arg("out"), py::arg("workspace"), py::arg("device"),
  py::arg("stream"));

  module.def("cuda_second", [](const Problem& problem, const Second& second, std::uintptr_t workspace, int device,
                               std::uintptr_t stream) {
    without_gil(problem, [&](const Problem& a) {
      pyels::cuda_second(a, second, reinterpret_cast<void*>(workspace), device, reinterpret_cast<void*>(stream));
    });
  }, py::arg("problem"), py::arg("second"), py::arg("workspace"), py::arg("device"), py::arg("stream"));

  module.def("cuda_driver_lacks", &pyels::cuda_driver_lacks);
  module.attr("HAS_CUDA") = true;
#else
  module.attr("HAS_CUDA") = false;
#endif

  module.def("guard_mapped", &pyels::guard_mapped, py::arg("address"), py::arg("bytes"),
             "What is missing of a mapped file that was cut off reads as zeros, and ends no process.");
  module.def("unguard_mapped", &pyels::unguard_mapped, py::arg("address"));

  module.attr("INTERVAL") = pyels::interval;
  module.attr("FLOAT32_REACH") = pyels::float32_reach;
  module.attr("LIST_BLOCK") = pyels::list_block, module.attr("LEADING") = pyels::leading;
  module.def("available_isas", &pyels::available_isas, "Instruction sets this CPU can run, best first.");
  module.def("isa_in_use", &pyels::isa_in_use, "The one the cpu engine uses (PYELS_ISA, else the best).");
}
