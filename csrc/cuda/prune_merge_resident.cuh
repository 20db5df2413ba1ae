// prune_merge with the image in shared memory: each block of a cluster holds a slice of the channels of all rows that
// are left by pruning. What depends on all channels (cosines, LayerNorm's moments) is exchanged between the blocks, in
// the order of slices. x and branch are read once, each output is written once.
#pragma once

#include "prune_merge.cuh"

namespace tokcomp::cuda {

template <typename T>
struct ResidentImage {
  T* rows;              // [P, pitch]: this block's slice of the row of each rank; a slot's becomes its merged row
  float* dots;          // [16, dots_pitch]: this slice's products of the sources at hand with all targets
  Moments* own;         // [M]: of this slice of a slot's row; in the place of dots
  Moments* whole;       // [M]: of all of it
  int* order;           // [P]
  float* squares;       // [P]: of this slice
  float* inverse_norm;  // [P]
  MergeLists lists;

  __device__ explicit ResidentImage(const PruneMergeParams<T>& p) {
    unsigned char* shared = shared_memory<unsigned char>();
    const MergePlan& plan = p.plan;
    rows = reinterpret_cast<T*>(shared);
    dots = reinterpret_cast<float*>(shared + plan.dots);
    own = reinterpret_cast<Moments*>(shared + plan.dots);
    whole = own + p.shape.num_kept;
    order = reinterpret_cast<int*>(shared + plan.order);
    squares = reinterpret_cast<float*>(shared + plan.squares);
    inverse_norm = reinterpret_cast<float*>(shared + plan.inverse_norm);
    lists = {reinterpret_cast<int*>(shared + plan.best_slot), reinterpret_cast<float*>(shared + plan.best_cosine),
             reinterpret_cast<int*>(shared + plan.next), reinterpret_cast<int*>(shared + plan.first)};
  }
};

// The sum over the cluster's blocks, in order, of what value(block) reads in each: all reads are under way at once.
template <typename Value>
__device__ __forceinline__ float cluster_sum(int blocks, const Value& value) {
  float values[kMaxCluster], sum = 0.f;
#pragma unroll
  for (int block = 0; block < kMaxCluster; ++block) values[block] = block < blocks ? value(block) : 0.f;
#pragma unroll
  for (int block = 0; block < kMaxCluster; ++block) {
    if (block < blocks) sum += values[block];
  }
  return sum;
}

// Every block multiplies its slices of 16 sources and all targets; then each finds the matches of its share of them.
template <typename T>
__device__ void match_resident(const PruneMergeParams<T>& p, const ResidentImage<T>& image, int slice) {
  const MergeShape& shape = p.shape;
  const int slices = p.plan.slices, width = p.plan.width, pitch = row_pitch<T>(width);
  const int prefix = shape.num_prefix_tokens, kept = shape.num_kept;
  const int num_sources = shape.num_sources(), num_targets = shape.num_targets();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int first = 0; first < num_sources; first += kDotSources) {
    for (int target = 0; target < num_targets; target += kDotTargets) {
      const int targets = min(kDotTargets, num_targets - target);
      Dots<T> dots;
      dots.accumulate(image.rows + (kept + first) * pitch, image.rows + (prefix + target) * pitch, width, targets);
      dots.store(image.dots + target, dots_pitch(num_targets), targets);
    }
    sync_cluster(slices);
    if (first == 0) {
      for (int rank = prefix + threadIdx.x; rank < shape.num_alive; rank += kThreads) {
        image.inverse_norm[rank] =
            inverse_of_norm(cluster_sum(slices, [&](int block) { return in_block(image.squares, block)[rank]; }));
      }
      __syncthreads();
    }
    for (int s = slice + slices * warp; s < kDotSources && first + s < num_sources; s += slices * kWarps) {
      const float* dots = image.dots + s * dots_pitch(num_targets);
      const auto dot = [&](int j) { return cluster_sum(slices, [&](int block) { return in_block(dots, block)[j]; }); };
      const Match best =
          best_match(dot, image.inverse_norm[kept + first + s], image.inverse_norm + prefix, prefix, num_targets);
      if (lane < slices) {
        in_block(image.lists.best_slot, lane)[first + s] = best.slot;
        in_block(image.lists.best_cosine, lane)[first + s] = best.cosine;
      }
    }
    sync_cluster(slices);
  }
}

// That a multiprocessor holds: as many as need no spilling.
template <typename T>
constexpr int kResidentBlocks = sizeof(T) == 4 ? 2 : 3;

