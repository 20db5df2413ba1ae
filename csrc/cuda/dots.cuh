// Dot products of 16 rows with up to 256 others, all in shared memory: float16 and bfloat16 on tensor cores, float32 by
// fused multiply-add. Rows are a multiple of kDepth elements, and their pitch an odd number of 16 bytes, so that eight
// neighbouring rows' reads meet no bank twice.
#pragma once

#include "matrices.cuh"

namespace tokcomp::cuda {

constexpr int kDotSources = 16, kDotTargets = kThreads;
constexpr int kDepth = 32;
constexpr int kTargetTile = 8;  // rows are read in whole tiles of targets, whatever is in the last
constexpr int kDotPitch = kDotTargets + kTargetTile;  // of products: four rows are written at a time, to all banks

template <typename T>
constexpr int row_pitch(int width) {
  return width + kVector<T>;
}

// Channels that lie in shared memory at a time, where rows are longer; a multiple of kDepth where they are not.
template <typename T>
constexpr int kWidestSlice = 256 / static_cast<int>(sizeof(T));

template <typename T>
constexpr int slice_of(int width) {
  const int whole = static_cast<int>(ceil_div(width, kDepth)) * kDepth;
  return whole < kDepth ? kDepth : whole < kWidestSlice<T> ? whole : kWidestSlice<T>;
}

// Targets that there is room for: a whole tile, or all, rounded up to what products are computed of at once.
constexpr int tile_of(int targets) {
  const int whole = (targets + kTargetTile - 1) / kTargetTile * kTargetTile;
  return whole < kDotTargets ? whole : kDotTargets;
}

// to [rows, row_pitch(slice)]: `slice` channels of `count` rows, each of which starts at row_of(i), of which `inside`
// exist, and zeros beyond.
template <typename T, typename RowOf>
__device__ __forceinline__ void load_slice(const RowOf& row_of, int count, int inside, bool aligned, int rows,
                                           int slice, T* to) {
  const int pieces = slice / kVector<T>;
#pragma unroll 4
  for (int i = threadIdx.x; i < rows * pieces; i += kThreads) {
    const int row = i / pieces, at = i % pieces * kVector<T>, left = row < count ? inside - at : 0;
    store_shared(to + row * row_pitch<T>(slice) + at, load_raw(row_of(row) + at, left, aligned));
  }
}

template <typename T>
__device__ __forceinline__ void load_slice(const T* from, int64_t stride, int count, int inside, bool aligned, int rows,
                                           int slice, T* to) {
  load_slice([&](int row) { return from + row * stride; }, count, inside, aligned, rows, slice, to);
}

// A block's threads hold the products between them, 16 each.
template <typename T>
struct Dots {
  static constexpr int kTiles = kDotTargets / kTargetTile / kWarps;  // of 16 x 8 products, per warp

  float sums[kTiles * 4] = {};

  // += the products of rows source.. and of `targets` rows target.., over `width` elements
  __device__ __forceinline__ void accumulate(const T* source, const T* target, int width, int targets) {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
    const int pitch = row_pitch<T>(width);
    source += lane % 16 * pitch + lane / 16 * 8;
    target += (warp * kTargetTile + lane % 8) * pitch + lane / 8 * 8;
    for (int k = 0; k < width; k += kDepth) {
      uint32_t a[2][4];
      load_matrices(source + k, a[0]);
      load_matrices(source + k + 16, a[1]);
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if ((t * kWarps + warp) * kTargetTile < targets) {
          uint32_t b[4];
          load_matrices(target + t * kWarps * kTargetTile * pitch + k, b);
          multiply_add(T(), sums + t * 4, a[0], b[0], b[1]);
          multiply_add(T(), sums + t * 4, a[1], b[2], b[3]);
        }
      }
    }
  }

  // to [16, pitch]: up to the whole tile of the last target
  __device__ __forceinline__ void store(float* to, int pitch, int targets) const {
    const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int first = (t * kWarps + warp) * kTargetTile;
      if (first < targets) {
        float* at = to + lane / 4 * pitch + first + lane % 4 * 2;
        at[0] = sums[t * 4];
        at[1] = sums[t * 4 + 1];
        at[8 * pitch] = sums[t * 4 + 2];
        at[8 * pitch + 1] = sums[t * 4 + 3];
      }
    }
  }
};

// A thread holds one target's products with all sources.
template <>
struct Dots<float> {
  float sums[kDotSources] = {};

  __device__ __forceinline__ void accumulate(const float* source, const float* target, int width, int targets) {
    if (static_cast<int>(threadIdx.x) >= targets) return;
    const int pitch = row_pitch<float>(width);
    target += threadIdx.x * pitch;
    for (int k = 0; k < width; k += 4) {
      const float4 b = *reinterpret_cast<const float4*>(target + k);
#pragma unroll
      for (int i = 0; i < kDotSources; ++i) {
        const float4 a = *reinterpret_cast<const float4*>(source + i * pitch + k);
        sums[i] = fmaf(a.x, b.x, sums[i]);
        sums[i] = fmaf(a.y, b.y, sums[i]);
        sums[i] = fmaf(a.z, b.z, sums[i]);
        sums[i] = fmaf(a.w, b.w, sums[i]);
      }
    }
  }

  __device__ __forceinline__ void store(float* to, int pitch, int targets) const {
    if (static_cast<int>(threadIdx.x) >= targets) return;
#pragma unroll
    for (int i = 0; i < kDotSources; ++i) to[i * pitch + threadIdx.x] = sums[i];
  }
};

template <typename T>
__device__ __forceinline__ void add_dots(Dots<T>& total, const Dots<T>& more) {
#pragma unroll
  for (int i = 0; i < kDotSources; ++i) total.sums[i] += more.sums[i];
}

}  // namespace tokcomp::cuda
