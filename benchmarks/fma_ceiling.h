// The multiply-add loop of fma_ceiling.cpp, one for each instruction set.
#pragma once

#include <cstdint>

namespace pyels_benchmarks {

struct FmaLoop {
  const char* isa;
  int multiply_adds;  // in one round
  float (*run)(std::int64_t rounds, float factor, float term);
};

#if defined(__x86_64__)
namespace x86_64_v2 {
extern const FmaLoop fma_loop;
}
namespace x86_64_v3 {
extern const FmaLoop fma_loop;
}
namespace x86_64_v4 {
extern const FmaLoop fma_loop;
}
inline const FmaLoop* const fma_loops[] = {&x86_64_v2::fma_loop, &x86_64_v3::fma_loop, &x86_64_v4::fma_loop};
#else
namespace generic {
extern const FmaLoop fma_loop;
}
inline const FmaLoop* const fma_loops[] = {&generic::fma_loop};
#endif

}  // namespace pyels_benchmarks
