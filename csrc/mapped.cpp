// The one handler of signals, and the one state of the process: see mapped.h.
#include "mapped.h"

#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <mutex>

namespace pyels {
namespace {

struct Guarded {
  std::atomic<std::uintptr_t> address{0}, end{0};  // 0: free
};

constexpr int most = 1024;
Guarded guarded[most];
struct sigaction before;
const auto page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
std::mutex changing;

// Calls nothing that a handler of signals may not call.
void on_bus_error(int, siginfo_t* info, void*) {
  const auto at = reinterpret_cast<std::uintptr_t>(info->si_addr), from = at / page * page;
  for (const Guarded& one : guarded) {
    const std::uintptr_t address = one.address, end = one.end;
    if (at < address / page * page || at >= end) continue;
    const int error = errno;
    void* zeros = mmap(reinterpret_cast<void*>(from), end - from, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0);
    errno = error;
    if (zeros != MAP_FAILED) return;
  }
  sigaction(SIGBUS, &before, nullptr);  // it happens once more, and is the business of whoever was there before
}

}  // namespace

bool guard_mapped(std::uintptr_t address, std::uintptr_t bytes) {
  const std::lock_guard<std::mutex> lock(changing);
  static const bool installed = [] {
    struct sigaction action {};
    action.sa_sigaction = on_bus_error;
    action.sa_flags = SA_SIGINFO;
    return sigaction(SIGBUS, &action, &before) == 0;
  }();
  if (!installed) return false;
  for (Guarded& one : guarded)
    if (one.address == 0) {
      one.end = address + bytes;
      one.address = address;
      return true;
    }
  return false;
}

void unguard_mapped(std::uintptr_t address) {
  const std::lock_guard<std::mutex> lock(changing);
  for (Guarded& one : guarded)
    if (one.address == address) {
      one.address = 0, one.end = 0;
      return;
    }
}

}  // namespace pyels
