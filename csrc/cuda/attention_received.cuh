// The attention that each token receives, averaged over heads and queries. A block goes over 64 queries of one head, 16
// at a time, against tiles of up to 256 keys: products on tensor cores, a softmax by rows, sums by columns. Where one
// tile holds all keys they are loaded once and every product is computed once; otherwise twice, for no row is held.
#pragma once

#include "dots.cuh"
#include "partial_sums.cuh"

namespace tokcomp::cuda {

constexpr int kReceivedRows = 64;                   // queries of a block
constexpr int kRowsPerWarp = kDotSources / kWarps;  // of the 16 at hand

template <typename T>
struct AttentionReceivedParams {
  const T* q;         // [B, H, N, D]
  const T* k;         // [B, H, N, D]
  const float* size;  // [B, N] or null
  float* parts;       // [B, H, row blocks, N]: of the sums of the columns
  int64_t q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n;
  int64_t batch;
  int num_heads, num_tokens, width;
  int slice, slices;  // channels, a multiple of kDepth
  float scale;        // times log2(e): powers are of 2
  bool aligned;

  // Whether rows are loaded again and again because not all keys or channels are there at a time.
  __device__ __forceinline__ bool reloads() const { return num_tokens > kDotTargets || slices > 1; }
};

template <typename T>
struct ReceivedMemory {
  T* queries;      // [16, row_pitch(slice)]
  T* keys;         // [keys of a tile, row_pitch(slice)]
  float* logits;   // [16, kDotPitch]
  float* bias;     // [keys of a tile]: log2 size
  float* inverse;  // [16]: 1 / the sum of a row's powers
};

template <typename T>
__device__ ReceivedMemory<T> received_memory(const AttentionReceivedParams<T>& p) {
  const int tile = tile_of(p.num_tokens), pitch = row_pitch<T>(p.slice);
  T* queries = shared_memory<T>();
  T* keys = queries + kDotSources * pitch;
  float* logits = reinterpret_cast<float*>(keys + tile * pitch);
  float* bias = logits + kDotSources * kDotPitch;
  return {queries, keys, logits, bias, bias + tile};
}

// logits [16, targets] = q k^T of the rows from `row` on with the keys from `key` on, neither scaled nor biased.
template <typename T>
__device__ __forceinline__ void multiply(const AttentionReceivedParams<T>& p, const ReceivedMemory<T>& memory,
                                         int64_t image, int64_t head, int row, int key, bool first) {
  const T* q = p.q + image * p.q_stride_b + head * p.q_stride_h + row * p.q_stride_n;
  const T* k = p.k + image * p.k_stride_b + head * p.k_stride_h + key * p.k_stride_n;
  const int targets = min(kDotTargets, p.num_tokens - key);
  Dots<T> dots;
  for (int slice = 0; slice < p.slices; ++slice) {
    const int channel = slice * p.slice;
    if (p.reloads()) __syncthreads();  // what lay there has been used
    const int inside = p.width - channel;
    load_slice(q + channel, p.q_stride_n, p.num_tokens - row, inside, p.aligned, kDotSources, p.slice, memory.queries);
    if (first || p.reloads()) {
      load_slice(k + channel, p.k_stride_n, targets, inside, p.aligned, targets, p.slice, memory.keys);
      for (int n = threadIdx.x; n < targets; n += kThreads) {
        memory.bias[n] = p.size ? log2f(effective_size(p.size[image * p.num_tokens + key + n])) : 0.f;
      }
    }
    __syncthreads();
    dots.accumulate(memory.queries, memory.keys, p.slice, targets);
  }
  dots.store(memory.logits, kDotPitch, targets);
  __syncthreads();
}

template <typename T>
constexpr int kReceivedBlocks = sizeof(T) == 4 ? 2 : 3;  // that a multiprocessor holds

template <typename T>
__global__ void __launch_bounds__(kThreads, kReceivedBlocks<T>)
    attention_received_kernel(AttentionReceivedParams<T> p) {
  begin_grid();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row_blocks = static_cast<int>(ceil_div(p.num_tokens, kReceivedRows));
  const int64_t image_head = blockIdx.x / row_blocks, image = image_head / p.num_heads, head = image_head % p.num_heads;
  const int first_row = static_cast<int>(blockIdx.x % row_blocks) * kReceivedRows;
  const int last_row = min(p.num_tokens, first_row + kReceivedRows);
  const ReceivedMemory<T> memory = received_memory(p);
  float* part = p.parts + static_cast<int64_t>(blockIdx.x) * p.num_tokens;

  for (int row = first_row; row < last_row; row += kDotSources) {
    float largest[kRowsPerWarp], sum[kRowsPerWarp];
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) largest[i] = -INFINITY, sum[i] = 0.f;
    // Where there are several tiles the first pass learns a row's maximum and sum, which the second one divides by.
    const int last_pass = p.num_tokens > kDotTargets ? 1 : 0;
    for (int pass = 0; pass <= last_pass; ++pass) {
      for (int key = 0; key < p.num_tokens; key += kDotTargets) {
        multiply(p, memory, image, head, row, key, row == first_row);
        const int targets = min(kDotTargets, p.num_tokens - key);
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i) {  // logits become powers
          float* logits = memory.logits + (warp + i * kWarps) * kDotPitch;
          float larger = largest[i], more = 0.f;
          for (int n = lane; n < targets; n += kWarp) {
            logits[n] = fmaf(logits[n], p.scale, memory.bias[n]);
            larger = fmaxf(larger, logits[n]);
          }
          larger = warp_max(larger);
          for (int n = lane; n < targets; n += kWarp) {
            logits[n] = exp2f(logits[n] - finite_max(larger));
            more += logits[n];
          }
          if (pass > 0) continue;
          sum[i] = sum[i] * exp2f(largest[i] - finite_max(larger)) + warp_sum(more);
          largest[i] = larger;
        }
        if (pass < last_pass) continue;
#pragma unroll
        for (int i = 0; i < kRowsPerWarp; ++i) {
          if (lane == 0) memory.inverse[warp + i * kWarps] = 1.f / sum[i];
        }
        __syncthreads();
        const int n = threadIdx.x, rows = min(kDotSources, last_row - row);
        if (n < targets) {
          float column = 0.f;
          for (int i = 0; i < rows; ++i) column = fmaf(memory.logits[i * kDotPitch + n], memory.inverse[i], column);
          part[key + n] = (row == first_row ? 0.f : part[key + n]) + column;
        }
      }
    }
  }
}

// Blocks of an image's head, each of which writes one row of `parts`.
inline int64_t received_row_blocks(int64_t num_tokens) { return ceil_div(num_tokens, kReceivedRows); }

template <typename T, typename Launch>
void launch_attention_received(AttentionReceivedParams<T> p, float* received, const Launch& launch) {
  p.slice = slice_of<T>(p.width);
  p.slices = p.width > p.slice ? static_cast<int>(ceil_div(p.width, p.slice)) : 1;
  const int64_t tile = tile_of(p.num_tokens);
  const int64_t row_bytes = (kDotSources + tile) * row_pitch<T>(p.slice) * sizeof(T);
  const int64_t float_bytes = (kDotSources * kDotPitch + tile + kDotSources) * sizeof(float);
  const int64_t count = p.num_heads * received_row_blocks(p.num_tokens);
  launch(attention_received_kernel<T>, p.batch * count, row_bytes + float_bytes, p);
  launch_partial_sums({p.parts, received, p.batch, count, p.num_tokens,
                       static_cast<float>(p.num_heads) * static_cast<float>(p.num_tokens)},
                      launch);
}

}  // namespace tokcomp::cuda
