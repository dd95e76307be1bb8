// Windows that are masks, on the CPU: what cpu_engine and cpu_second hand over.
#pragma once

#include "cpu/engine.h"

namespace pyels {

void masks_engine(const Problem& problem, const CpuOptions& options, Sink& sink);
void masks_second(const Problem& problem, const CpuOptions& options, const Second& second);

}  // namespace pyels
