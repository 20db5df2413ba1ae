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

#include "../common/min_size.h"

namespace tokcomp::cuda {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block, unless its kernel says otherwise
constexpr int kWarps = kThreads / kWarp;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int64_t kSharedLimit = 48 * 1024;  // what a block gets without asking

// What a launch may ask for.
struct DeviceLimits {
  int64_t shared_bytes;  // of a block
  bool clusters;
};

#ifdef __CUDACC__
// The block's dynamic shared memory. Every kernel carves its arrays out of it.
template <typename T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}
#endif

#ifdef __CUDACC__
// Every kernel's first step. With programmatic dependent launch a grid begins while the one before it ends: that one's
// memory is ready from here on, and the grid after this one may begin in turn, to wait here for the end of this one.
__device__ __forceinline__ void begin_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" : : : "memory");
  asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
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

// What one instruction adds.
template <typename T>
struct PairType {
  using type = float;
};
template <>
struct PairType<__half> {
  using type = __half2;
};
template <>
struct PairType<__nv_bfloat16> {
  using type = __nv_bfloat162;
};
__device__ __forceinline__ float add_pair(float a, float b) { return a + b; }
__device__ __forceinline__ __half2 add_pair(__half2 a, __half2 b) { return __hadd2(a, b); }
__device__ __forceinline__ __nv_bfloat162 add_pair(__nv_bfloat162 a, __nv_bfloat162 b) { return __hadd2(a, b); }

// Two numbers in one word, the first one below.
__device__ __forceinline__ uint32_t pack_pair(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}
__device__ __forceinline__ uint32_t pack_pair(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof(word));
  return word;
}

constexpr float kLog2E = 1.44269504f;

// What to subtract from a row: 0 where all of it is -inf.
__device__ __forceinline__ float finite_max(float largest) { return largest == -INFINITY ? 0.f : largest; }

#ifdef __CUDACC__
// 2 to the power of `exponent`, to 2 units in the last place; what float32 holds with fewer digits is 0.
__device__ __forceinline__ float power_of_2(float exponent) {
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(exponent));
  return power;
}
#endif

// Also what a NaN becomes.
__device__ __forceinline__ float effective_size(float size) { return size > float(kMinSize) ? size : float(kMinSize); }

// Elements of T in a 16-byte access.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

// 16 bytes of elements as they are, and as numbers.
template <typename T>
__device__ __forceinline__ void unpack(const uint4& raw, float (&values)[kVector<T>]) {
  T elements[kVector<T>];
  memcpy(elements, &raw, sizeof(raw));
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) values[i] = to_float(elements[i]);
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float (&values)[kVector<T>]) {
  T elements[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) elements[i] = from_float<T>(values[i]);
  uint4 raw;
  memcpy(&raw, elements, sizeof(raw));
  return raw;
}

#ifdef __CUDACC__
// 16 bytes of shared memory in one instruction. Through a plain pointer the compiler splits them into as many as it
// thinks it needs.
__device__ __forceinline__ uint4 load_shared(const void* from) {
  uint4 raw;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w)
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(from)))
               : "memory");
  return raw;
}

__device__ __forceinline__ void store_shared(void* to, const uint4& raw) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};"
               :
               : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))), "r"(raw.x), "r"(raw.y), "r"(raw.z),
                 "r"(raw.w)
               : "memory");
}
#endif

// Up to kVector elements from `from`, zeros after `count`. Element by element where the rows are not 16-byte aligned:
// the same values in the same places, so alignment never changes a result's bits.
template <typename T>
__device__ __forceinline__ uint4 load_raw(const T* from, int64_t count, bool aligned) {
  if (aligned && count >= kVector<T>) return *reinterpret_cast<const uint4*>(from);
  T elements[kVector<T>];
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) elements[i] = i < count ? from[i] : from_float<T>(0.f);
  uint4 raw;
  memcpy(&raw, elements, sizeof(raw));
  return raw;
}

template <typename T>
__device__ __forceinline__ void store_raw(T* to, int64_t count, bool aligned, const uint4& raw) {
  if (aligned && count >= kVector<T>) {
    *reinterpret_cast<uint4*>(to) = raw;
  } else {
    T elements[kVector<T>];
    memcpy(elements, &raw, sizeof(raw));
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      if (i < count) to[i] = elements[i];
    }
  }
}

template <typename T>
__device__ __forceinline__ void load_vector(const T* from, int64_t count, bool aligned, float (&values)[kVector<T>]) {
  unpack<T>(load_raw(from, count, aligned), values);
}

template <typename T>
__device__ __forceinline__ void store_vector(T* to, int64_t count, bool aligned, const float (&values)[kVector<T>]) {
  store_raw(to, count, aligned, pack<T>(values));
}

// Element by element a + b, rounded once.
template <typename T>
__device__ __forceinline__ uint4 add_rounded(const uint4& a, const uint4& b) {
  using Pair = typename PairType<T>::type;
  constexpr int kPairs = sizeof(uint4) / sizeof(Pair);
  Pair left[kPairs], right[kPairs];
  memcpy(left, &a, sizeof(a));
  memcpy(right, &b, sizeof(b));
#pragma unroll
  for (int i = 0; i < kPairs; ++i) left[i] = add_pair(left[i], right[i]);
  uint4 sum;
  memcpy(&sum, left, sizeof(sum));
  return sum;
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
