// Runs CUDA kernels on the host, from their own source, one block at a time and a thread of the block as a fiber.
//
// A fiber runs until it meets a barrier or a warp operation, so execution is deterministic; running the fibers in
// ascending, then in descending order, and comparing, exposes a missing barrier. What is checked beyond that: every
// thread of a block (of a warp) arrives at the same barrier (the same warp operation), shared memory starts as NaN and
// is exactly as large as was asked for, and AddressSanitizer watches every access.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::min;

struct uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __half {
  _Float16 value;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __half2float(__half h) { return static_cast<float>(h.value); }
inline __half __float2half_rn(float f) { return {static_cast<_Float16>(f)}; }
inline float __bfloat162float(__nv_bfloat16 b) { return std::bit_cast<float>(static_cast<uint32_t>(b.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  if (f != f) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};  // to nearest, ties to even
}
inline uint32_t __float_as_uint(float f) { return std::bit_cast<uint32_t>(f); }
inline int64_t __double_as_longlong(double d) { return std::bit_cast<int64_t>(d); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace shim {

void* shared_memory();
void sync_threads();

enum class WarpOp : int { kNone, kShuffleXor, kBallot, kSync };
// Every lane gives a value and gets all 32; lanes that are not there count as 0.
const uint64_t* exchange(WarpOp op, unsigned lanes, uint64_t value);

using Body = void (*)(const void* kernel, const void* params);
void run(int64_t blocks, int threads, int64_t shared_bytes, Body body, const void* kernel, const void* params);

template <typename Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, int64_t shared_bytes, const Params& params) {
  const Body body = [](const void* kernel, const void* params) {
    (*static_cast<void (*const*)(Params)>(kernel))(*static_cast<const Params*>(params));
  };
  run(blocks, threads, shared_bytes, body, &kernel, &params);
}

}  // namespace shim

inline void __syncthreads() { shim::sync_threads(); }
inline void __syncwarp(unsigned lanes = 0xffffffffu) { shim::exchange(shim::WarpOp::kSync, lanes, 0); }

template <typename T>
T __shfl_xor_sync(unsigned lanes, T value, int offset) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  const uint64_t* all = shim::exchange(shim::WarpOp::kShuffleXor, lanes, bits);
  memcpy(&value, &all[threadIdx.x % 32 ^ static_cast<unsigned>(offset)], sizeof(T));
  return value;
}

inline unsigned __ballot_sync(unsigned lanes, bool vote) {
  const uint64_t* all = shim::exchange(shim::WarpOp::kBallot, lanes, vote);
  unsigned bits = 0;
  for (unsigned lane = 0; lane < 32; ++lane) bits |= static_cast<unsigned>(all[lane]) << lane;
  return bits;
}

namespace tokcomp::cuda {

template <typename T>
T* shared_memory() {
  return static_cast<T*>(shim::shared_memory());
}

}  // namespace tokcomp::cuda
