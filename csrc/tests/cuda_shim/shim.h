// Runs CUDA kernels on the host, from their own source, one cluster of blocks at a time and a thread as a fiber.
//
// A fiber runs until it meets a barrier or a warp operation, so execution is deterministic; running the fibers in
// ascending, then in descending order, and comparing, exposes a missing barrier. What is checked beyond that: every
// thread of a cluster (of a block, of a warp) arrives at the same barrier (the same warp operation); the halves of a
// cluster's barrier come in pairs; another block's shared memory is used only between a barrier that shows that it runs
// and one before which it does not end; shared memory starts as NaN, is exactly as large as was asked for and is gone
// when its block is done. AddressSanitizer watches every access, or else races.cpp does.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)

using std::min;

struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
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
struct __half2 {
  __half x, y;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
// The sum of two such numbers in float32, rounded again, is their sum rounded once.
inline __half __hadd(__half a, __half b) { return __float2half_rn(__half2float(a) + __half2float(b)); }
inline __nv_bfloat16 __hadd(__nv_bfloat16 a, __nv_bfloat16 b) {
  return __float2bfloat16_rn(__bfloat162float(a) + __bfloat162float(b));
}
inline __half2 __hadd2(__half2 a, __half2 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }
inline __nv_bfloat162 __hadd2(__nv_bfloat162 a, __nv_bfloat162 b) { return {__hadd(a.x, b.x), __hadd(a.y, b.y)}; }

inline __half2 __floats2half2_rn(float a, float b) { return {__float2half_rn(a), __float2half_rn(b)}; }
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b) {
  return {__float2bfloat16_rn(a), __float2bfloat16_rn(b)};
}

