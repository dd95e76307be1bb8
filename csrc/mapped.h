// Memory that is a mapped file, which somebody may cut off: to read what is then missing would end the process (SIGBUS).
#pragma once

#include <cstdint>

namespace pyels {

// From now on what is missing of address .. address + bytes - 1 reads as zeros; whoever uses it asks afterwards whether
// the file is as it was. False where there is no room for another one.
bool guard_mapped(std::uintptr_t address, std::uintptr_t bytes);

// Before it is mapped no longer, and something else may lie there.
void unguard_mapped(std::uintptr_t address);

}  // namespace pyels
