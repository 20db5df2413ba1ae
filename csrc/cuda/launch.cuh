// Between torch and the kernels: types, strides, what only CUDA refuses, and the launch itself.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cstdlib>
#include <initializer_list>
#include <limits>
#include <utility>
#include <vector>

#ifdef __CUDACC__
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#endif

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "../common/registration.h"
#include "device.cuh"

namespace tokcomp::cuda {

template <typename scalar_t>
struct DeviceType {
  using type = float;
};
template <>
struct DeviceType<at::Half> {
  using type = __half;
};
template <>
struct DeviceType<at::BFloat16> {
  using type = __nv_bfloat16;
};

// TOKCOMP_DEPENDENT_LAUNCH=1: a kernel may begin while the one before it ends (begin_grid). Python has checked the
// value.
inline bool dependent_launch() {
  static const bool asked = [] {
    const char* value = std::getenv("TOKCOMP_DEPENDENT_LAUNCH");
    return value != nullptr && value[0] == '1';
  }();
  return asked;
}

#ifdef __CUDACC__
// Launches on the tensor's device and its current stream.
class Launcher {
 public:
  explicit Launcher(const Tensor& tensor)
      : guard_(tensor.device()), stream_(c10::cuda::getCurrentCUDAStream(tensor.device().index())) {}

  DeviceLimits limits() const {
    return {attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin), attribute(cudaDevAttrClusterLaunch) != 0};
  }

  // `cluster` neighbouring blocks of `threads` each run together.
  template <typename Params>
  void operator()(void (*kernel)(Params), int64_t blocks, int64_t shared_bytes, const Params& params, int cluster = 1,
                  int threads = kThreads) const {
    if (blocks == 0) return;
    if (shared_bytes > kSharedLimit) allow_shared(reinterpret_cast<const void*>(kernel));
    cudaLaunchAttribute attributes[2]{};
    unsigned count = 0;
    if (cluster > 1) {
      attributes[count].id = cudaLaunchAttributeClusterDimension;
      attributes[count++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    }
    if (dependent_launch() && attribute(cudaDevAttrComputeCapabilityMajor) >= 9) {
      attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[count++].val.programmaticStreamSerializationAllowed = 1;
    }
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes;
    config.stream = stream_;
    config.attrs = attributes;
    config.numAttrs = count;
    C10_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, params));
  }

 private:
  // Lets a kernel ask for all the shared memory that there is, once per thread and device. Never for less: another
  // thread may launch it with more at the same time.
  void allow_shared(const void* kernel) const {
    static thread_local std::vector<std::pair<const void*, int>> allowed;
    const std::pair<const void*, int> key{kernel, stream_.device_index()};
    if (std::find(allowed.begin(), allowed.end(), key) != allowed.end()) return;
    C10_CUDA_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                        attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)));
    C10_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared));
    allowed.push_back(key);
  }

  int attribute(cudaDeviceAttr name) const {
    int value = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, stream_.device_index()));
    return value;
  }

  c10::cuda::CUDAGuard guard_;
  c10::cuda::CUDAStream stream_;
};
#endif

// After the operator's own checks: float64 is not for these kernels.
inline void check_dtype(const char* op, const char* argument, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() != at::kDouble, op, ": ", argument,
                   " must be float16, bfloat16 or float32 on cuda, got float64");
}

inline int to_int(const char* op, const char* what, int64_t count) {
  TORCH_CHECK_VALUE(count <= std::numeric_limits<int>::max(), op, ": ", what, " must fit 32 bits on cuda, got ", count);
  return static_cast<int>(count);
}

// The tensor with neighbouring elements in its last dimension; a view of a packed tensor stays one.
inline Tensor with_rows(const Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// Whether every row of every tensor starts on 16 bytes.
inline bool rows_aligned(std::initializer_list<Tensor> tensors) {
  for (const Tensor& tensor : tensors) {
    if (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16) return false;
    for (int64_t dim = 0; dim + 1 < tensor.dim(); ++dim) {
      if (tensor.size(dim) > 1 && tensor.stride(dim) * tensor.element_size() % 16) return false;
    }
  }
  return true;
}

template <typename T>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
const T* input(const OptionalTensor& tensor) {
  return tensor.has_value() ? input<T>(*tensor) : nullptr;
}

template <typename T>
T* output(const Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

inline Tensor empty_like_with(const Tensor& tensor, at::IntArrayRef sizes, at::ScalarType type) {
  return at::empty(sizes, tensor.options().dtype(type));
}

}  // namespace tokcomp::cuda