template <typename T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>) prune_merge_resident_kernel(PruneMergeParams<T> p) {
  begin_grid();
  const int slices = p.plan.slices, slice = static_cast<int>(blockIdx.x) % slices;
  const int64_t image = blockIdx.x / slices;
  const int alive = p.shape.num_alive, kept = p.shape.num_kept;
  const ResidentImage<T> own(p);
  if (p.order) {
    const int* order = p.order + image * p.shape.num_tokens;
    for (int rank = threadIdx.x; rank < alive; rank += kThreads) own.order[rank] = order[rank];
    for (int rank = alive + slice * kThreads + threadIdx.x; rank < p.shape.num_tokens; rank += slices * kThreads) {
      p.source[image * p.shape.num_tokens + order[rank]] = -1;
    }
    __syncthreads();
  } else {
    const int heads = p.importance_heads, count = p.shape.num_tokens;
    const float* importance = p.importance + image * heads * count;
    const auto mean_of = [&](int token) {
      float sum = importance[token];
      for (int head = 1; head < heads; ++head) sum += importance[head * count + token];
      return heads > 1 ? sum / static_cast<float>(heads) : sum;
    };
    make_order(p, image, mean_of, slice, slices, shared_memory<uint32_t>(), own.order);
    sync_cluster(slices);
  }

  const Piece<T> piece(p, slice);
  load_rows<4>(
      p, image, piece, alive, [&](int rank) { return own.order[rank]; }, own.rows, own.squares, true,
      [](int, const uint4&) {});
  __syncthreads();
  match_resident(p, own, slice);
  link_lists(p.shape, own.lists);
  write_sizes(p, image, slice, slices, own.order, own.lists);

  const int pitch = row_pitch<T>(p.plan.width), lanes = p.plan.lanes;
  const int groups = kThreads / lanes, group = threadIdx.x / lanes;
  const float channels = slice_channels(p, slice);
  T* const pieces = own.rows + piece.local;
  const auto row_of = [&](int rank) { return load_shared(pieces + rank * pitch); };
  const int64_t out = image * kept * p.shape.width + piece.column;
#pragma unroll 2
  for (int base = 0; base < kept; base += groups) {
    const int slot = base + group;
    uint4 row{0, 0, 0, 0};
    if (slot < kept && piece.stored) {
      row = row_of(slot);
      const int first_source = own.lists.first[slot];
      if (first_source >= 0) {
        merge_rows<T>(row_of, own.lists, first_source, kept, row);
        store_shared(pieces + slot * pitch, row);
      }
      // Otherwise x_out follows with `normalized`: the arrival at the next barrier would wait for its stores.
      if (!p.normalized) store_raw(p.x_out + out + slot * p.shape.width, piece.inside, p.aligned, row);
    }
    if (p.normalized) {
      const Moments moments = slice_moments(row, piece, lanes, channels);
      if (slot < kept && piece.local == 0) own.own[slot] = moments;
    }
  }
  if (!p.normalized) return;

  sync_cluster(slices);
  for (int slot = threadIdx.x; slot < kept; slot += kThreads) {
    Moments parts[kMaxCluster], whole{0.f, 0.f};
#pragma unroll
    for (int block = 0; block < kMaxCluster; ++block) {
      parts[block] = block < slices ? in_block(own.own, block)[slot] : Moments{0.f, 0.f};
    }
    float before = 0.f;
#pragma unroll
    for (int block = 0; block < kMaxCluster; ++block) {
      if (block < slices) {
        const float more = slice_channels(p, block);
        whole.add(before, parts[block], more);
        before += more;
      }
    }
    whole.finish(before, p.norm_eps);
    own.whole[slot] = whole;
  }
  __syncthreads();
  if (slices > 1) cluster_arrive_relaxed();  // nothing of another block is read from here on
  const Affine<T> affine(p, piece);
#pragma unroll 2
  for (int slot = group; slot < kept; slot += groups) {
    if (piece.inside > 0) {
      const uint4 row = row_of(slot);
      store_raw(p.x_out + out + slot * p.shape.width, piece.inside, p.aligned, row);
      store_raw(p.normalized + out + slot * p.shape.width, piece.inside, p.aligned, affine.apply(row, own.whole[slot]));
    }
  }
  if (slices > 1) cluster_wait();  // others may still read this one's
}

}  // namespace tokcomp::cuda
