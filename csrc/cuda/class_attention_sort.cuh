// Class-token attention averaged over heads, and the order of the tokens: one block per image.
#pragma once

#include "rank.cuh"

namespace tokcomp::cuda {

template <typename T>
struct ClassAttentionParams {
  const T* q;         // [B, H, D]
  const T* k;         // [B, H, N, D]
  const float* size;  // [B, N] or null
  float* cls_attn;    // [B, N]
  int64_t* order;     // [B, N]
  float* scratch;     // [B, H, N] where a row of N does not go into shared memory, else null
  int64_t q_stride_b, q_stride_h, k_stride_b, k_stride_h, k_stride_n;
  int64_t batch;
  int num_heads, num_tokens, width, num_prefix_tokens;
  int heads_at_once;  // whose rows are held together
  int lanes_per_row;  // that share the dot product of one key
  float scale;
  bool aligned;
};

// rows[h - first_head][n] = q_h . k_hn * scale, for the heads first_head..last_head-1. Several keys per warp, each read
// by lanes_per_row lanes 16 bytes at a time, and four loads in flight.
template <typename T>
__device__ void class_logits(const ClassAttentionParams<T>& p, int64_t image, int first_head, int last_head,
                             float* rows) {
  constexpr int kUnroll = 4;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int part = lane % p.lanes_per_row * kVector<T>;
  const int rows_per_warp = kWarp / p.lanes_per_row, step = kWarps * rows_per_warp;
  const int chunk = p.lanes_per_row * kVector<T>;
  for (int head = first_head; head < last_head; ++head) {
    const T* q = p.q + image * p.q_stride_b + head * p.q_stride_h;
    const T* k = p.k + image * p.k_stride_b + head * p.k_stride_h;
    float* row = rows + static_cast<int64_t>(head - first_head) * p.num_tokens;
    for (int base = warp * rows_per_warp; base < p.num_tokens; base += kUnroll * step) {
      float dot[kUnroll] = {};
      for (int start = 0; start < p.width; start += chunk) {
        float query[kVector<T>], keys[kUnroll][kVector<T>];
        const int at = start + part;
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
          const int token = base + u * step + lane / p.lanes_per_row;
          load_vector(k + token * p.k_stride_n + at, token < p.num_tokens ? p.width - at : 0, p.aligned, keys[u]);
        }
        load_vector(q + at, p.width - at, p.aligned, query);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
          for (int i = 0; i < kVector<T>; ++i) dot[u] += query[i] * keys[u][i];
        }
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int token = base + u * step + lane / p.lanes_per_row;
        const float sum = group_sum(dot[u], p.lanes_per_row);
        if (part == 0 && token < p.num_tokens) row[token] = sum * p.scale;
      }
    }
  }
}

// One warp: row = softmax(row + log size). A lane reads and writes its own columns only.
__device__ inline void softmax_row(float* row, const float* size, int num_tokens) {
  const int lane = threadIdx.x % kWarp;
  float largest = -INFINITY, sum = 0.f;
  for (int n = lane; n < num_tokens; n += kWarp) {
    const float logit = size ? row[n] + logf(effective_size(size[n])) : row[n];
    row[n] = logit;
    largest = fmaxf(largest, logit);
  }
  largest = warp_max(largest);
  for (int n = lane; n < num_tokens; n += kWarp) {
    const float weight = expf(row[n] - largest);
    row[n] = weight;
    sum += weight;
  }
  sum = warp_sum(sum);
  for (int n = lane; n < num_tokens; n += kWarp) row[n] /= sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 3) class_attention_sort_kernel(ClassAttentionParams<T> p) {
  begin_grid();
  const int64_t image = blockIdx.x;
  const int warp = threadIdx.x / kWarp;
  const bool in_shared = p.scratch == nullptr;
  // Shared: keys [N], rows [heads_at_once, N].
  uint32_t* keys = shared_memory<uint32_t>();
  float* rows = in_shared ? shared_memory<float>() + p.num_tokens : p.scratch + image * p.num_heads * p.num_tokens;
  const float* size = p.size ? p.size + image * p.num_tokens : nullptr;
  float* cls_attn = p.cls_attn + image * p.num_tokens;

  int first = 0;
  do {  // once even without heads, whose mean is NaN
    const int last = min(p.num_heads, first + p.heads_at_once);
    class_logits(p, image, first, last, rows);
    __syncthreads();
    for (int head = first + warp; head < last; head += kWarps) {
      softmax_row(rows + static_cast<int64_t>(head - first) * p.num_tokens, size, p.num_tokens);
    }
    __syncthreads();
    // Heads are added in order however many are held at once; a thread meets its own tokens again.
    for (int n = threadIdx.x; n < p.num_tokens; n += kThreads) {
      float sum = first ? cls_attn[n] : 0.f;
      for (int head = first; head < last; ++head) sum += rows[static_cast<int64_t>(head - first) * p.num_tokens + n];
      if (last == p.num_heads) sum /= p.num_heads;
      cls_attn[n] = sum;
      if (in_shared) keys[n] = order_key(sum);
    }
    __syncthreads();
    first = last;
  } while (first < p.num_heads);
  if (!in_shared) return;  // rank_kernel follows

  const int prefix = p.num_prefix_tokens;
  for (int n = threadIdx.x; n < p.num_tokens; n += kThreads) {
    const int rank = n < prefix ? n : prefix + count_before(keys + prefix, prefix, p.num_tokens - prefix, n, keys[n]);
    p.order[image * p.num_tokens + rank] = n;
  }
}

// Whether the launch needs `scratch`, [B, H, N] floats.
inline bool class_attention_needs_scratch(int64_t num_tokens) { return num_tokens > kRankTile; }

template <typename T, typename Launch>
void launch_class_attention_sort(ClassAttentionParams<T> p, const Launch& launch) {
  p.lanes_per_row = 1;
  while (p.lanes_per_row < kWarp && p.lanes_per_row * kVector<T> < p.width) p.lanes_per_row *= 2;
  const int64_t row_bytes = p.num_tokens * sizeof(float);
  const int64_t fitting = kSharedLimit / row_bytes - 1;
  p.heads_at_once = p.scratch || fitting > p.num_heads ? p.num_heads : static_cast<int>(fitting);
  launch(class_attention_sort_kernel<T>, p.batch, p.scratch ? 0 : (p.heads_at_once + 1) * row_bytes, p);
  if (p.scratch) {
    launch_rank(RankParams<float, int64_t>{p.cls_attn, p.order, p.batch, p.num_tokens, p.num_prefix_tokens}, launch);
  }
}

}  // namespace tokcomp::cuda
