// Greedy choices of patches that are unlike each other. The cosines of all patches with one another are computed first,
// by as many blocks as there are groups of 16 rows, on tensor cores; then one block per image chooses, and reads one
// row of them in each step. Indices are those of patches: the prefix takes no part.
#pragma once

#include "dots.cuh"
#include "matching.cuh"

namespace tokcomp::cuda {

constexpr int kSharedScores = 1024;  // patches whose scores lie in shared memory

template <typename T>
struct CosineParams {
  const T* features;    // [B, P, K]
  float* inverse_norm;  // [B, P]
  float* cosine;        // [B, P, P]
  int64_t stride_b, stride_n;
  int64_t batch;
  int num_patches, width;
  int slice, slices;  // channels, a multiple of kDepth
  bool aligned;
};

template <typename T>
constexpr int kCosineBlocks = sizeof(T) == 4 ? 2 : 3;  // that a multiprocessor holds

// 16 rows of an image's cosines up to the diagonal, and what mirrors them: the matrix is symmetric to the bit.
template <typename T>
__global__ void __launch_bounds__(kThreads, kCosineBlocks<T>) cosine_kernel(CosineParams<T> p) {
  begin_grid();
  const int row_blocks = static_cast<int>(ceil_div(p.num_patches, kDotSources));
  const int64_t image = blockIdx.x / row_blocks;
  const int first = static_cast<int>(blockIdx.x % row_blocks) * kDotSources;
  const int last = min(p.num_patches, first + kDotSources), pitch = row_pitch<T>(p.slice);
  T* rows = shared_memory<T>();  // [16, pitch]
  T* columns = rows + kDotSources * pitch;
  float* products = reinterpret_cast<float*>(columns + tile_of(p.num_patches) * pitch);
  const T* features = p.features + image * p.stride_b;
  const float* inverse_norm = p.inverse_norm + image * p.num_patches;
  float* cosine = p.cosine + image * p.num_patches * p.num_patches;

  for (int column = 0; column < last; column += kDotTargets) {
    const int targets = min(kDotTargets, last - column);
    Dots<T> dots;
    for (int slice = 0; slice < p.slices; ++slice) {
      const int channel = slice * p.slice, inside = p.width - channel;
      __syncthreads();  // what lay there has been used
      load_slice(features + first * p.stride_n + channel, p.stride_n, last - first, inside, p.aligned, kDotSources,
                 p.slice, rows);
      load_slice(features + column * p.stride_n + channel, p.stride_n, targets, inside, p.aligned, targets, p.slice,
                 columns);
      __syncthreads();
      dots.accumulate(rows, columns, p.slice, targets);
    }
    dots.store(products, kDotPitch, targets);
    __syncthreads();
    const int target = column + threadIdx.x;
    if (static_cast<int>(threadIdx.x) >= targets) continue;
    for (int row = first > target ? first : target; row < last; ++row) {
      // Equal rows have equal cosines wherever they lie: the order of the norms does not matter.
      const float a = inverse_norm[row], b = inverse_norm[target];
      float value = products[(row - first) * kDotPitch + threadIdx.x] * fminf(a, b) * fmaxf(a, b);
      if (value != value) value = 0.f;
      cosine[static_cast<int64_t>(row) * p.num_patches + target] = value;
      cosine[static_cast<int64_t>(target) * p.num_patches + row] = value;
    }
  }
}

template <typename T, typename Launch>
void launch_cosines(CosineParams<T> p, const Launch& launch) {
  p.slice = slice_of<T>(p.width);
  p.slices = p.width > p.slice ? static_cast<int>(ceil_div(p.width, p.slice)) : 1;
  const int64_t row_bytes = (kDotSources + tile_of(p.num_patches)) * row_pitch<T>(p.slice) * sizeof(T);
  launch_inverse_norms(InverseNormParams<T>{p.features, p.inverse_norm, p.stride_b, p.stride_n, p.batch, p.num_patches,
                                            p.width, p.aligned},
                       launch);
  launch(cosine_kernel<T>, p.batch * ceil_div(p.num_patches, kDotSources),
         row_bytes + kDotSources * kDotPitch * sizeof(float), p);
}

struct SelectDiverseParams {
  const float* cosine;        // [B, P, P]
  const float* inverse_norm;  // [B, P]
  const float* relevance;     // [B, N] or null
  float* factor;              // [B, S, P] for the determinant, null for the farthest
  float* scores;              // [B, 2 P] where these do not go into shared memory, else null
  int64_t* chosen;            // [B, prefix + S]
  int num_patches, num_prefix_tokens, num_chosen;
};

// A patch and what it is chosen by.
struct Candidate {
  int patch;
  float score;

