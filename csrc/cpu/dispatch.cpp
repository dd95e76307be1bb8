// Which instruction sets this CPU runs, and the one to use.
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/engine.h"
#include "cpu/maps.h"

namespace pyels {
namespace {

std::vector<const Kernel*> runnable_kernels() {
  std::vector<const Kernel*> kernels;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") &&
                  __builtin_cpu_supports("lzcnt") && __builtin_cpu_supports("movbe");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                  __builtin_cpu_supports("avx512cd");
  if (v4) kernels.push_back(&x86_64_v4::kernel);
  if (v3) kernels.push_back(&x86_64_v3::kernel);
  if (v2) kernels.push_back(&x86_64_v2::kernel);
#else
  kernels.push_back(&generic::kernel);
#endif
  return kernels;
}

}  // namespace

const Kernel& kernel_in_use() {
  const std::vector<const Kernel*> kernels = runnable_kernels();
  if (kernels.empty()) throw std::runtime_error("this CPU lacks x86-64-v2 (SSE4.2), the least the cpu engine needs");
  const char* forced = std::getenv("PYELS_ISA");
  if (!forced || !*forced) return *kernels.front();
  std::string allowed;
  for (const Kernel* kernel : kernels) {
    if (std::strcmp(kernel->isa, forced) == 0) return *kernel;
    allowed += (allowed.empty() ? "" : ", ") + std::string(kernel->isa);
  }
  throw std::invalid_argument("PYELS_ISA is '" + std::string(forced) + "'; this CPU runs " + allowed);
}

std::vector<const char*> available_isas() {
  std::vector<const char*> names;
  for (const Kernel* kernel : runnable_kernels()) names.push_back(kernel->isa);
  return names;
}

const char* isa_in_use() { return kernel_in_use().isa; }

}  // namespace pyels
