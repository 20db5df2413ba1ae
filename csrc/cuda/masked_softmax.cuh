// Softmax under a token mask, and its gradient: one warp per row. A row of up to 256 keys stays in registers between
// the passes over it; a longer one is read again, 256 keys at a time.
#pragma once

#include "partial_sums.cuh"

namespace tokcomp::cuda {

constexpr int kPerLane = 8;
constexpr int kColumns = kPerLane * kWarp;
constexpr int kRowsPerBlock = 4 * kWarps;  // of the backward, whose blocks each leave a partial sum for the mask

template <typename T>
struct MaskedSoftmaxParams {
  const T* scores;    // [B, H, N, N]
  const float* mask;  // [B, N]
  T* out;             // [B, H, N, N]
  int64_t stride_b, stride_h, stride_n;
  int64_t batch;
  int num_heads, num_tokens;
  float eps;
};

template <typename T>
struct MaskedSoftmaxBackwardParams {
  MaskedSoftmaxParams<T> forward;  // out: gradient of the scores
  const T* grad;                   // [B, H, N, N]
  float* partial;                  // [B, H, row blocks, N]
  float* grad_mask;                // [B, N]
  float* scratch;  // [B * H * row blocks, kWarps, N] where shared memory does not hold [kWarps, N], else null
  int64_t grad_stride_b, grad_stride_h, grad_stride_n;
};

// One row of scores, in registers as a lane's columns first + lane + 32 i.
template <typename T>
struct MaskedRow {
  const T* scores;
  const float* mask;
  int own;  // the row's own column, where the mask is 1
  int num_tokens;
  float largest;        // of all keys
  float inverse_total;  // of the masked weights' sum plus eps

  __device__ __forceinline__ int column(int first, int i) const { return first + threadIdx.x % kWarp + i * kWarp; }

  template <typename Value>
  __device__ __forceinline__ void load(const Value* row, int first, float outside, float (&values)[kPerLane]) const {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int n = column(first, i);
      values[i] = n < num_tokens ? to_float(row[n]) : outside;
    }
  }

  __device__ __forceinline__ void load_mask(int first, float (&values)[kPerLane]) const {
    load(mask, first, 0.f, values);
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      if (column(first, i) == own) values[i] = 1.f;
    }
  }

  // Unmasked weights exp(score - largest); 0 past the row's end.
  __device__ __forceinline__ void load_weights(int first, float (&values)[kPerLane]) const {
    load(scores, first, -INFINITY, values);
    weigh(values);
  }

  __device__ __forceinline__ void weigh(float (&values)[kPerLane]) const {
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) values[i] = expf(values[i] - largest);
  }

  // Leaves the weights and the mask of the first 256 keys in the arguments.
  __device__ __forceinline__ void reduce(float eps, float (&weights)[kPerLane], float (&masks)[kPerLane]) {
    largest = -INFINITY;
    load(scores, 0, -INFINITY, weights);
    for (int first = 0;;) {
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) largest = fmaxf(largest, weights[i]);
      first += kColumns;
      if (first >= num_tokens) break;
      load(scores, first, -INFINITY, weights);
    }
    largest = warp_max(largest);
    if (largest == -INFINITY) largest = 0.f;
    float total = 0.f;
    for (int first = last_tile(); first >= 0; first -= kColumns) {
      if (first != last_tile()) load(scores, first, -INFINITY, weights);
      weigh(weights);
      load_mask(first, masks);
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) total += weights[i] * masks[i];
    }
    inverse_total = 1.f / (warp_sum(total) + eps);
  }

  __device__ __forceinline__ int last_tile() const { return (num_tokens - 1) / kColumns * kColumns; }
};

template <typename T>
__device__ __forceinline__ MaskedRow<T> masked_row(const MaskedSoftmaxParams<T>& p, int64_t image_head, int row) {
  const int64_t image = image_head / p.num_heads, head = image_head % p.num_heads;
  const T* scores = p.scores + image * p.stride_b + head * p.stride_h + row * p.stride_n;
  return {scores, p.mask + image * p.num_tokens, row, p.num_tokens, 0.f, 0.f};
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 4) masked_softmax_kernel(MaskedSoftmaxParams<T> p) {
  begin_grid();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;  // image, head, row
  if (index >= p.batch * p.num_heads * p.num_tokens) return;
  MaskedRow<T> row = masked_row(p, index / p.num_tokens, static_cast<int>(index % p.num_tokens));
  float weights[kPerLane], masks[kPerLane];
  row.reduce(p.eps, weights, masks);
  const float floor = p.eps / p.num_tokens;
  T* out = p.out + index * p.num_tokens;
  for (int first = 0; first < p.num_tokens; first += kColumns) {
    if (first > 0) {
      row.load_weights(first, weights);
      row.load_mask(first, masks);
    }
#pragma unroll
    for (int i = 0; i < kPerLane; ++i) {
      const int n = row.column(first, i);
      if (n < p.num_tokens) out[n] = from_float<T>((weights[i] * masks[i] + floor) * row.inverse_total);
    }
  }
}