  // The larger score, on ties the lower patch.
  __device__ __forceinline__ void keep_better(const Candidate& other) {
    if (other.score > score || (other.score == score && other.patch < patch)) *this = other;
  }
};

// The best of all threads' candidates, in every thread. `found` holds one of each warp; who calls this twice in a row
// gives it another place.
__device__ __forceinline__ Candidate best_of_block(Candidate best, Candidate* found) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    const int patch = __shfl_xor_sync(kAllLanes, best.patch, offset);
    const float score = __shfl_xor_sync(kAllLanes, best.score, offset);
    best.keep_better({patch, score});
  }
  if (threadIdx.x % kWarp == 0) found[threadIdx.x / kWarp] = best;
  __syncthreads();
  best = found[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) best.keep_better(found[warp]);
  return best;
}

// One block per image. A thread keeps the scores of its own patches: of the farthest minus the largest cosine with a
// chosen one, of the determinant the factor by which it would grow; -inf of what is chosen.
static __global__ void __launch_bounds__(kThreads) select_diverse_kernel(SelectDiverseParams p) {
  begin_grid();
  const int64_t image = blockIdx.x;
  const int count = p.num_patches, prefix = p.num_prefix_tokens;
  // Shared: candidates [2, warps], then the determinant's factors at the chosen patch [S], scores [P], relevance [P].
  Candidate* found = shared_memory<Candidate>();
  float* at_chosen = reinterpret_cast<float*>(found + 2 * kWarps);
  float* scores = p.scores ? p.scores + image * 2 * count : at_chosen + (p.factor ? p.num_chosen : 0);
  float* relevance = scores + count;
  const float* cosine = p.cosine + image * count * count;
  float* factor = p.factor ? p.factor + image * p.num_chosen * count : nullptr;
  int64_t* chosen = p.chosen + image * (prefix + p.num_chosen);
  for (int n = threadIdx.x; n < prefix; n += kThreads) chosen[n] = n;
  if (p.num_chosen == 0) return;

  if (factor) {
    // What is not above 0 and finite counts as 0, and so does a row of zeros; the largest becomes 1, which changes no
    // choice.
    Candidate largest{0, 0.f};
    for (int i = threadIdx.x; i < count; i += kThreads) {
      const float given = p.relevance ? p.relevance[image * (prefix + count) + prefix + i] : 1.f;
      const bool usable = given > 0.f && given < INFINITY && p.inverse_norm[image * count + i] > 0.f;
      relevance[i] = usable ? given : 0.f;
      largest.keep_better({i, relevance[i]});
    }
    largest = best_of_block(largest, found + kWarps);
    for (int i = threadIdx.x; i < count; i += kThreads) {
      if (largest.score > 0.f) relevance[i] /= largest.score;
      scores[i] = relevance[i] * relevance[i];
    }
  } else {
    for (int i = threadIdx.x; i < count; i += kThreads) {
      float nearest = -1.f;
#pragma unroll 8
      for (int j = 0; j < count; ++j) {
        const float value = cosine[static_cast<int64_t>(j) * count + i];
        if (j != i) nearest = fmaxf(nearest, value);
      }
      scores[i] = -nearest;
    }
  }

  for (int step = 0; step < p.num_chosen; ++step) {
    Candidate best{count, -INFINITY};
    for (int i = threadIdx.x; i < count; i += kThreads) best.keep_better({i, scores[i]});
    best = best_of_block(best, found + step % 2 * kWarps);
    if (threadIdx.x == 0) chosen[prefix + step] = prefix + best.patch;
    const float* row = cosine + static_cast<int64_t>(best.patch) * count;
    if (!factor) {
      for (int i = threadIdx.x; i < count; i += kThreads) {
        const float away = step == 0 ? -row[i] : fminf(scores[i], -row[i]);
        scores[i] = i == best.patch || scores[i] == -INFINITY ? -INFINITY : away;
      }
      continue;
    }
    // The Cholesky rows of the earlier choices, at this one.
    for (int e = threadIdx.x; e < step; e += kThreads)
      at_chosen[e] = factor[static_cast<int64_t>(e) * count + best.patch];
    const float weight = relevance[best.patch], root = sqrtf(best.score);
    __syncthreads();
    for (int i = threadIdx.x; i < count; i += kThreads) {
      float own = relevance[i] * weight * row[i];
#pragma unroll 4
      for (int e = 0; e < step; ++e) own = fmaf(-factor[static_cast<int64_t>(e) * count + i], at_chosen[e], own);
      own = best.score > 0.f ? own / root : 0.f;
      factor[static_cast<int64_t>(step) * count + i] = own;
      // Rounded before it is subtracted, so that a patch equal to the chosen one is left with just 0.
      const float left = fmaxf(scores[i] - __fmul_rn(own, own), 0.f);
      scores[i] = i == best.patch || scores[i] == -INFINITY ? -INFINITY : left;
    }
  }
}

template <typename Launch>
void launch_select_diverse(const SelectDiverseParams& p, int64_t batch, const Launch& launch) {
  const int64_t floats = (p.factor ? p.num_chosen : 0) + (p.scores ? 0 : 2 * int64_t{p.num_patches});
  launch(select_diverse_kernel, batch, 2 * kWarps * sizeof(Candidate) + floats * sizeof(float), p);
}

}  // namespace tokcomp::cuda