inline uint32_t __float_as_uint(float f) { return std::bit_cast<uint32_t>(f); }
inline int64_t __double_as_longlong(double d) { return std::bit_cast<int64_t>(d); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline int __popc(unsigned bits) { return std::popcount(bits); }

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

namespace shim {

void* shared_memory();
// Where an address of this block's shared memory is in that of the cluster's block `rank`.
void* in_block(void* local, int rank);
void sync_threads();
// `releases`: whether what came before is seen by every thread that has waited.
void arrive(bool releases);
void wait();

// Sites of barriers are numbered in the copy of the kernels that the race detector runs; those of these bits are left
// out.
inline uint64_t without = 0;
inline bool with_barrier(int site) { return !(without >> site & 1); }

enum class WarpOp : int { kNone, kShuffleXor, kShuffle, kBallot, kSync, kLoadMatrices, kLoadTransposed, kMultiplyAdd };
// Every lane gives a value and gets all 32; lanes that are not there count as 0.
const uint64_t* exchange(WarpOp op, unsigned lanes, uint64_t value);
// A lane's numbers of a product's matrices, as it has them: a, then b.
struct Fragments {
  float a[8], b[4];
};
const Fragments* exchange(const Fragments& own);

// Copies past the registers. They come when their group is waited for, the latest that they can, and until then what
// lay there is no longer: NaN.
struct Copy {
  void* to;
  const void* from;
  bool exists;
};
void ask_for_copy(const Copy& copy);
void commit_copies();
// The next one that is to arrive for all but the last `pending` groups of this thread to have; false where all have.
bool take_copy(int pending, Copy& copy);

using Body = void (*)(const void* kernel, const void* params);
void run(int64_t blocks, int threads, int64_t shared_bytes, int cluster, Body body, const void* kernel,
         const void* params);

template <typename Params>
void launch(void (*kernel)(Params), int64_t blocks, int threads, int64_t shared_bytes, int cluster,
            const Params& params) {
  const Body body = [](const void* kernel, const void* params) {
    (*static_cast<void (*const*)(Params)>(kernel))(*static_cast<const Params*>(params));
  };
  run(blocks, threads, shared_bytes, cluster, body, &kernel, &params);
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

template <typename T>
T __shfl_sync(unsigned lanes, T value, int from) {
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  memcpy(&value, &shim::exchange(shim::WarpOp::kShuffle, lanes, bits)[from], sizeof(T));
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

template <typename T>
T* in_block(T* local, int rank) {
  return static_cast<T*>(shim::in_block(const_cast<std::remove_const_t<T>*>(local), rank));
}

inline void begin_grid() {}

inline uint4 load_shared(const void* from) { return *static_cast<const uint4*>(from); }
inline void store_shared(void* to, const uint4& raw) { *static_cast<uint4*>(to) = raw; }

inline void cluster_arrive() { shim::arrive(true); }
inline void cluster_arrive_relaxed() { shim::arrive(false); }
inline void cluster_wait() { shim::wait(); }

// The tensor cores' instructions, lane by lane as the PTX manual lays the fragments out.
using SharedAddress = uintptr_t;
inline SharedAddress shared_address(const void* from) { return reinterpret_cast<SharedAddress>(from); }

inline void load_matrices(SharedAddress row, uint32_t (&matrices)[4]) {
  const uint64_t* rows = shim::exchange(shim::WarpOp::kLoadMatrices, 0xffffffffu, row);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned m = 0; m < 4; ++m) {
    memcpy(&matrices[m], reinterpret_cast<const uint16_t*>(rows[m * 8 + lane / 4]) + lane % 4 * 2, sizeof(uint32_t));
  }
}

inline void load_transposed(SharedAddress row, uint32_t (&matrices)[4]) {
  const uint64_t* rows = shim::exchange(shim::WarpOp::kLoadTransposed, 0xffffffffu, row);
  const unsigned lane = threadIdx.x % 32;
  for (unsigned m = 0; m < 4; ++m) {
    const auto at = [&](unsigned i) {
      return reinterpret_cast<const uint16_t*>(rows[m * 8 + lane % 4 * 2 + i])[lane / 4];
    };
    matrices[m] = at(0) | static_cast<uint32_t>(at(1)) << 16;
  }
}

inline void copy_async(void* to, const void* from, bool exists) {
  *static_cast<uint4*>(to) = {~0u, ~0u, ~0u, ~0u};
  shim::ask_for_copy({to, from, exists});
}
inline void commit_copies() { shim::commit_copies(); }
template <int kPending>
void wait_for_copies() {
  for (shim::Copy copy; shim::take_copy(kPending, copy);) {
    *static_cast<uint4*>(copy.to) = copy.exists ? *static_cast<const uint4*>(copy.from) : uint4{0, 0, 0, 0};
  }
}

inline float power_of_2(float exponent) { return exp2f(exponent); }

inline float element(__half, uint32_t pair, unsigned which) {
  return __half2float(std::bit_cast<__half>(static_cast<uint16_t>(pair >> 16 * which)));
}
inline float element(__nv_bfloat16, uint32_t pair, unsigned which) {
  return __bfloat162float({static_cast<uint16_t>(pair >> 16 * which)});
}

template <typename T>
void multiply_add(T type, float* sums, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  // a: rows 0..7, rows 8..15 of k 0..7, then of k 8..15; b: k 0..7, k 8..15. Two numbers of each.
  shim::Fragments own;
  for (unsigned i = 0; i < 8; ++i) own.a[i] = element(type, a[i / 2], i % 2);
  for (unsigned i = 0; i < 4; ++i) own.b[i] = element(type, i < 2 ? b0 : b1, i % 2);
  const shim::Fragments* all = shim::exchange(own);
  const unsigned lane = threadIdx.x % 32, row = lane / 4;
  for (unsigned i = 0; i < 4; ++i) {
    const unsigned column = lane % 4 * 2 + i % 2;
    for (unsigned k = 0; k < 16; ++k) {
      const unsigned from = k % 8 / 2;
      sums[i] += all[row * 4 + from].a[k / 8 * 4 + i / 2 * 2 + k % 2] * all[column * 4 + from].b[k / 8 * 2 + k % 2];
    }
  }
}

}  // namespace tokcomp::cuda
