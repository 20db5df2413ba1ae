// Prune by importance, merge by similarity, of x or of x + branch, and the LayerNorm of what is left. Rows that are
// pruned are never read. Two kernels share the arithmetic below, and so give the same bits:
//   prune_merge_resident.cuh: a cluster holds an image in shared memory; every row is read once, every output written
//   once;
//   prune_merge_streaming.cuh: one block per image, of any size, on any device.
#pragma once

#include "matching.cuh"
#include "prune_merge_plan.cuh"

namespace tokcomp::cuda {

template <typename T>
struct PruneMergeParams {
  const T* x;               // [B, N, C]
  const T* branch;          // [B, N, C] or null
  const float* importance;  // [B, N], resident [B, H, N], whose mean counts; null where `order` is given
  const int* order;         // [B, N]: the token at each rank, or null to rank here
  const float* size;        // [B, N] or null
  const T* weight;          // [C] or null
  const T* bias;            // [C] or null
  T* x_out;                 // [B, M, C]
  T* normalized;            // [B, M, C] or null
  float* size_out;          // [B, M]
  int64_t* source;          // [B, N]
  int* lists;               // [B, 3 (P - M) + M], for MergeLists; streaming with anything to merge
  int64_t x_stride_b, x_stride_n, branch_stride_b, branch_stride_n;
  MergeShape shape;
  MergePlan plan;
  int importance_heads;  // H
  float norm_eps;
  bool similarity_weighted_size, aligned;
};

// What merges into what: source s, the token of rank M + s, into slot best_slot[s]. The sources of a slot are a list in
// the order of ranks, first[slot] and then next[s] of each; -1 ends it.
struct MergeLists {
  int* best_slot;
  float* best_cosine;
  int* next;
  int* first;
};

// A thread's 16-byte piece of a row's slice.
template <typename T>
struct Piece {
  int local;       // its first channel within the slice
  int64_t column;  // and within the row
  int inside;      // how many of its channels exist
  bool stored;     // whether the slice is that wide
  bool aligned;

  __device__ __forceinline__ Piece(const PruneMergeParams<T>& p, int slice) {
    local = threadIdx.x % p.plan.lanes * kVector<T>;
    column = static_cast<int64_t>(slice) * p.plan.width + local;
    stored = local < p.plan.width;
    const int64_t left = p.shape.width - column;
    inside = !stored || left <= 0 ? 0 : left < kVector<T> ? static_cast<int>(left) : kVector<T>;
    aligned = p.aligned;
  }
};

// The channels of a slice that exist.
template <typename T>
__device__ __forceinline__ float slice_channels(const PruneMergeParams<T>& p, int slice) {
  const int64_t left = p.shape.width - static_cast<int64_t>(slice) * p.plan.width;
  return static_cast<float>(left <= 0 ? 0 : left < p.plan.width ? left : p.plan.width);
}

// order [P]: the token at each rank below P, in every block of the cluster; source becomes -1 for the others. Each
// block ranks its share of the tokens, four lanes a token. A block's memory is written once it runs, and not before.
template <typename T, typename Importance>
__device__ void make_order(const PruneMergeParams<T>& p, int64_t image, const Importance& importance_of, int share,
                           int shares, uint32_t* keys, int* order) {
  constexpr int kParts = 4;
  const int count = p.shape.num_tokens, prefix = p.shape.num_prefix_tokens, alive = p.shape.num_alive;
  if (shares > 1) cluster_arrive_relaxed();
  for (int n = threadIdx.x; n < count; n += kThreads) keys[n] = order_key(importance_of(n));
  __syncthreads();
  if (shares > 1) cluster_wait();
  const int each = static_cast<int>(ceil_div(count, shares)), part = threadIdx.x % kParts;
  const int last = min(count, each * (share + 1));
  for (int base = each * share; base < last; base += kThreads / kParts) {
    const int token = base + static_cast<int>(threadIdx.x) / kParts;
    const uint32_t key = keys[min(token, count - 1)];
    int rank = 0;
#pragma unroll 8
    for (int j = prefix + part; j < count; j += kParts) rank += keys[j] + (j < token ? 1 : 0) > key ? 1 : 0;
    rank += __shfl_xor_sync(kAllLanes, rank, 1);
    rank += __shfl_xor_sync(kAllLanes, rank, 2);
    rank = token < prefix ? token : prefix + rank;
    if (token >= last) continue;
    if (rank >= alive) {
      if (part == 0) p.source[image * count + token] = -1;
    } else {
      for (int block = part; block < shares; block += kParts) in_block(order, block)[rank] = token;
    }
  }
}

// rows [count, pitch]: the slice of y = x + branch of each row's token, zeros for -1; what y is of every row also goes
// to `each`. squares [count] += the sums of squares, from 0 in the first slice. A thread has kUnroll rows under way.
template <int kUnroll, typename T, typename Token, typename Each>
__device__ __forceinline__ void load_rows(const PruneMergeParams<T>& p, int64_t image, const Piece<T>& piece, int count,
                                          const Token& token_of, T* rows, float* squares, bool first,
                                          const Each& each) {
  const int groups = kThreads / p.plan.lanes, group = threadIdx.x / p.plan.lanes;
  const int pitch = row_pitch<T>(p.plan.width);
  const T* x = p.x + image * p.x_stride_b + piece.column;
  const T* branch = p.branch ? p.branch + image * p.branch_stride_b + piece.column : nullptr;
  for (int base = 0; base < count; base += groups * kUnroll) {
    uint4 own[kUnroll], more[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = base + u * groups + group;
      const int token = row < count ? token_of(row) : -1;
      const int inside = token >= 0 ? piece.inside : 0;
      own[u] = more[u] = uint4{0, 0, 0, 0};
      if (inside > 0) {
        own[u] = load_raw(x + token * p.x_stride_n, inside, p.aligned);
        if (branch) more[u] = load_raw(branch + token * p.branch_stride_n, inside, p.aligned);
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int row = base + u * groups + group;
      if (branch) own[u] = add_rounded<T>(own[u], more[u]);
      if (row < count && piece.stored) {
        store_shared(rows + row * pitch + piece.local, own[u]);
        each(row, own[u]);
      }
      float values[kVector<T>], sum = 0.f;
      unpack<T>(own[u], values);
#pragma unroll
      for (int i = 0; i < kVector<T>; ++i) sum = fmaf(values[i], values[i], sum);
      sum = group_sum(sum, p.plan.lanes);
      if (row < count && piece.local == 0) squares[row] = (first ? 0.f : squares[row]) + sum;
    }
  }
}

// best_slot to lists, by the whole block, whose threads need not have met since best_slot was written.
__device__ __forceinline__ void link_lists(const MergeShape& shape, const MergeLists& lists) {
  const int sources = shape.num_sources();
  for (int slot = threadIdx.x; slot < shape.num_kept; slot += kThreads) lists.first[slot] = -1;
  __syncthreads();
  for (int s = threadIdx.x; s < sources; s += kThreads) {
    const int slot = lists.best_slot[s];
    int before = s - 1, after = s + 1;
    while (before >= 0 && lists.best_slot[before] != slot) --before;
    while (after < sources && lists.best_slot[after] != slot) ++after;
    lists.next[s] = after < sources ? after : -1;
    if (before < 0) lists.first[slot] = s;
  }
  __syncthreads();
}

// Sizes, and source of the tokens that are left, by this block's share of the image's threads.
template <typename T>
__device__ void write_sizes(const PruneMergeParams<T>& p, int64_t image, int share, int shares, const int* order,
                            const MergeLists& lists) {
  const float* size = p.size ? p.size + image * p.shape.num_tokens : nullptr;
  const int kept = p.shape.num_kept;
  const auto size_of = [&](int rank) { return size ? effective_size(size[order[rank]]) : 1.f; };
  for (int rank = share * kThreads + threadIdx.x; rank < p.shape.num_alive; rank += shares * kThreads) {
    p.source[image * p.shape.num_tokens + order[rank]] = rank < kept ? rank : lists.best_slot[rank - kept];
    if (rank >= kept) continue;
    float total = size_of(rank);
    for (int s = lists.first ? lists.first[rank] : -1; s >= 0; s = lists.next[s]) {
      total = fmaf(size_of(kept + s), p.similarity_weighted_size ? lists.best_cosine[s] : 1.f, total);
    }
    p.size_out[image * kept + rank] = effective_size(total);
  }
}

// The mean of a slot's row and of those that merge into it, in place; read(rank) gives the piece of the row of a rank.
template <typename T, typename Read>
__device__ __forceinline__ void merge_rows(const Read& read, const MergeLists& lists, int first_source, int kept,
                                           uint4& row) {
  float sum[kVector<T>], count = 1.f;
  unpack<T>(row, sum);
  for (int s = first_source; s >= 0; s = lists.next[s]) {
    float values[kVector<T>];
    unpack<T>(read(kept + s), values);
    count += 1.f;
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) sum[i] += values[i];
  }
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) sum[i] /= count;
  row = pack<T>(sum);
}

