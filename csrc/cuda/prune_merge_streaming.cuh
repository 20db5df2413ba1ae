// prune_merge by one block per image, whose rows pass through shared memory a slice at a time: 16 sources and a tile of
// targets. A target's row is written as soon as it is there; what merges is put right afterwards.
#pragma once

#include "prune_merge.cuh"

namespace tokcomp::cuda {

template <typename T>
__device__ void match_streaming(const PruneMergeParams<T>& p, int64_t image, const int* order,
                                const MergeLists& lists) {
  const MergeShape& shape = p.shape;
  const int prefix = shape.num_prefix_tokens, kept = shape.num_kept;
  const int num_sources = shape.num_sources(), num_targets = shape.num_targets();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int pitch = row_pitch<T>(p.plan.width);
  unsigned char* shared = shared_memory<unsigned char>();
  T* rows = reinterpret_cast<T*>(shared);  // 16 sources, then targets
  float* products = reinterpret_cast<float*>(shared + p.plan.dots);
  float* squares = reinterpret_cast<float*>(shared + p.plan.squares);
  float* inverse_norm = reinterpret_cast<float*>(shared + p.plan.inverse_norm);

  for (int first = 0; first < num_sources; first += kDotSources) {
    for (int target = 0; target < num_targets; target += p.plan.targets) {
      const int targets = min(p.plan.targets, num_targets - target);
      const auto token_of = [&](int row) {
        if (row >= kDotSources) return order[prefix + target + row - kDotSources];
        return first + row < num_sources ? order[kept + first + row] : -1;
      };
      Dots<T> total;
      for (int slice = 0; slice < p.plan.slices; ++slice) {
        const Piece<T> piece(p, slice);
        __syncthreads();  // the last rows have been used
        T* out = p.x_out + (image * kept + prefix + target - kDotSources) * shape.width + piece.column;
        load_rows<2>(p, image, piece, kDotSources + targets, token_of, rows, squares, slice == 0,
                     [&](int row, const uint4& y) {
                       if (first == 0 && row >= kDotSources)
                         store_raw(out + row * shape.width, piece.inside, p.aligned, y);
                     });
        __syncthreads();
        Dots<T> dots;
        dots.accumulate(rows, rows + kDotSources * pitch, p.plan.width, targets);
        add_dots(total, dots);
      }
      total.store(products, dots_pitch(p.plan.targets), targets);
      for (int row = threadIdx.x; row < kDotSources + targets; row += kThreads) {
        inverse_norm[row] = inverse_of_norm(squares[row]);
      }
      __syncthreads();
      for (int s = warp; s < kDotSources && first + s < num_sources; s += kWarps) {
        const float* dots = products + s * dots_pitch(p.plan.targets);
        Match best = best_match([&](int j) { return dots[j]; }, inverse_norm[s], inverse_norm + kDotSources,
                                prefix + target, targets);
        if (lane == 0) {
          if (target > 0) best.keep_better({lists.best_slot[first + s], lists.best_cosine[first + s]});
          lists.best_slot[first + s] = best.slot;
          lists.best_cosine[first + s] = best.cosine;
        }
      }
    }
  }
}

// That a multiprocessor holds: as many as need no spilling.
template <typename T>
constexpr int kStreamingBlocks = sizeof(T) == 4 ? 2 : 3;

template <typename T>
__global__ void __launch_bounds__(kThreads, kStreamingBlocks<T>) prune_merge_streaming_kernel(PruneMergeParams<T> p) {
  begin_grid();
  const int64_t image = blockIdx.x;
  const MergeShape& shape = p.shape;
  const int kept = shape.num_kept, num_sources = shape.num_sources();
  const int* order = p.order;
  if (order) {
    order += image * shape.num_tokens;
    for (int rank = shape.num_alive + threadIdx.x; rank < shape.num_tokens; rank += kThreads) {
      p.source[image * shape.num_tokens + order[rank]] = -1;
    }
  } else {
    int* own_order = reinterpret_cast<int*>(shared_memory<unsigned char>() + p.plan.order);
    const float* importance = p.importance + image * shape.num_tokens;
    make_order(p, image, [&](int token) { return importance[token]; }, 0, 1, shared_memory<uint32_t>(), own_order);
    __syncthreads();
    order = own_order;
  }
  MergeLists lists{};
  if (num_sources > 0) {
    int* memory = p.lists + image * (3 * num_sources + kept);
    lists = {memory, reinterpret_cast<float*>(memory + num_sources), memory + 2 * num_sources,
             memory + 3 * num_sources};
    match_streaming(p, image, order, lists);
    link_lists(shape, lists);
  }
  write_sizes(p, image, 0, 1, order, lists);

  const int lanes = p.plan.lanes, groups = kThreads / lanes, group = threadIdx.x / lanes;
  for (int base = 0; base < kept; base += groups) {
    const int slot = base + group;
    const bool here = slot < kept;
    const bool written = num_sources > 0 && slot >= shape.num_prefix_tokens;  // as it is before anything merges
    const int first_source = here && num_sources > 0 ? lists.first[slot] : -1;
    Moments moments{0.f, 0.f};
    float before = 0.f;
    for (int slice = 0; slice < p.plan.slices; ++slice) {
      const Piece<T> piece(p, slice);
      T* out = p.x_out + (image * kept + slot) * shape.width + piece.column;
      uint4 row{0, 0, 0, 0};
      if (here && piece.inside > 0 && (p.normalized || !written || first_source >= 0)) {
        const auto row_of = [&](int rank) {
          const int token = order[rank];
          const uint4 raw =
              load_raw(p.x + image * p.x_stride_b + token * p.x_stride_n + piece.column, piece.inside, p.aligned);
          if (!p.branch) return raw;
          return add_rounded<T>(
              raw, load_raw(p.branch + image * p.branch_stride_b + token * p.branch_stride_n + piece.column,
                            piece.inside, p.aligned));
        };
        row = written ? load_raw<T>(out, piece.inside, p.aligned) : row_of(slot);
        if (first_source >= 0) merge_rows<T>(row_of, lists, first_source, kept, row);
        if (!written || first_source >= 0) store_raw(out, piece.inside, p.aligned, row);
      }
      if (p.normalized) {
        const float channels = slice_channels(p, slice);
        moments.add(before, slice_moments(row, piece, lanes, channels), channels);
        before += channels;
      }
    }
    if (!p.normalized) continue;
    moments.finish(before, p.norm_eps);
    for (int slice = 0; slice < p.plan.slices; ++slice) {
      const Piece<T> piece(p, slice);
      if (here && piece.inside > 0) {
        const int64_t at = (image * kept + slot) * shape.width + piece.column;
        const Affine<T> affine(p, piece);
        store_raw(p.normalized + at, piece.inside, p.aligned,
                  affine.apply(load_raw<T>(p.x_out + at, piece.inside, p.aligned), moments));
      }
    }
  }
}

}  // namespace tokcomp::cuda
