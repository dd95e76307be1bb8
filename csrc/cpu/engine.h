// The exact float32 engine on the CPU.
#pragma once

#include <vector>

#include "pyels.h"
#include "sources.h"

namespace pyels {

struct CpuOptions {
  int threads = 1;
  unsigned regions = all_regions;  // bits of those (sources.h) whose pixels are asked for; for the sampled engine
};

// Bit-identical for any number of threads and any batch.
void cpu_engine(const Problem& problem, const CpuOptions& options, Sink& sink);
void cpu_second(const Problem& problem, const CpuOptions& options, const Second& second);

// The instruction sets this CPU can run, best first, and the one in use: environment variable PYELS_ISA, else the best.
std::vector<const char*> available_isas();
const char* isa_in_use();

}  // namespace pyels
