// How prune_merge divides an image: its channels into slices, each a block of a cluster's or a step of a loop, and what
// a block holds in shared memory.
#pragma once

#include "cluster.cuh"
#include "dots.cuh"
#include "rank.cuh"

namespace tokcomp::cuda {

struct MergeShape {
  int64_t width;  // C
  int num_tokens, num_prefix_tokens;
  int num_alive, num_kept;  // P, M: what pruning leaves, and merging

  constexpr int num_sources() const { return num_alive - num_kept; }
  constexpr int num_targets() const { return num_kept - num_prefix_tokens; }
  constexpr bool ranked_here() const { return num_tokens <= kRankTile; }  // else launch_rank makes the order
};

// A sum over channels is taken within each slice, then over slices in order, and the slices follow from an image's
// shape alone: the same bits from a cluster as from a loop, and whatever the batch.
struct MergePlan {
  int slices, width, lanes;  // `lanes` threads share a row's slice, 16 bytes each
  bool resident;             // a cluster holds the image, each block a slice; else one block streams it
  int targets;               // that a block compares with 16 sources at a time
  // Byte offsets in a block's shared memory; the rows are at 0, where the keys to rank by lie before them.
  int64_t dots, order, squares, inverse_norm, best_slot, best_cosine, next, first, shared_bytes;
};

// Three blocks of a multiprocessor's 228 KB, one of which the device takes from each: while one block waits for memory,
// the others have work. Streaming: three of sm_80's 164.
constexpr int64_t kResidentBytes = 75 * 1024, kStreamingBytes = 53 * 1024;

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// [16, pitch] products: four rows of them are written at a time, and must not meet a bank twice.
constexpr int dots_pitch(int targets) {
  return static_cast<int>(round_up(round_up(targets, kTargetTile) - kTargetTile, kWarp)) + kTargetTile;
}

template <typename T>
constexpr MergePlan with_layout(const MergeShape& shape, MergePlan plan) {
  const int64_t sources = shape.num_sources();
  const int64_t rows = plan.resident ? shape.num_kept + round_up(sources, kDotSources)
                                     : kDotSources + round_up(plan.targets, kTargetTile);
  int64_t at = 0;
  const auto take = [&at](int64_t bytes, int64_t shared_with = 0) {
    const int64_t offset = at;
    at += round_up(bytes > shared_with ? bytes : shared_with, 16);
    return offset;
  };
  take(sources > 0 ? rows * row_pitch<T>(plan.width) * sizeof(T) : 0, shape.ranked_here() ? 4 * shape.num_tokens : 0);
  // A resident row's moments, of its slice and of the whole of it, follow the products in the same place.
  plan.dots =
      take(sources > 0 ? 4 * kDotSources * dots_pitch(plan.targets) : 0, plan.resident ? 16 * shape.num_kept : 0);
  plan.order = take(plan.resident || shape.ranked_here() ? 4 * shape.num_alive : 0);
  const int64_t norms = sources == 0 ? 0 : plan.resident ? shape.num_alive : rows;
  plan.squares = take(4 * norms);
  plan.inverse_norm = take(4 * norms);
  const int64_t lists = plan.resident ? sources : 0;  // streaming keeps them in device memory
  plan.best_slot = take(4 * lists);
  plan.best_cosine = take(4 * lists);
  plan.next = take(4 * lists);
  plan.first = take(plan.resident ? 4 * shape.num_kept : 0);
  plan.shared_bytes = at;
  return plan;
}

template <typename T>
constexpr MergePlan make_merge_plan(const MergeShape& shape, const DeviceLimits& device) {
  constexpr int kWidest = kWarp * kVector<T>;  // a lane has one 16-byte piece of a row's slice
  const int64_t width = shape.width > 0 ? shape.width : 1;
  const auto divide = [&](int64_t slices) {
    MergePlan plan{};
    plan.slices = static_cast<int>(slices);
    plan.width = static_cast<int>(round_up(ceil_div(width, slices), kDepth));
    plan.resident = true;
    plan.targets = shape.num_targets();
    return plan;
  };
  // As few slices as leave room for several blocks; at most as many as a cluster can have, none of them empty.
  MergePlan plan = divide(ceil_div(width, kWidest));
  for (int slices = 1; slices <= kMaxCluster; slices *= 2) {
    const MergePlan finer = divide(slices);
    if (finer.width > kWidest) continue;
    if (static_cast<int64_t>(finer.width) * (slices - 1) >= width) break;
    plan = finer;
    if (with_layout<T>(shape, plan).shared_bytes <= kResidentBytes) break;
  }
  plan.lanes = 1;
  while (plan.lanes * kVector<T> < plan.width) plan.lanes *= 2;

  const MergePlan resident = with_layout<T>(shape, plan);
  const bool runs = plan.slices == 1 || (plan.slices <= kMaxCluster && device.clusters);
  if (shape.num_sources() > 0 && runs && resident.shared_bytes <= device.shared_bytes) return resident;
  plan.resident = false;
  // Tiles of targets as large as fit, and alike.
  for (int tiles = static_cast<int>(ceil_div(shape.num_targets(), kDotTargets));; ++tiles) {
    plan.targets = static_cast<int>(round_up(ceil_div(shape.num_targets(), tiles > 0 ? tiles : 1), kTargetTile));
    if (plan.targets <= kTargetTile || with_layout<T>(shape, plan).shared_bytes <= kStreamingBytes) break;
  }
  return with_layout<T>(shape, plan);
}

}  // namespace tokcomp::cuda
