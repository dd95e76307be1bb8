// How many float32 multiply-adds a core can do: twelve vectors that stay in registers, enough to hide the latency of
// two pipes. Compiled once per instruction set, like csrc/cpu/maps.cpp; x86-64-v2 multiplies and adds apart.
#include "fma_ceiling.h"

namespace pyels_benchmarks::PYELS_ISA_NAME {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kVectors = 12;

typedef float Vec __attribute__((vector_size(kLanes * 4)));

float run(std::int64_t rounds, float factor, float term) {
  Vec sums[kVectors];
  for (int i = 0; i < kVectors; ++i) sums[i] = Vec{} + static_cast<float>(i);
  for (std::int64_t round = 0; round < rounds; ++round)
    for (int i = 0; i < kVectors; ++i) sums[i] = sums[i] * factor + term;
  Vec total{};
  for (int i = 0; i < kVectors; ++i) total += sums[i];
  float result = 0;
  for (int i = 0; i < kLanes; ++i) result += total[i];
  return result;
}

}  // namespace

extern const FmaLoop fma_loop{PYELS_ISA_TEXT, kVectors* kLanes, run};

}  // namespace pyels_benchmarks::PYELS_ISA_NAME
