// Merging over a partition that the caller makes: who may leave and who receives, each source's best match, which
// sources merge, where every token goes, the rows. How many sources and destinations an image has is known on the
// device alone: grids cover what could be, loops end at what is. Similarities stay in shared memory, 16 sources by up
// to 256 destinations at a time.
#pragma once

#include "dots.cuh"
#include "matching.cuh"
#include "rank.cuh"

namespace tokcomp::cuda {

// What a token's role says; any other value: neither.
constexpr int64_t kSource = 1, kDestination = 2;

// How many of the block's threads before this one have `flag`, and of all, by one barrier. Who calls this twice in a
// row gives `of_warps` [warps] another place.
__device__ __forceinline__ int place_in_block(bool flag, int* of_warps, int& total) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const unsigned flags = __ballot_sync(kAllLanes, flag);
  if (lane == 0) of_warps[warp] = __popc(flags);
  __syncthreads();
  int before = __popc(flags & ((1u << lane) - 1));
  total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += of_warps[w];
    total += of_warps[w];
  }
  return before;
}

struct PartitionParams {
  const int64_t* role;  // [B, N]
  int* sources;         // [B, N]: the tokens that may leave, by position
  int* destinations;    // [B, N]: those that receive
  int* counts;          // [B, 2]: of both
  int* joins;           // [B, N]: the token that each will join; -1 for now
  int num_tokens;
};

// One block per image.
static __global__ void __launch_bounds__(kThreads) partition_kernel(PartitionParams p) {
  begin_grid();
  const int64_t image = blockIdx.x, row = image * p.num_tokens;
  int* of_warps = shared_memory<int>();  // [2, warps]
  int num_sources = 0, num_destinations = 0, total;
  for (int first = 0; first < p.num_tokens; first += kThreads) {
    const int token = first + static_cast<int>(threadIdx.x);
    const int64_t role = token < p.num_tokens ? p.role[row + token] : 0;
    const int leaving = num_sources + place_in_block(role == kSource, of_warps, total);
    num_sources += total;
    const int receiving = num_destinations + place_in_block(role == kDestination, of_warps + kWarps, total);
    num_destinations += total;
    if (role == kSource) p.sources[row + leaving] = token;
    if (role == kDestination) p.destinations[row + receiving] = token;
    if (token < p.num_tokens) p.joins[row + token] = -1;
  }
  if (threadIdx.x == 0) {
    p.counts[2 * image] = num_sources;
    p.counts[2 * image + 1] = num_destinations;
  }
}

template <typename T>
struct MatchParams {
  const T* metric;            // [B, N, K]
  const float* inverse_norm;  // [B, N]
  const int* sources;         // [B, N]
  const int* destinations;    // [B, N]
  const int* counts;          // [B, 2]
  float* best;                // [B, N]: of each source in its list, its largest cosine
  int* match;                 // [B, N]: and the token with which; -1 without a destination
  int64_t stride_b, stride_n;
  int64_t batch;
  int num_tokens, width;
  int slice, slices;  // channels, a multiple of kDepth
  bool aligned;
};

template <typename T>
constexpr int kMatchBlocks = sizeof(T) == 4 ? 2 : 3;  // that a multiprocessor holds

