// A residual sum and its LayerNorm: one warp per row, which it holds in registers from the loads to the last store.
#pragma once

#include "device.cuh"

namespace tokcomp::cuda {

template <typename T>
struct AddLayerNormParams {
  const T* x;       // [rows, C]
  const T* branch;  // [rows, C]
  const T* weight;  // [C] or null
  const T* bias;    // [C] or null
  T* x_out;         // [rows, C]
  T* normalized;    // [rows, C]
  int64_t x_stride, branch_stride;
  int64_t rows;
  int width;
  float norm_eps;
  bool aligned;
};

// kHeld: 16-byte pieces of a row that a lane holds; what is longer is read again from x_out.
template <typename T, int kHeld>
__global__ void __launch_bounds__(kThreads) add_layer_norm_kernel(AddLayerNormParams<T> p) {
  begin_grid();
  constexpr int kVec = kVector<T>, kStep = kWarp * kVec;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= p.rows) return;
  const int first = threadIdx.x % kWarp * kVec;
  const T* x = p.x + row * p.x_stride;
  const T* branch = p.branch + row * p.branch_stride;
  T* x_out = p.x_out + row * p.width;
  T* normalized = p.normalized + row * p.width;

  uint4 held[kHeld], more[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = first + i * kStep;
    held[i] = more[i] = uint4{0, 0, 0, 0};
    if (column < p.width) {
      held[i] = load_raw(x + column, p.width - column, p.aligned);
      more[i] = load_raw(branch + column, p.width - column, p.aligned);
    }
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int column = first + i * kStep;
    held[i] = add_rounded<T>(held[i], more[i]);
    if (column < p.width) store_raw(x_out + column, p.width - column, p.aligned, held[i]);
  }
  for (int column = first + kHeld * kStep; column < p.width; column += kStep) {
    const int count = p.width - column;
    store_raw(x_out + column, count, p.aligned,
              add_rounded<T>(load_raw(x + column, count, p.aligned), load_raw(branch + column, count, p.aligned)));
  }

  // visit(column, piece): this lane's pieces of the sum
  const auto for_each = [&](const auto& visit) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const int column = first + i * kStep;
      if (column < p.width) visit(column, held[i]);
    }
    for (int column = first + kHeld * kStep; column < p.width; column += kStep) {
      visit(column, load_raw<T>(x_out + column, p.width - column, p.aligned));
    }
  };
  float sum = 0.f, squares = 0.f;
  for_each([&](int, const uint4& piece) {
    float values[kVec];
    unpack<T>(piece, values);
#pragma unroll
    for (int i = 0; i < kVec; ++i) sum += values[i];
  });
  const float mean = warp_sum(sum) / static_cast<float>(p.width);
  for_each([&](int column, const uint4& piece) {
    float values[kVec];
    unpack<T>(piece, values);
#pragma unroll
    for (int i = 0; i < kVec; ++i) {
      const float distance = column + i < p.width ? values[i] - mean : 0.f;
      squares = fmaf(distance, distance, squares);
    }
  });
  const float scale = 1.f / sqrtf(warp_sum(squares) / static_cast<float>(p.width) + p.norm_eps);
  for_each([&](int column, const uint4& piece) {
    const int count = p.width - column;
    float values[kVec];
    unpack<T>(piece, values);
#pragma unroll
    for (int i = 0; i < kVec; ++i) values[i] = (values[i] - mean) * scale;
    if (p.weight) {
      float weight[kVec];
      load_vector(p.weight + column, count, p.aligned, weight);
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[i] *= weight[i];
    }
    if (p.bias) {
      float bias[kVec];
      load_vector(p.bias + column, count, p.aligned, bias);
#pragma unroll
      for (int i = 0; i < kVec; ++i) values[i] += bias[i];
    }
    store_vector(normalized + column, count, p.aligned, values);
  });
}

template <typename T, typename Launch>
void launch_add_layer_norm(const AddLayerNormParams<T>& p, const Launch& launch) {
  const auto kernel = p.width <= 2 * kWarp * kVector<T> ? add_layer_norm_kernel<T, 2> : add_layer_norm_kernel<T, 5>;
  launch(kernel, ceil_div(p.rows, kWarps), 0, p);
}

}  // namespace tokcomp::cuda
