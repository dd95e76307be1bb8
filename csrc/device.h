// The few things of CUDA C++ that are no functions, so that the same kernels run where there is no GPU: there the tests
// supply a <cuda_runtime.h> of their own, which works off blocks and threads one after the other.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pyels::cuda {

#if defined(__CUDACC__)
template <class T>
__device__ T* dynamic_shared() {
  extern __shared__ double pyels_shared[];
  return reinterpret_cast<T*>(pyels_shared);
}

// 2^x, relative error 2^-22; 0 far below.
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#endif

}  // namespace pyels::cuda
