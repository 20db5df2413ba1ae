// What the kernels need of the device, and no more.
//
// Kernels live in .cuh files without torch. nvcc takes this file's names from CUDA's headers; g++ takes them from the
// tests' host shim (csrc/tests/cuda_shim), which runs the very same kernel source on a machine without a GPU.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "shim.h"
#endif

namespace tokcomp::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of every block
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kSharedLimit = 48 * 1024;  // what a block gets without asking

constexpr float kMinSize = 1e-6f;

#ifdef __CUDACC__
// The block's dynamic shared memory. Every kernel carves its arrays out of it.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}
#endif

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

__device__ __forceinline__ float to_float(float value) { return value; }
__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__device__ __forceinline__ T from_float(float value);
template <>
__device__ __forceinline__ float from_float<float>(float value) {
  return value;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// Also what a NaN becomes.
__device__ __forceinline__ float effective_size(float size) { return size > kMinSize ? size : kMinSize; }

// Elements of T in a 16-byte access.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// Up to kVector elements from `from`, zeros after `count`. Element by element where the rows are not 16-byte aligned:
// the same values in the same places, so alignment never changes a result's bits.
template <typename T>
__device__ __forceinline__ void load_vector(const T* from, int64_t count, bool aligned, float (&values)[kVector<T>]) {
  if (aligned && count >= kVector<T>) {
    const uint4 raw = *reinterpret_cast<const uint4*>(from);
    T elements[kVector<T>];
    memcpy(elements, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) values[i] = to_float(elements[i]);
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) values[i] = i < count ? to_float(from[i]) : 0.f;
  }
}

template <typename T>
__device__ __forceinline__ void store_vector(T* to, int64_t count, bool aligned, const float (&values)[kVector<T>]) {
  if (aligned && count >= kVector<T>) {
    T elements[kVector<T>];
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) elements[i] = from_float<T>(values[i]);
    uint4 raw;
    memcpy(&raw, elements, sizeof(raw));
    *reinterpret_cast<uint4*>(to) = raw;
  } else {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (i < count) to[i] = from_float<T>(values[i]);
    }
  }
}

// Sums over groups of `lanes` neighbouring lanes (a power of two); every lane gets its group's.
__device__ __forceinline__ float group_sum(float value, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, offset));
  }
  return value;
}

}  // namespace tokcomp::cuda