// With a = e * M and Z = sum a + eps: dA = (G - sum_k G_k P_k) / Z, the score's gradient is dA * a, the mask's e * dA.
template <typename T>
__global__ void __launch_bounds__(kThreads, 2) masked_softmax_backward_kernel(MaskedSoftmaxBackwardParams<T> p) {
  begin_grid();
  const MaskedSoftmaxParams<T>& f = p.forward;
  const int warp = threadIdx.x / kWarp;
  const int row_blocks = static_cast<int>(ceil_div(f.num_tokens, kRowsPerBlock));
  const int64_t image_head = blockIdx.x / row_blocks;
  const int first_row = static_cast<int>(blockIdx.x % row_blocks) * kRowsPerBlock;
  const int last_row = min(f.num_tokens, first_row + kRowsPerBlock);
  float* mask_sums = p.scratch ? p.scratch + static_cast<int64_t>(blockIdx.x) * kWarps * f.num_tokens
                               : shared_memory<float>();                // [kWarps, N]
  float* sums = mask_sums + static_cast<int64_t>(warp) * f.num_tokens;  // a lane's own columns, in the order of rows
  for (int n = threadIdx.x % kWarp; n < f.num_tokens; n += kWarp) sums[n] = 0.f;

  const float floor = f.eps / f.num_tokens;
  for (int r = first_row + warp; r < last_row; r += kWarps) {
    MaskedRow<T> row = masked_row(f, image_head, r);
    const int64_t image = image_head / f.num_heads, head = image_head % f.num_heads;
    const T* grad_row = p.grad + image * p.grad_stride_b + head * p.grad_stride_h + r * p.grad_stride_n;
    T* out = f.out + (image_head * f.num_tokens + r) * f.num_tokens;
    float weights[kPerLane], masks[kPerLane], grads[kPerLane];
    row.reduce(f.eps, weights, masks);
    float inner = 0.f;  // sum_k G_k P_k
    for (int first = row.last_tile(); first >= 0; first -= kColumns) {
      row.load(grad_row, first, 0.f, grads);
      if (f.num_tokens > kColumns) {
        row.load_weights(first, weights);
        row.load_mask(first, masks);
      }
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) inner += grads[i] * ((weights[i] * masks[i] + floor) * row.inverse_total);
    }
    inner = warp_sum(inner);
    for (int first = 0; first < f.num_tokens; first += kColumns) {
      if (first > 0) {
        row.load(grad_row, first, 0.f, grads);
        row.load_weights(first, weights);
        row.load_mask(first, masks);
      }
#pragma unroll
      for (int i = 0; i < kPerLane; ++i) {
        const int n = row.column(first, i);
        if (n < f.num_tokens) {
          const float grad_masked = (grads[i] - inner) * row.inverse_total;
          out[n] = from_float<T>(grad_masked * (weights[i] * masks[i]));
          if (n != r) sums[n] += weights[i] * grad_masked;
        }
      }
    }
  }
  __syncthreads();
  for (int n = threadIdx.x; n < f.num_tokens; n += kThreads) {
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += mask_sums[static_cast<int64_t>(w) * f.num_tokens + n];
    p.partial[static_cast<int64_t>(blockIdx.x) * f.num_tokens + n] = sum;
  }
}

template <typename T, typename Launch>
void launch_masked_softmax(const MaskedSoftmaxParams<T>& p, const Launch& launch) {
  launch(masked_softmax_kernel<T>, ceil_div(p.batch * p.num_heads * p.num_tokens, kWarps), 0, p);
}

// Blocks of the backward per image and head, each of which writes one row of `partial`.
inline int64_t masked_softmax_row_blocks(int64_t num_tokens) { return ceil_div(num_tokens, kRowsPerBlock); }

inline int64_t masked_softmax_backward_shared(int64_t num_tokens) { return kWarps * num_tokens * sizeof(float); }

inline bool masked_softmax_backward_needs_scratch(int64_t num_tokens) {
  return masked_softmax_backward_shared(num_tokens) > kSharedLimit;
}

template <typename T, typename Launch>
void launch_masked_softmax_backward(const MaskedSoftmaxBackwardParams<T>& p, const Launch& launch) {
  const MaskedSoftmaxParams<T>& f = p.forward;
  const int64_t count = f.num_heads * masked_softmax_row_blocks(f.num_tokens);
  launch(masked_softmax_backward_kernel<T>, f.batch * count,
         p.scratch ? 0 : masked_softmax_backward_shared(f.num_tokens), p);
  launch_partial_sums({p.partial, p.grad_mask, f.batch, count, f.num_tokens, 1.f}, launch);
}

}  // namespace tokcomp::cuda
