// Gradient of a group mean: one warp per input token, which gets its group's gradient times its share of the group.
#pragma once

#include "device.cuh"

namespace tokcomp::cuda {

template <typename T>
struct MergeBackwardParams {
  const T* grad;          // [B, M, C]
  const int64_t* source;  // [B, N]
  const float* size;      // [B, N] or null
  T* grad_x;              // [B, N, C]
  int64_t grad_stride_b, grad_stride_m;
  int64_t batch, width;
  int num_tokens, num_kept;
  bool aligned;
};

template <typename T>
__global__ void __launch_bounds__(kThreads) merge_backward_kernel(MergeBackwardParams<T> p) {
  begin_grid();
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;  // image and token
  if (row >= p.batch * p.num_tokens) return;
  const int64_t image = row / p.num_tokens;
  const int64_t* source = p.source + image * p.num_tokens;
  const float* size = p.size ? p.size + image * p.num_tokens : nullptr;
  const int64_t slot = p.source[row];
  const bool alive = slot >= 0 && slot < p.num_kept;

  float share = 0.f;
  if (alive) {  // the same for the whole warp
    float total = 0.f;
    for (int n = lane; n < p.num_tokens; n += kWarp) {
      if (source[n] == slot) total += size ? effective_size(size[n]) : 1.f;
    }
    share = (size ? effective_size(p.size[row]) : 1.f) / warp_sum(total);
  }
  const T* grad = p.grad + image * p.grad_stride_b + (alive ? slot : 0) * p.grad_stride_m;
  for (int64_t column = lane * kVector<T>; column < p.width; column += kWarp * kVector<T>) {
    float values[kVector<T>];
    load_vector(grad + column, alive ? p.width - column : 0, p.aligned, values);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) values[i] *= share;
    store_vector(p.grad_x + row * p.width + column, p.width - column, p.aligned, values);
  }
}

template <typename T, typename Launch>
void launch_merge_backward(const MergeBackwardParams<T>& p, const Launch& launch) {
  launch(merge_backward_kernel<T>, ceil_div(p.batch * p.num_tokens, kWarps), 0, p);
}

}  // namespace tokcomp::cuda
