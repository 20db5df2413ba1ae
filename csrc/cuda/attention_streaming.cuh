// attention with more keys than a block holds: they pass through shared memory 64 at a time, the next ones under way
// while these are multiplied, with an online softmax. A block is 64 queries of one head.
#pragma once

#include "attention.cuh"

namespace tokcomp::cuda {

constexpr int kStreamsAtOnce = 2;  // blocks of a multiprocessor at least: registers for three where that spills nothing

template <int kWidth, typename T>
struct Stage {
  static constexpr int kRows = kHeldKeys * Rows<kWidth>::kPitch;
  static constexpr int kBytes = 2 * kRows * static_cast<int>(sizeof(T));  // of keys and, behind them, values

  T *k, *v;     // [64, pitch]
  float* bias;  // [64]

  __device__ __forceinline__ explicit Stage(int index) {
    k = shared_memory<T>() + index * 2 * kRows;
    v = k + kRows;
    bias = reinterpret_cast<float*>(shared_memory<T>() + 4 * kRows) + index * kHeldKeys;
  }

  __device__ __forceinline__ void start(const AttentionParams<T>& p, const Head<T>& head, int key) const {
    const int count = p.num_tokens - key;
    start_rows<kWidth>(p, head.k + key * p.k_stride_n, p.k_stride_n, count, kHeldKeys, k);
    start_rows<kWidth>(p, head.v + key * p.v_stride_n, p.v_stride_n, count, kHeldKeys, v);
    load_bias(p, head.image, key, kHeldKeys, bias);
  }
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kAttentionThreads, kStreamsAtOnce) attention_streaming_kernel(AttentionParams<T> p) {
  begin_grid();
  const int blocks = static_cast<int>(ceil_div(p.num_tokens, kRowsAtOnce));
  const Head<T> head(p, blockIdx.x / blocks);
  const int row = static_cast<int>(blockIdx.x % blocks * kRowsAtOnce + threadIdx.x / kWarp * kTile);

  Stage<kWidth, T>(0).start(p, head, 0);
  commit_copies();
  Queries<T, kWidth> queries;
  queries.load(p, head.q, row);
  queries.deal();
  Output<T, kWidth> out;
  Softmax<T, kWidth> softmax;
  const Lane<T, kWidth> lane(Stage<kWidth, T>(0).k);
#pragma unroll 1
  for (int key = 0; key < p.num_tokens; key += kHeldKeys) {
    const int index = key / kHeldKeys % 2;
    if (key + kHeldKeys < p.num_tokens) Stage<kWidth, T>(index ^ 1).start(p, head, key + kHeldKeys);
    commit_copies();
    wait_for_copies<1>();
    __syncthreads();
    softmax.add(queries, lane, index * Stage<kWidth, T>::kBytes, Stage<kWidth, T>::kBytes / 2,
                Stage<kWidth, T>(index).bias, p.scale, kHeldSteps, out, row > 0 ? nullptr : head.cls + key,
                p.num_tokens - key);
    __syncthreads();  // the stage is filled again
  }
  softmax.finish(p, head, row, out);
}

template <int kWidth, typename T, typename Launch>
void launch_streaming(const AttentionParams<T>& p, const Launch& launch) {
  const int64_t bytes = 2 * (Stage<kWidth, T>::kBytes + kHeldKeys * sizeof(float));
  launch(attention_streaming_kernel<T, kWidth>, p.batch * p.num_heads * ceil_div(p.num_tokens, kRowsAtOnce), bytes, p,
         1, kAttentionThreads);
}

}  // namespace tokcomp::cuda
