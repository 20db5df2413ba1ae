// attention with all keys and values of a head in shared memory, read once. A block is one head of one image; its warps
// take 16 queries at a time, and the next 16 are under way while these are multiplied.
#pragma once

#include "attention.cuh"

namespace tokcomp::cuda {

constexpr int kResidentKeys = 256;  // at most
// Blocks that a multiprocessor has registers for. At 197 tokens it has shared memory for as many.
template <int kWidth>
constexpr int kHeadsAtOnce = kWidth == kWidest ? 3 : 4;

constexpr int whole_steps(int keys) { return (keys + kTile - 1) / kTile * kTile; }

template <typename T, int kWidth>
__global__ void __launch_bounds__(kAttentionThreads, kHeadsAtOnce<kWidth>)
    attention_resident_kernel(AttentionParams<T> p) {
  begin_grid();
  const int keys = whole_steps(p.num_tokens), values = keys * Lane<T, kWidth>::kBytes;
  const Head<T> head(p, blockIdx.x);
  T* const k = shared_memory<T>();                                                // [keys, pitch]
  T* const v = k + keys * Rows<kWidth>::kPitch;                                   // [keys, pitch]
  float* const bias = reinterpret_cast<float*>(v + keys * Rows<kWidth>::kPitch);  // [keys]

  start_rows<kWidth>(p, head.k, p.k_stride_n, p.num_tokens, keys, k);
  start_rows<kWidth>(p, head.v, p.v_stride_n, p.num_tokens, keys, v);
  commit_copies();
  load_bias(p, head.image, 0, keys, bias);
  int row = static_cast<int>(threadIdx.x) / kWarp * kTile;
  Queries<T, kWidth> queries;
  queries.load(p, head.q, row);
  const Lane<T, kWidth> lane(k);
  wait_for_copies<0>();
  __syncthreads();

  for (; row < p.num_tokens; row += kRowsAtOnce) {
    queries.deal();
    Output<T, kWidth> out;
    Softmax<T, kWidth> softmax;
#pragma unroll 1
    for (int key = 0; key < keys; key += kHeldKeys) {
      softmax.add(queries, lane, key * Lane<T, kWidth>::kBytes, values, bias + key, p.scale, (keys - key) / kTile, out,
                  row > 0 ? nullptr : head.cls + key, p.num_tokens - key);
    }
    queries.load(p, head.q, row + kRowsAtOnce);
    softmax.finish(p, head, row, out);
  }
}

template <int kWidth, typename T, typename Launch>
void launch_resident(const AttentionParams<T>& p, const Launch& launch) {
  const int64_t keys = whole_steps(p.num_tokens);
  const int64_t bytes = keys * (2 * Rows<kWidth>::kPitch * sizeof(T) + sizeof(float));
  launch(attention_resident_kernel<T, kWidth>, p.batch * p.num_heads, bytes, p, 1, kAttentionThreads);
}

}  // namespace tokcomp::cuda
