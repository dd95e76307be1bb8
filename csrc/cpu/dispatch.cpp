// Which instruction sets this CPU runs, and the one to use.
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/engine.h"
#include "cpu/second.h"
#include "cpu/sums.h"
#include "sampled/scan.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace pyels {
namespace {

// What is compiled once per instruction set.
struct Isa {
  const Kernel* kernel;
  const SecondKernel* second;
  const Scan* scan;
  const SumsKernel* sums;
  const char* name() const { return kernel->isa; }
};

std::vector<Isa> runnable_isas() {
  std::vector<Isa> isas;
#if defined(__x86_64__)
  __builtin_cpu_init();
  // clang and older versions of GCC have no names for these.
  unsigned unused, basic = 0, extended = 0;
  __get_cpuid(1, &unused, &unused, &basic, &unused);
  __get_cpuid(0x80000001, &unused, &unused, &extended, &unused);
  const bool movbe = basic >> 22 & 1, f16c = basic >> 29 & 1, lzcnt = extended >> 5 & 1;
  const bool v2 = __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("popcnt");
  const bool v3 = v2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") && f16c && lzcnt && movbe;
  [[maybe_unused]] const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                   __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                                   __builtin_cpu_supports("avx512cd");
#if defined(PYELS_HAS_x86_64_v4)
  if (v4) isas.push_back({&x86_64_v4::kernel, &x86_64_v4::second, &x86_64_v4::scan, &x86_64_v4::sums});
#endif
#if defined(PYELS_HAS_x86_64_v3)
  if (v3) isas.push_back({&x86_64_v3::kernel, &x86_64_v3::second, &x86_64_v3::scan, &x86_64_v3::sums});
#endif
#if defined(PYELS_HAS_x86_64_v2)
  if (v2) isas.push_back({&x86_64_v2::kernel, &x86_64_v2::second, &x86_64_v2::scan, &x86_64_v2::sums});
#endif
#else
  isas.push_back({&generic::kernel, &generic::second, &generic::scan, &generic::sums});
#endif
  return isas;
}

Isa chosen_isa() {
  const std::vector<Isa> isas = runnable_isas();
  if (isas.empty()) throw std::runtime_error("this CPU lacks x86-64-v2 (SSE4.2), the least the cpu engine needs");
  const char* forced = std::getenv("PYELS_ISA");
  if (!forced || !*forced) return isas.front();
  std::string allowed;
  for (const Isa& isa : isas) {
    if (std::strcmp(isa.name(), forced) == 0) return isa;
    allowed += (allowed.empty() ? "" : ", ") + std::string(isa.name());
  }
  throw std::invalid_argument("PYELS_ISA is '" + std::string(forced) + "'; this CPU runs " + allowed);
}

}  // namespace

const Kernel& kernel_in_use() { return *chosen_isa().kernel; }
const SecondKernel& second_in_use() { return *chosen_isa().second; }
const Scan& scan_in_use() { return *chosen_isa().scan; }
const SumsKernel& sums_in_use() { return *chosen_isa().sums; }

std::vector<const char*> available_isas() {
  std::vector<const char*> names;
  for (const Isa& isa : runnable_isas()) names.push_back(isa.name());
  return names;
}

const char* isa_in_use() { return chosen_isa().name(); }

}  // namespace pyels
