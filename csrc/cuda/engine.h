// The exact float32 engine on an NVIDIA GPU.
#pragma once

#include "pyels.h"

namespace pyels {

struct CudaOptions {
  bool tensor_cores = false;  // may be used where log-weights then err by less than 2e-3
};

// 0, or the version of CUDA that this was built with, if the driver is of an earlier major one. Needs a driver.
int cuda_driver_lacks();

// Bytes of device memory that cuda_engine works in.
std::int64_t cuda_workspace(const Problem& problem, const CudaOptions& options, int device);

// Of `problem`, the pixels, order and x are addresses on the device, as are those of `out`; the others are on the host.
// Launches on `stream` and returns: nothing is allocated, copied or waited for, so the stream may be being captured.
// Bit-identical for any batch on one kind of GPU.
void cuda_engine(const Problem& problem, const CudaOptions& options, const Out& out, void* workspace, int device,
                 void* stream);

// Likewise the second pass, of squares whose places weigh alike, and of `second` what is folded, variance and
// derivative. All of its arrays are on the device.
std::int64_t cuda_workspace(const Problem& problem, const Second& second, int device);
void cuda_second(const Problem& problem, const Second& second, void* workspace, int device, void* stream);

}  // namespace pyels
