// Prune by importance, merge by similarity: one block per image ranks its tokens, matches each token to be merged with
// a kept one, and writes the kept tokens. Rows that are pruned are never read.
#pragma once

#include "rank.cuh"

namespace tokcomp::cuda {

template <typename T>
struct PruneMergeParams {
  const T* x;               // [B, N, C]
  const float* importance;  // [B, N], or null where `order` is given
  const int* order;         // [B, N]: the token at each rank, or null to rank here
  const float* size;        // [B, N] or null
  T* x_out;                 // [B, M, C]
  float* size_out;          // [B, M]
  int64_t* source;          // [B, N]
  int* best_slot;           // [B, P - M]: where each token to be merged goes
  float* best_cosine;       // [B, P - M]
  int64_t x_stride_b, x_stride_n;
  int64_t batch, width;
  int num_tokens, num_prefix_tokens;
  int num_alive, num_kept;  // P, M
  bool similarity_weighted_size, aligned;
};

// The similarity of 16 sources and 256 destinations is a matrix product, 4 x 4 values per thread. Columns of x stream
// through shared memory 32 at a time; rows are padded by 4 so that eight threads' 16-byte reads meet no bank twice.
constexpr int kSrcTile = 16, kDstTile = 256, kDepth = 32, kPitch = kDepth + 4;
constexpr int kTileRows = kSrcTile + kDstTile;
constexpr int kPerThread = 4;                       // sources and destinations of a thread
constexpr int kDstThreads = kDstTile / kPerThread;  // threads side by side over destinations
constexpr int kDstWarps = kDstThreads / kWarp;      // warps that share a source
static_assert(kDstThreads * (kSrcTile / kPerThread) == kThreads);

struct MatchShared {
  float tile[kTileRows * kPitch];  // sources, then destinations
  float inverse_norm[kTileRows];
  float cosine[kDstWarps][kSrcTile];
  int slot[kDstWarps][kSrcTile];
};

// The larger cosine, on ties the lower slot.
__device__ __forceinline__ void keep_better(float& cosine, int& slot, float other_cosine, int other_slot) {
  if (other_cosine > cosine || (other_cosine == cosine && other_slot < slot)) {
    cosine = other_cosine;
    slot = other_slot;
  }
}

template <typename T>
__device__ void match_tokens(const PruneMergeParams<T>& p, int64_t image, const int* order, MatchShared& shared) {
  constexpr int kVec = kVector<T>;
  constexpr int kParts = kDepth / kVec;  // threads that load a row's 32 columns
  constexpr int kLoads = static_cast<int>(ceil_div(kTileRows * kParts, kThreads));
  const int num_src = p.num_alive - p.num_kept;
  const T* x = p.x + image * p.x_stride_b;
  const int lane = threadIdx.x % kWarp;
  const int dst_thread = threadIdx.x % kDstThreads, src_thread = threadIdx.x / kDstThreads;
  const int part = threadIdx.x % kParts * kVec;

  for (int src_first = 0; src_first < num_src; src_first += kSrcTile) {
    float best_cosine = -INFINITY;  // of source src_first + threadIdx.x, in the first 16 threads
    int best_slot = p.num_kept;
    for (int dst_first = p.num_prefix_tokens; dst_first < p.num_kept; dst_first += kDstTile) {
      const T* rows[kLoads];
      unsigned exists = 0;  // a bit for each of rows
#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int row = (threadIdx.x + u * kThreads) / kParts;
        const int src = src_first + row, dst = dst_first + row - kSrcTile;
        const int rank = row < kSrcTile ? p.num_kept + src : dst;
        const bool here = row < kSrcTile ? src < num_src : row < kTileRows && dst < p.num_kept;
        rows[u] = here ? x + order[rank] * p.x_stride_n : x;
        exists |= here ? 1u << u : 0u;
      }
      float squares[kLoads] = {}, dots[kPerThread][kPerThread] = {};
      const bool busy = src_first + src_thread * kPerThread < num_src;
      const int dst_count = min(kPerThread, static_cast<int>(ceil_div(p.num_kept - dst_first, kDstThreads)));

      for (int64_t column = part; column - part < p.width; column += kDepth) {
        __syncthreads();  // the last columns have been used
#pragma unroll
        for (int u = 0; u < kLoads; ++u) {
          const int row = (threadIdx.x + u * kThreads) / kParts;
          if (row < kTileRows) {
            float values[kVec];
            load_vector(rows[u] + column, exists >> u & 1 ? p.width - column : 0, p.aligned, values);
            float4* to = reinterpret_cast<float4*>(shared.tile + row * kPitch + part);
#pragma unroll
            for (int i = 0; i < kVec; i += 4) {
              to[i / 4] = make_float4(values[i], values[i + 1], values[i + 2], values[i + 3]);
            }
#pragma unroll
            for (int i = 0; i < kVec; ++i) squares[u] += values[i] * values[i];
          }
        }
        __syncthreads();
        if (busy) {
          const float* src = shared.tile + src_thread * kPerThread * kPitch;
          const float* dst = shared.tile + (kSrcTile + dst_thread) * kPitch;
#pragma unroll 2
          for (int k = 0; k < kDepth; k += 4) {
            float4 a[kPerThread];
#pragma unroll
            for (int i = 0; i < kPerThread; ++i) a[i] = *reinterpret_cast<const float4*>(src + i * kPitch + k);
#pragma unroll
            for (int j = 0; j < kPerThread; ++j) {
              if (j < dst_count) {
                const float4 b = *reinterpret_cast<const float4*>(dst + j * kDstThreads * kPitch + k);
#pragma unroll
                for (int i = 0; i < kPerThread; ++i) {
                  dots[i][j] += a[i].x * b.x;
                  dots[i][j] += a[i].y * b.y;
                  dots[i][j] += a[i].z * b.z;
                  dots[i][j] += a[i].w * b.w;
                }
              }
            }
          }
        }
      }

#pragma unroll
      for (int u = 0; u < kLoads; ++u) {
        const int row = (threadIdx.x + u * kThreads) / kParts;
        const float norm = sqrtf(group_sum(squares[u], kParts));
        if (part == 0 && row < kTileRows) shared.inverse_norm[row] = norm > 0.f ? 1.f / norm : 0.f;
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kPerThread; ++i) {
        const int src = src_thread * kPerThread + i;
        float cosine = -INFINITY;
        int slot = p.num_kept;
#pragma unroll
        for (int j = 0; j < kPerThread; ++j) {
          const int dst = dst_thread + j * kDstThreads;
          float candidate = dots[i][j] * shared.inverse_norm[src] * shared.inverse_norm[kSrcTile + dst];
          if (candidate != candidate) candidate = 0.f;
          if (dst_first + dst < p.num_kept) keep_better(cosine, slot, candidate, dst_first + dst);
        }
#pragma unroll
        for (int offset = kWarp / 2; offset > 0; offset /= 2) {
          const float other_cosine = __shfl_xor_sync(kAllLanes, cosine, offset);
          const int other_slot = __shfl_xor_sync(kAllLanes, slot, offset);
          keep_better(cosine, slot, other_cosine, other_slot);
        }
        if (lane == 0) {
          shared.cosine[dst_thread / kWarp][src] = cosine;
          shared.slot[dst_thread / kWarp][src] = slot;
        }
      }
      __syncthreads();
      if (threadIdx.x < kSrcTile) {
        for (int w = 0; w < kDstWarps; ++w) {
          keep_better(best_cosine, best_slot, shared.cosine[w][threadIdx.x], shared.slot[w][threadIdx.x]);
        }
      }
    }
    const int src = src_first + threadIdx.x;
    if (threadIdx.x < kSrcTile && src < num_src) {
      p.best_slot[image * num_src + src] = best_slot;
      p.best_cosine[image * num_src + src] = best_cosine;
      p.source[image * p.num_tokens + order[p.num_kept + src]] = best_slot;
    }
  }
}

