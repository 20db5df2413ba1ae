// The order of tokens: prefix tokens as they stand, then the others by descending value, ties by lower index, NaN last.
// A token's rank is the number of tokens before it, found by counting: no sort, no branches, stable.
#pragma once

#include "device.cuh"

namespace tokcomp::cuda {

constexpr int kRankTile = 1024;  // keys held in shared memory at a time

// Integers that compare as the values do: larger comes earlier, -0.0 equals 0.0, NaN is below everything. The largest
// key (of infinity) is far from overflow.
__device__ __forceinline__ uint32_t order_key(float value) {
  if (value != value) return 0;
  const uint32_t bits = value == 0.f ? 0 : __float_as_uint(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ uint64_t order_key(double value) {
  if (value != value) return 0;
  const uint64_t bits = value == 0. ? 0 : static_cast<uint64_t>(__double_as_longlong(value));
  return bits >> 63 ? ~bits : bits | 0x8000000000000000u;
}

// How many of the tokens first..first+count-1, whose keys are keys[0..count-1], come before `token`.
template <typename Key>
__device__ __forceinline__ int count_before(const Key* keys, int first, int count, int token, Key key) {
  int before = 0;
#pragma unroll 8
  for (int j = 0; j < count; ++j) before += keys[j] + (first + j < token ? 1 : 0) > key ? 1 : 0;
  return before;
}

template <typename Value, typename Index>
struct RankParams {
  const Value* values;  // [B, N]
  Index* order;         // [B, N]: the token at each rank
  int64_t batch;
  int num_tokens, num_prefix_tokens;
};

// One thread per token, any number of tokens: every block walks all keys of its image in tiles.
template <typename Value, typename Index>
__global__ void __launch_bounds__(kThreads) rank_kernel(RankParams<Value, Index> p) {
  begin_grid();
  using Key = decltype(order_key(Value()));
  Key* keys = shared_memory<Key>();
  const int blocks_per_image = static_cast<int>(ceil_div(p.num_tokens, kThreads));
  const int64_t image = blockIdx.x / blocks_per_image;
  const int token = static_cast<int>(blockIdx.x % blocks_per_image) * kThreads + threadIdx.x;
  const Value* values = p.values + image * p.num_tokens;
  const bool ranked = token >= p.num_prefix_tokens && token < p.num_tokens;
  const Key key = ranked ? order_key(values[token]) : 0;
  int rank = ranked ? p.num_prefix_tokens : token;
  for (int first = p.num_prefix_tokens; first < p.num_tokens; first += kRankTile) {
    const int count = min(kRankTile, p.num_tokens - first);
    for (int j = threadIdx.x; j < count; j += kThreads) keys[j] = order_key(values[first + j]);
    __syncthreads();
    if (ranked) rank += count_before(keys, first, count, token, key);
    __syncthreads();
  }
  if (token < p.num_tokens) p.order[image * p.num_tokens + rank] = token;
}

template <typename Value, typename Index, typename Launch>
void launch_rank(const RankParams<Value, Index>& p, const Launch& launch) {
  launch(rank_kernel<Value, Index>, p.batch * ceil_div(p.num_tokens, kThreads), kRankTile * sizeof(Value), p);
}

}  // namespace tokcomp::cuda
