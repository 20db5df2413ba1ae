// Sums that several blocks left in parts, added up in the parts' order.
#pragma once

#include "device.cuh"

namespace tokcomp::cuda {

// sums[b, n] = the sum of `count` parts, in order, over `divisor`.
struct PartialSumsParams {
  const float* parts;  // [B, count, N]
  float* sums;         // [B, N]
  int64_t batch, count;
  int num_tokens;
  float divisor;
};

static __global__ void __launch_bounds__(kThreads) partial_sums_kernel(PartialSumsParams p) {
  begin_grid();
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;  // image and token
  if (index >= p.batch * p.num_tokens) return;
  const float* parts = p.parts + index / p.num_tokens * p.count * p.num_tokens + index % p.num_tokens;
  float sum = 0.f;
#pragma unroll 4
  for (int64_t i = 0; i < p.count; ++i) sum += parts[i * p.num_tokens];
  p.sums[index] = sum / p.divisor;
}

template <typename Launch>
void launch_partial_sums(const PartialSumsParams& p, const Launch& launch) {
  launch(partial_sums_kernel, ceil_div(p.batch * p.num_tokens, kThreads), 0, p);
}

}  // namespace tokcomp::cuda
