// As much of CUDA as csrc/cuda/engine.cu needs, on the CPU: compiled against this header, the very source of the GPU engine
// runs in the tests. Blocks are worked off one after the other. The threads of a block take turns, each until it waits
// for the others, in ascending or descending order by turns: who reads what another thread has yet to write gets
// something else than where blocks are right. What a kernel takes of memory is the sanitizers' to watch.
#pragma once

#define PYELS_EMULATED

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace emulated {

// Of the compiler, which sanitizers let pass: at each of the C library's they unpoison stacks, by system calls.
using Place = void* [5];
__attribute__((noinline, noreturn, no_sanitize_address)) inline void go_to(Place& place) {
  __builtin_longjmp(place, 1);
}

struct Thread {
  ucontext_t first;
  Place resume;
  bool started = false, done;
  int waits;  // at how many barriers it has been
  int warp_waits;
  double exchanged;    // with the other threads of its warp
  const float *a, *b;  // of a product of matrices
  std::unique_ptr<char[]> stack;
};

class Block {
 public:
  static constexpr std::size_t stack_bytes = 1 << 18;
  std::vector<double> shared;

  void run(int threads, std::size_t shared_bytes, const std::function<void()>& kernel) {
    shared.assign(shared_bytes / sizeof(double) + 1, std::nan(""));  // nobody may count on zeros
    kernel_ = &kernel, count_ = threads, any_[0] = any_[1] = -1;
    while (static_cast<int>(threads_.size()) < threads) {
      threads_.push_back(std::make_unique<Thread>());
      threads_.back()->stack = std::make_unique<char[]>(stack_bytes);
    }
    for (int i = 0; i < threads; ++i) {
      Thread& t = *threads_[i];
      t.done = false, t.waits = t.warp_waits = 0;
    }
    for (bool upwards = true;; upwards = !upwards) {
      least_waits_ = -1;
      for (int i = 0; i < threads; ++i)
        if (const Thread& t = *threads_[i]; !t.done && (least_waits_ < 0 || t.waits < least_waits_))
          least_waits_ = t.waits;
      if (least_waits_ < 0) return;  // all have ended
      for (int i = 0; i < threads; ++i) turn(upwards ? i : threads - 1 - i);
    }
  }

  // Where a thread waits until all others have come as far, or have ended.
  void wait() {
    ++threads_[current_]->waits;
    leave();
  }

  // The same, and whether it holds for any of those that wait.
  bool any(bool holds) {
    const int at = threads_[current_]->waits;  // nobody is further than the next one
    if (holds) any_[at % 2] = at;
    wait();
    return any_[at % 2] == at;
  }

  double exchange(double value, int with) {
    const int own = current_;
    Thread& t = *threads_[own];
    t.exchanged = value;
    wait_for_warp();
    const double got = threads_[own / 32 * 32 + (own % 32 ^ with)]->exchanged;
    wait_for_warp();
    return got;
  }

  void wait_for_warp() {
    ++threads_[current_]->warp_waits;
    leave();
  }

  // As tensor cores are known to sum, or worse: all addends are cut off at the last of 24 bits of the largest, and
  // so is the sum (Fasi et al., Numerical behavior of NVIDIA tensor cores, 2021: they cut off, some at a later bit).
  void multiply_add(float (&sum)[4], const float (&a)[4], const float (&b)[2]) {
    const int own = current_, lane = own % 32;
    Thread& t = *threads_[own];
    t.a = a, t.b = b;
    wait_for_warp();
    const auto thread = [&](int other) -> const Thread& { return *threads_[own - lane + other]; };
    float result[4];
    for (int i = 0; i < 4; ++i) {
      const int half = i / 2, column = 2 * (lane % 4) + i % 2;
      double addend[9] = {sum[i]}, largest = std::abs(addend[0]);
      for (int k = 0; k < 8; ++k) {
        const double left = thread(lane / 4 * 4 + k % 4).a[k / 4 * 2 + half],
                     right = thread(column * 4 + k % 4).b[k / 4];
        addend[k + 1] = left * right;
        largest = std::max(largest, std::abs(addend[k + 1]));
      }
      const auto last_bit = [](double v) { return v == 0.0 ? 1.0 : std::ldexp(1.0, std::ilogb(v) - 23); };
      const double bit = last_bit(largest);
      double total = 0.0;
      for (const double v : addend) total += std::trunc(v / bit) * bit;
      const double bit_of_total = last_bit(total);
      result[i] = static_cast<float>(std::trunc(total / bit_of_total) * bit_of_total);
    }
    wait_for_warp();
    std::copy(result, result + 4, sum);
  }

 private:
  // Lets thread i go on if it may.
  void turn(int i) {
    Thread& t = *threads_[i];
    if (t.done || t.waits > least_waits_) return;
    if (t.warp_waits > 0)
      for (int j = i / 32 * 32; j < std::min(count_, i / 32 * 32 + 32); ++j)
        if (!threads_[j]->done && threads_[j]->waits == t.waits && threads_[j]->warp_waits < t.warp_waits) return;
    current_ = i, threadIdx = dim3(static_cast<unsigned>(i));
    enter(t);
  }

  __attribute__((noinline, no_sanitize_address)) void enter(Thread& t) {
    if (__builtin_setjmp(scheduler_) != 0) return;
    if (t.started) go_to(t.resume);
    t.started = true;
    getcontext(&t.first);
    t.first.uc_stack.ss_sp = t.stack.get(), t.first.uc_stack.ss_size = stack_bytes, t.first.uc_link = nullptr;
    makecontext(&t.first, &Block::begin, 0);
    setcontext(&t.first);
  }

  void leave() { leave(threads_[current_]->resume); }
  __attribute__((noinline, no_sanitize_address)) void leave(Place& resume) {
    if (__builtin_setjmp(resume) == 0) go_to(scheduler_);
  }

  [[noreturn]] static void begin();

  int current_ = 0, count_ = 0, least_waits_ = 0, any_[2];
  Place scheduler_;
  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Thread>> threads_;
};

inline Block block;
inline void Block::begin() {
  for (;;) {  // a thread of each of the blocks
    (*block.kernel_)();
    block.threads_[block.current_]->done = true;
    block.leave();
  }
}

}  // namespace emulated