// One warp: the group of slot `slot`, its token first, then what merges into it by rank. The row's loads go out before
// the search for what merges into it.
template <typename T>
__device__ void write_slot(const PruneMergeParams<T>& p, int64_t image, const int* order, int slot) {
  constexpr int kVec = kVector<T>, kUnroll = 2;
  const int lane = threadIdx.x % kWarp;
  const int num_src = p.num_alive - p.num_kept;
  const int* best_slot = p.best_slot + image * num_src;
  const float* best_cosine = p.best_cosine + image * num_src;
  const float* size = p.size ? p.size + image * p.num_tokens : nullptr;
  const T* x = p.x + image * p.x_stride_b;
  T* out = p.x_out + (image * p.num_kept + slot) * p.width;
  const auto load = [&](int token, int64_t column, float (&values)[kUnroll][kVec]) {
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t at = column + u * kWarp * kVec;
      load_vector(x + token * p.x_stride_n + at, p.width - at, p.aligned, values[u]);
    }
  };

  int64_t column = lane * kVec;
  do {  // once even without channels, for the size
    float sum[kUnroll][kVec];
    load(order[slot], column, sum);
    float total = size ? effective_size(size[order[slot]]) : 1.f;
    int count = 1;
    for (int first = 0; first < num_src; first += kWarp) {
      const int src = first + lane;
      unsigned members = __ballot_sync(kAllLanes, src < num_src && best_slot[src] == slot);
      for (; members; members &= members - 1, ++count) {
        const int member = first + __ffs(members) - 1;
        const int token = order[p.num_kept + member];
        float values[kUnroll][kVec];
        load(token, column, values);
        total += (size ? effective_size(size[token]) : 1.f) * (p.similarity_weighted_size ? best_cosine[member] : 1.f);
#pragma unroll
        for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
          for (int i = 0; i < kVec; ++i) sum[u][i] += values[u][i];
        }
      }
    }
    if (column == 0) p.size_out[image * p.num_kept + slot] = effective_size(total);
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (count > 1) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum[u][i] /= static_cast<float>(count);
      }
      const int64_t at = column + u * kWarp * kVec;
      store_vector(out + at, p.width - at, p.aligned, sum[u]);
    }
    column += kUnroll * kWarp * kVec;
  } while (column - lane * kVec < p.width);
}

