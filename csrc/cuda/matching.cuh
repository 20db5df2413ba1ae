// What two rows have to do with each other: their norms, and which of several a row resembles most.
#pragma once

#include "device.cuh"

namespace tokcomp::cuda {

__device__ __forceinline__ float inverse_of_norm(float squares) {
  const float norm = sqrtf(squares);
  return norm > 0.f ? 1.f / norm : 0.f;
}

// A destination, by its slot or its place in a list, and how much a source resembles it.
struct Match {
  int slot;
  float cosine;

  // The larger cosine, on ties the lower slot.
  __device__ __forceinline__ void keep_better(const Match& other) {
    if (other.cosine > cosine || (other.cosine == cosine && other.slot < slot)) *this = other;
  }
};

// One warp: the best of slots first_slot.., `count` of them; dot(j) is the source's product with the j-th.
template <typename Dot>
__device__ __forceinline__ Match best_match(const Dot& dot, float inverse_source, const float* inverse_target,
                                            int first_slot, int count) {
  Match best{first_slot + count, -INFINITY};
#pragma unroll 2
  for (int j = threadIdx.x % kWarp; j < count; j += kWarp) {
    float cosine = dot(j) * inverse_source * inverse_target[j];
    if (cosine != cosine) cosine = 0.f;
    best.keep_better({first_slot + j, cosine});
  }
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const int slot = __shfl_xor_sync(kAllLanes, best.slot, offset);
    const float cosine = __shfl_xor_sync(kAllLanes, best.cosine, offset);
    best.keep_better({slot, cosine});
  }
  return best;
}

template <typename T>
struct InverseNormParams {
  const T* rows;        // [B, R, K]
  float* inverse_norm;  // [B, R]: 1 / norm, 0 of a row of zeros and of what is no number
  int64_t stride_b, stride_n;
  int64_t batch;
  int num_rows, width;
  bool aligned;
};

// One warp per row: equal rows have equal norms.
template <typename T>
__global__ void __launch_bounds__(kThreads) inverse_norm_kernel(InverseNormParams<T> p) {
  begin_grid();
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;  // image and row
  if (row >= p.batch * p.num_rows) return;
  const T* from = p.rows + row / p.num_rows * p.stride_b + row % p.num_rows * p.stride_n;
  float sum = 0.f;
  for (int at = threadIdx.x % kWarp * kVector<T>; at < p.width; at += kWarp * kVector<T>) {
    float values[kVector<T>];
    load_vector(from + at, p.width - at, p.aligned, values);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) sum = fmaf(values[i], values[i], sum);
  }
  const float inverse = inverse_of_norm(warp_sum(sum));
  if (threadIdx.x % kWarp == 0) p.inverse_norm[row] = inverse;
}

template <typename T, typename Launch>
void launch_inverse_norms(const InverseNormParams<T>& p, const Launch& launch) {
  launch(inverse_norm_kernel<T>, ceil_div(p.batch * p.num_rows, kWarps), 0, p);
}

}  // namespace tokcomp::cuda
