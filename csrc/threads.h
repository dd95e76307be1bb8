// Memory and threads, as the engines share them.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include "pyels.h"

namespace pyels {

struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class T>
using Aligned = std::unique_ptr<T[], Free>;

template <class T>
Aligned<T> aligned(std::int64_t n) {
  void* p = std::aligned_alloc(64, (static_cast<std::size_t>(n) * sizeof(T) + 63) / 64 * 64);
  if (!p) throw std::bad_alloc();
  std::memset(p, 0, static_cast<std::size_t>(n) * sizeof(T));
  return Aligned<T>(static_cast<T*>(p));
}

// Works off items 0 .. count - 1 in up to `threads` threads, the calling one among them. Each thread calls body(take)
// once, and take(run) calls run(item, stop) for one item after the other until none is left; where stop() is true the
// run may return early. An exception in one thread ends the others and is thrown here; so is Interrupted, when
// `interrupted` says so.
template <class Body>
void in_threads(int threads, std::int64_t count, bool (*interrupted)(), Body body) {
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> stop{false};
  std::exception_ptr failure;
  std::mutex failure_mutex;
  const auto work = [&](auto stop_asked) {
    try {
      body([&](auto run) {
        for (std::int64_t i; !stop_asked() && (i = next++) < count;) run(i, stop_asked);
      });
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failure_mutex);
      failure = std::current_exception();
      stop = true;
    }
  };
  std::vector<std::thread> others;
  try {
    for (std::int64_t i = 1; i < std::clamp<std::int64_t>(threads, 1, std::max<std::int64_t>(count, 1)); ++i)
      others.emplace_back(work, [&] { return stop.load(); });
  } catch (...) {
    // No more threads to be had: the ones that started and this one do the work.
  }
  auto asked = std::chrono::steady_clock::now();
  work([&] {
    const auto now = std::chrono::steady_clock::now();
    if (interrupted && now - asked > std::chrono::milliseconds(100)) {
      asked = now;
      if (interrupted()) throw Interrupted();
    }
    return stop.load();
  });
  for (std::thread& thread : others) thread.join();
  if (failure) std::rethrow_exception(failure);
}

}  // namespace pyels