// That a multiprocessor holds: as many as need no spilling.
template <typename T>
constexpr int kBlocks = sizeof(T) == 4 ? 2 : 3;

template <typename T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) prune_merge_kernel(PruneMergeParams<T> p) {
  const int64_t image = blockIdx.x;
  // Shared: order [N] where it is made here, then keys [N] and, once those are used, the match.
  int* own_order = shared_memory<int>();
  const int* order = p.order ? p.order + image * p.num_tokens : own_order;
  unsigned char* rest = shared_memory<unsigned char>();
  if (!p.order) {
    const int padded = static_cast<int>(ceil_div(p.num_tokens, 4)) * 4;
    rest += padded * sizeof(int);
    uint32_t* keys = reinterpret_cast<uint32_t*>(rest);
    const float* importance = p.importance + image * p.num_tokens;
    const int prefix = p.num_prefix_tokens;
    for (int n = threadIdx.x; n < p.num_tokens; n += kThreads) keys[n] = order_key(importance[n]);
    __syncthreads();
    for (int n = threadIdx.x; n < p.num_tokens; n += kThreads) {
      const int rank = n < prefix ? n : prefix + count_before(keys + prefix, prefix, p.num_tokens - prefix, n, keys[n]);
      own_order[rank] = n;
    }
    __syncthreads();
  }
  for (int rank = threadIdx.x; rank < p.num_tokens; rank += kThreads) {
    const bool merges = rank >= p.num_kept && rank < p.num_alive;
    if (!merges) p.source[image * p.num_tokens + order[rank]] = rank < p.num_kept ? rank : -1;
  }
  if (p.num_kept < p.num_alive) {
    match_tokens(p, image, order, *reinterpret_cast<MatchShared*>(rest));
    __syncthreads();
  }
  for (int slot = threadIdx.x / kWarp; slot < p.num_kept; slot += kWarps) write_slot(p, image, order, slot);
}

// Whether the order must be made by launch_rank: the kernel ranks few enough float keys itself.
inline bool prune_merge_needs_order(int64_t num_tokens) { return num_tokens > kRankTile; }

template <typename T, typename Launch>
void launch_prune_merge(const PruneMergeParams<T>& p, const Launch& launch) {
  const int64_t keys = p.order ? 0 : ceil_div(p.num_tokens, 4) * 16;
  const int64_t match = p.num_kept < p.num_alive ? sizeof(MatchShared) : 0;
  launch(prune_merge_kernel<T>, p.batch, keys + (match > keys ? match : keys), p);
}

}  // namespace tokcomp::cuda