// Of some channels of a row: their mean, and the sum of the squared distances from it.
struct Moments {
  float mean, squares;

  // As if `more`, of `count` channels, had been among the `before` that these are of.
  __device__ __forceinline__ void add(float before, const Moments& more, float count) {
    if (count == 0.f) return;
    const float both = before + count, delta = more.mean - mean;
    mean = fmaf(delta, count / both, mean);
    squares += fmaf(delta, delta * (before * (count / both)), more.squares);
  }

  // In place of the sum of squares: the inverse standard deviation of a row.
  __device__ __forceinline__ void finish(float channels, float eps) { squares = 1.f / sqrtf(squares / channels + eps); }
};

// Of a row's slice with `channels` channels, from its lanes' pieces.
template <typename T>
__device__ __forceinline__ Moments slice_moments(const uint4& row, const Piece<T>& piece, int lanes, float channels) {
  float values[kVector<T>], sum = 0.f, squares = 0.f;
  unpack<T>(row, values);
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) sum += values[i];
  const float mean = group_sum(sum, lanes) / channels;
#pragma unroll
  for (int i = 0; i < kVector<T>; ++i) {
    const float distance = i < piece.inside ? values[i] - mean : 0.f;
    squares = fmaf(distance, distance, squares);
  }
  return {mean, group_sum(squares, lanes)};
}

// A piece of LayerNorm's weight and bias.
template <typename T>
struct Affine {
  float weight[kVector<T>], bias[kVector<T>];

  __device__ __forceinline__ Affine(const PruneMergeParams<T>& p, const Piece<T>& piece) {
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) weight[i] = 1.f, bias[i] = 0.f;
    if (p.weight && piece.inside) load_vector(p.weight + piece.column, piece.inside, p.aligned, weight);
    if (p.bias && piece.inside) load_vector(p.bias + piece.column, piece.inside, p.aligned, bias);
  }

  // of a row whose moments are finished
  __device__ __forceinline__ uint4 apply(const uint4& row, const Moments& moments) const {
    float values[kVector<T>];
    unpack<T>(row, values);
#pragma unroll
    for (int i = 0; i < kVector<T>; ++i) {
      values[i] = fmaf((values[i] - moments.mean) * moments.squares, weight[i], bias[i]);
    }
    return pack<T>(values);
  }
};

}  // namespace tokcomp::cuda