// 16 sources of an image against all its destinations; a warp keeps the best match of two of them.
template <typename T>
__global__ void __launch_bounds__(kThreads, kMatchBlocks<T>) match_kernel(MatchParams<T> p) {
  begin_grid();
  constexpr int kPerWarp = kDotSources / kWarps;
  const int blocks_per_image = static_cast<int>(ceil_div(p.num_tokens, kDotSources));
  const int64_t image = blockIdx.x / blocks_per_image, row = image * p.num_tokens;
  const int first = static_cast<int>(blockIdx.x % blocks_per_image) * kDotSources;
  const int count = min(kDotSources, p.counts[2 * image] - first), num_targets = p.counts[2 * image + 1];
  if (count <= 0) return;

  const int warp = threadIdx.x / kWarp, pitch = row_pitch<T>(p.slice), tile = tile_of(p.num_tokens);
  T* rows = shared_memory<T>();  // [16, pitch]
  T* targets = rows + kDotSources * pitch;
  float* products = reinterpret_cast<float*>(targets + tile * pitch);  // [16, kDotPitch]
  float* inverse_target = products + kDotSources * kDotPitch;          // [tile]
  const T* metric = p.metric + image * p.stride_b;
  const int* source = p.sources + row + first;
  Match best[kPerWarp];
#pragma unroll
  for (int i = 0; i < kPerWarp; ++i) best[i] = {num_targets, -INFINITY};

  for (int target = 0; target < num_targets; target += kDotTargets) {
    const int* destination = p.destinations + row + target;
    const int here = min(kDotTargets, num_targets - target);
    Dots<T> dots;
    for (int slice = 0; slice < p.slices; ++slice) {
      const int channel = slice * p.slice, inside = p.width - channel;
      const auto row_of = [&](const int* tokens, int i, int last) {
        return metric + tokens[min(i, last)] * p.stride_n + channel;
      };
      __syncthreads();  // what lay there has been used
      load_slice([&](int i) { return row_of(source, i, count - 1); }, count, inside, p.aligned, kDotSources, p.slice,
                 rows);
      load_slice([&](int i) { return row_of(destination, i, here - 1); }, here, inside, p.aligned, here, p.slice,
                 targets);
      if (slice == 0 && static_cast<int>(threadIdx.x) < here) {
        inverse_target[threadIdx.x] = p.inverse_norm[row + destination[threadIdx.x]];
      }
      __syncthreads();
      dots.accumulate(rows, targets, p.slice, here);
    }
    dots.store(products, kDotPitch, here);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPerWarp; ++i) {
      const int s = warp + i * kWarps;
      if (s >= count) continue;
      const float* own = products + s * kDotPitch;
      const float inverse_source = p.inverse_norm[row + source[s]];
      best[i].keep_better(best_match([&](int j) { return own[j]; }, inverse_source, inverse_target, target, here));
    }
  }
#pragma unroll
  for (int i = 0; i < kPerWarp; ++i) {
    const int s = warp + i * kWarps;
    if (s >= count || threadIdx.x % kWarp > 0) continue;
    p.best[row + first + s] = best[i].cosine;
    p.match[row + first + s] = num_targets > 0 ? p.destinations[row + best[i].slot] : -1;
  }
}

struct JoinParams {
  const int* sources;  // [B, N]
  const int* counts;   // [B, 2]
  const float* best;   // [B, N]
  const int* match;    // [B, N]
  int* joins;          // [B, N]
  int64_t batch;
  int num_tokens, num_merged;
  float threshold;  // of the first num_merged, those above it merge
};

// One thread per source, whose rank is the number of sources before it, by similarity and then by position.
static __global__ void __launch_bounds__(kThreads) join_kernel(JoinParams p) {
  begin_grid();
  uint32_t* keys = shared_memory<uint32_t>();  // [kRankTile]
  const int blocks_per_image = static_cast<int>(ceil_div(p.num_tokens, kThreads));
  const int64_t image = blockIdx.x / blocks_per_image, row = image * p.num_tokens;
  const int begin = static_cast<int>(blockIdx.x % blocks_per_image) * kThreads, num_sources = p.counts[2 * image];
  if (begin >= num_sources) return;
  const int own = begin + static_cast<int>(threadIdx.x);
  const bool ranked = own < num_sources;
  const uint32_t key = ranked ? order_key(p.best[row + own]) : 0;
  int rank = 0;
  for (int first = 0; first < num_sources; first += kRankTile) {
    const int count = min(kRankTile, num_sources - first);
    for (int j = threadIdx.x; j < count; j += kThreads) keys[j] = order_key(p.best[row + first + j]);
    __syncthreads();
    if (ranked) rank += count_before(keys, first, count, own, key);
    __syncthreads();
  }
  if (ranked && rank < p.num_merged && p.best[row + own] > p.threshold)
    p.joins[row + p.sources[row + own]] = p.match[row + own];
}

struct SlotParams {
  const int* joins;  // [B, N]
  int* slots;        // [B, N]: where a token that does not merge would go if there were room for all
  int* order;        // [B, M]: the token of each slot, -1 behind the last
  int64_t* source;   // [B, N]
  int num_tokens, num_kept;
};

// One block per image.
static __global__ void __launch_bounds__(kThreads) slot_kernel(SlotParams p) {
  begin_grid();
  const int64_t image = blockIdx.x;
  int* of_warps = shared_memory<int>();  // [2, warps]
  const int* joins = p.joins + image * p.num_tokens;
  int* slots = p.slots + image * p.num_tokens;
  int* order = p.order + image * p.num_kept;
  int taken = 0, total, turn = 0;
  for (int first = 0; first < p.num_tokens; first += kThreads, turn ^= 1) {
    const int token = first + static_cast<int>(threadIdx.x);
    const bool stays = token < p.num_tokens && joins[token] < 0;
    const int slot = taken + place_in_block(stays, of_warps + turn * kWarps, total);
    taken += total;
    if (!stays) continue;
    slots[token] = slot;
    if (slot < p.num_kept) order[slot] = token;
  }
  for (int slot = taken + static_cast<int>(threadIdx.x); slot < p.num_kept; slot += kThreads) order[slot] = -1;
  __syncthreads();
  for (int token = threadIdx.x; token < p.num_tokens; token += kThreads) {
    const int slot = slots[joins[token] < 0 ? token : joins[token]];
    // Fewer sources than are to merge: the last tokens find no slot.
    p.source[image * p.num_tokens + token] = slot < p.num_kept ? slot : -1;
  }
}