inline void __syncthreads() { emulated::block.wait(); }
inline bool __syncthreads_or(bool holds) { return emulated::block.any(holds); }
inline void __syncwarp() { emulated::block.wait_for_warp(); }
inline std::uint32_t __float_as_uint(float x) {
  std::uint32_t bits;
  return std::memcpy(&bits, &x, 4), bits;
}
inline float __uint_as_float(std::uint32_t bits) {
  float x;
  return std::memcpy(&x, &bits, 4), x;
}
inline double __shfl_xor_sync(unsigned, double value, int with) { return emulated::block.exchange(value, with); }

namespace pyels::cuda {
using std::max;
using std::min;
template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulated::block.shared.data());
}
inline float exp2_approx(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }
inline void multiply_add(float (&sum)[4], const float (&a)[4], const float (&b)[2]) {
  emulated::block.multiply_add(sum, a, b);
}
}  // namespace pyels::cuda

// ---- The runtime -------------------------------------------------------------------------------------------------

enum cudaError_t { cudaSuccess, cudaErrorInvalidConfiguration };
enum cudaDeviceAttr { cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  std::size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

namespace emulated {
inline int shared_bytes = 227 * 1024;  // of a Hopper GPU
inline int launches = 0;
inline bool fails = false;  // every launch from now on
}  // namespace emulated

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid launch";
}
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  return *value = emulated::shared_bytes, cudaSuccess;
}
inline cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

// Memory of the device is memory like any other, which sanitizers watch.
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline cudaError_t cudaMalloc(void** to, std::size_t bytes) { return *to = std::malloc(bytes), cudaSuccess; }
inline cudaError_t cudaFree(void* from) { return std::free(from), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, std::size_t bytes, cudaMemcpyKind) {
  if (bytes > 0) std::memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemset(void* to, int value, std::size_t bytes) {
  return std::memset(to, value, bytes), cudaSuccess;
}
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const dim3 grid = config->gridDim;
  if (emulated::fails || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535 ||
      config->blockDim.x == 0 || config->blockDim.x > 1024 ||
      config->dynamicSmemBytes > static_cast<std::size_t>(emulated::shared_bytes))
    return cudaErrorInvalidConfiguration;
  ++emulated::launches;
  gridDim = grid, blockDim = config->blockDim;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = dim3(x, y, z);
        emulated::block.run(static_cast<int>(blockDim.x), config->dynamicSmemBytes, [&] { kernel(arguments...); });
      }
  return cudaSuccess;
}