enum class Average { kSize, kMean, kSum };

template <typename T>
struct JoinedRowsParams {
  const T* x;         // [B, N, C]
  const float* size;  // [B, N] or null
  const int* joins;   // [B, N]
  const int* order;   // [B, M]: -1 for padding
  T* x_out;           // [B, M, C]
  float* size_out;    // [B, M]
  int64_t stride_b, stride_n;
  int64_t batch, width;
  int num_tokens, num_kept;
  Average average;
  bool aligned;
};

// One warp per slot: its token's row, and those of the tokens that join it, found among all of the image's, by
// position.
template <typename T>
__global__ void __launch_bounds__(kThreads) joined_rows_kernel(JoinedRowsParams<T> p) {
  begin_grid();
  const int lane = threadIdx.x % kWarp;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;  // image and slot
  if (row >= p.batch * p.num_kept) return;
  const int64_t image = row / p.num_kept;
  const int* joins = p.joins + image * p.num_tokens;
  const float* size = p.size ? p.size + image * p.num_tokens : nullptr;
  const T* x = p.x + image * p.stride_b;
  const int own = p.order[row];
  const auto size_of = [&](int token) { return size ? effective_size(size[token]) : 1.f; };
  int64_t column = lane * kVector<T>;
  do {  // once even without channels, for the size
    const int64_t left = column < p.width ? p.width - column : 0;
    uint4 raw = load_raw(x + own * p.stride_n + column, own < 0 ? 0 : left, p.aligned);
    float sum[kVector<T>], total = own < 0 ? 0.f : size_of(own), count = 1.f;
    unpack<T>(raw, sum);
    const float weight = p.average == Average::kSize ? total : 1.f;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) sum[i] *= weight;
    for (int first = 0; first < p.num_tokens; first += kWarp) {
      const int token = first + lane;
      unsigned found = __ballot_sync(kAllLanes, token < p.num_tokens && own >= 0 && joins[token] == own);
      for (; found != 0; found &= found - 1) {
        const int more = first + __ffs(static_cast<int>(found)) - 1;
        float values[kVector<T>];
        load_vector(x + more * p.stride_n + column, left, p.aligned, values);
        const float size_more = size_of(more), weight_more = p.average == Average::kSize ? size_more : 1.f;
        total += size_more;
        count += 1.f;
#pragma unroll
        for (int i = 0; i < kVector<T>; ++i) sum[i] = fmaf(values[i], weight_more, sum[i]);
      }
    }
    if (count > 1.f) {  // what nothing joined is copied
      const float divisor = p.average == Average::kSize ? total : p.average == Average::kMean ? count : 1.f;
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) sum[i] /= divisor;
      raw = pack<T>(sum);
    }
    store_raw(p.x_out + row * p.width + column, left, p.aligned, raw);
    if (column == 0) p.size_out[row] = total;
    column += kWarp * kVector<T>;
  } while (column - lane * kVector<T> < p.width);
}

template <typename T, typename Launch>
void launch_matches(MatchParams<T> p, const Launch& launch) {
  p.slice = slice_of<T>(p.width);
  p.slices = p.width > p.slice ? static_cast<int>(ceil_div(p.width, p.slice)) : 1;
  const int64_t tile = tile_of(p.num_tokens);
  const int64_t row_bytes = (kDotSources + tile) * row_pitch<T>(p.slice) * sizeof(T);
  launch(match_kernel<T>, p.batch * ceil_div(p.num_tokens, kDotSources),
         row_bytes + (kDotSources * kDotPitch + tile) * sizeof(float), p);
}

template <typename Launch>
void launch_joins(const JoinParams& p, const Launch& launch) {
  launch(join_kernel, p.batch * ceil_div(p.num_tokens, kThreads), kRankTile * sizeof(uint32_t), p);
}

template <typename T, typename Launch>
void launch_joined_rows(const JoinedRowsParams<T>& p, const Launch& launch) {
  launch(joined_rows_kernel<T>, ceil_div(p.batch * p.num_kept, kWarps), 0, p);
}

}  // namespace tokcomp::cuda
