// attention forward in half precision: what its two kernels share. A warp takes 16 queries; q k^T and the product of
// the probabilities with v are on tensor cores, scores and sums are float32 in the registers that the products leave
// them in: lane l has rows l / 4 and l / 4 + 8 of a tile of 16 x 8, columns l % 4 * 2 and the next.
#pragma once

#include "matrices.cuh"

namespace tokcomp::cuda {

constexpr int kAttentionThreads = 128;
constexpr int kAttentionWarps = kAttentionThreads / kWarp;
constexpr int kTile = 16;                             // queries of a warp, and keys of a step of the products
constexpr int kRowsAtOnce = kAttentionWarps * kTile;  // queries of a block's warps
constexpr int kHeldSteps = 4;                         // of keys, whose scores a warp holds at a time
constexpr int kHeldKeys = kHeldSteps * kTile;
constexpr int kWidest = 80;  // numbers of a head

template <typename T>
struct AttentionParams {
  const T* q;         // [B, H, N, D]
  const T* k;         // [B, H, N, D]
  const T* v;         // [B, H, N, D]
  const float* size;  // [B, N] or null
  T* out;             // [B, N, H, D]
  float* cls;         // [B, H, N]: row 0 of each head's softmax
  int64_t q_stride_b, q_stride_h, q_stride_n, k_stride_b, k_stride_h, k_stride_n, v_stride_b, v_stride_h, v_stride_n;
  int64_t batch;
  int num_heads, num_tokens;
  int width;    // a multiple of 8, and every row on 16 bytes
  float scale;  // times log2(e): powers are of 2
};

// Rows of kWidth elements in shared memory. The same piece of 16 bytes of eight neighbouring rows must lie in different
// banks: rows of an odd number of pieces, or of eight whose places are mixed by the row.
template <int kWidth>
struct Rows {
  static constexpr int kPieces = kWidth / 8;
  static constexpr bool kMixed = kPieces % 8 == 0;
  static constexpr int kPitch = kMixed ? kWidth : (kPieces | 1) * 8;

  static __device__ __forceinline__ int at(int row, int piece) {
    return row * kPitch + (kMixed ? piece ^ (row & 7) : piece) * 8;
  }
};

// Where a lane reads four matrices of 8 x 8 from: the addresses of each two neighbouring pieces of the first 16 rows of
// shared memory, of which later rows are a constant away. Matrices 0 and 1 are the two pieces of rows 0 to 7, 2 and 3
// of rows 8 to 15.
template <typename T, int kWidth>
struct Lane {
  static constexpr int kBytes = Rows<kWidth>::kPitch * static_cast<int>(sizeof(T));  // of a row

  SharedAddress pieces[Rows<kWidth>::kPieces / 2];

  __device__ __forceinline__ explicit Lane(const T* first) {
    const int lane = threadIdx.x % kWarp, row = lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int i = 0; i < Rows<kWidth>::kPieces / 2; ++i) {
      pieces[i] = shared_address(first + Rows<kWidth>::at(row, i * 2 + lane / 8 % 2));
    }
  }
};

// The head that a block works on.
template <typename T>
struct Head {
  int64_t image;
  const T *q, *k, *v;
  T* out;
  float* cls;

  __device__ __forceinline__ Head(const AttentionParams<T>& p, int64_t image_head) {
    image = image_head / p.num_heads;
    const int64_t head = image_head % p.num_heads;
    q = p.q + image * p.q_stride_b + head * p.q_stride_h;
    k = p.k + image * p.k_stride_b + head * p.k_stride_h;
    v = p.v + image * p.v_stride_b + head * p.v_stride_h;
    out = p.out + (image * p.num_tokens * p.num_heads + head) * p.width;
    cls = p.cls + image_head * p.num_tokens;
  }
};

// to `rows` rows of shared memory: the rows from `from` on, of which `count` exist; zeros for the others, and beyond D.
template <int kWidth, typename T>
__device__ __forceinline__ void start_rows(const AttentionParams<T>& p, const T* from, int64_t stride, int count,
                                           int rows, T* to) {
  constexpr int kPieces = Rows<kWidth>::kPieces;
#pragma unroll 1  // addresses of rows to come would take the registers of the scores
  for (int i = threadIdx.x; i < rows * kPieces; i += kAttentionThreads) {
    const int row = i / kPieces, piece = i % kPieces;
    const bool exists = row < count && piece * 8 < p.width;
    copy_async(to + Rows<kWidth>::at(row, piece), exists ? from + row * stride + piece * 8 : from, exists);
  }
}

// to [rows]: log2 of the sizes of the keys from `key` on; -inf for those that do not exist.
template <typename T>
__device__ __forceinline__ void load_bias(const AttentionParams<T>& p, int64_t image, int key, int rows, float* to) {
  for (int n = threadIdx.x; n < rows; n += kAttentionThreads) {
    const bool exists = key + n < p.num_tokens;
    const float size = exists && p.size ? p.size[image * p.num_tokens + key + n] : 1.f;
    to[n] = exists ? log2f(effective_size(size)) : -INFINITY;
  }
}

// 16 queries as the products take them. A lane loads whole pieces of two rows, 4 * g + l % 4 of group g, which four
// lanes then deal out among themselves.
template <typename T, int kWidth>
struct Queries {
  static constexpr int kPieces = Rows<kWidth>::kPieces;
  static constexpr int kGroups = (kPieces + 3) / 4;

  uint32_t words[2][kGroups][4];

  __device__ __forceinline__ void load(const AttentionParams<T>& p, const T* q, int row) {
    const int lane = threadIdx.x % kWarp;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = row + lane / 4 + half * 8;
#pragma unroll
      for (int g = 0; g < kGroups; ++g) {
        const int channel = (g * 4 + lane % 4) * 8;
        uint4 raw{0, 0, 0, 0};
        if (own < p.num_tokens && channel < p.width) {
          raw = *reinterpret_cast<const uint4*>(q + own * p.q_stride_n + channel);
        }
        memcpy(words[half][g], &raw, sizeof(raw));
      }
    }
  }

  __device__ __forceinline__ void deal() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int g = 0; g < kGroups; ++g) transpose_quad(words[half][g]);
    }
  }

  // sums [2][4] = products with the 16 keys that are `offset` bytes from the lane's: two tiles of 16 x 8
  __device__ __forceinline__ void multiply(const Lane<T, kWidth>& lane, int offset, float (&sums)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) sums[i / 4][i % 4] = 0.f;
#pragma unroll
    for (int piece = 0; piece < kPieces; piece += 2) {
      const int g = piece / 4, i = piece % 4;
      const uint32_t a[4] = {words[0][g][i], words[1][g][i], words[0][g][i + 1], words[1][g][i + 1]};
      uint32_t b[4];
      load_matrices(lane.pieces[piece / 2] + offset, b);
      multiply_add(T(), sums[0], a, b[0], b[1]);
      multiply_add(T(), sums[1], a, b[2], b[3]);
    }
  }
};

// Products to scores, and the largest of each of a lane's two rows; bias [16] of these keys.
__device__ __forceinline__ void finish_scores(float (&sums)[2][4], const float* bias, float scale,
                                              float (&largest)[2]) {
  const int column = threadIdx.x % 4 * 2;
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const float2 more = *reinterpret_cast<const float2*>(bias + j * 8 + column);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sums[j][i] = fmaf(sums[j][i], scale, i % 2 ? more.y : more.x);
      largest[i / 2] = fmaxf(largest[i / 2], sums[j][i]);
    }
  }
}

// Scores to powers, which are also added to the sums of a lane's two rows.
__device__ __forceinline__ void finish_powers(float (&scores)[2][4], const float (&subtract)[2], float (&sums)[2]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float& score = scores[i / 4][i % 4];
    score = power_of_2(score - subtract[i % 4 / 2]);
    sums[i % 4 / 2] += score;
  }
}

// A tile of 16 x 16 powers as the next product takes them.
template <typename T>
__device__ __forceinline__ void to_weights(const float (&powers)[2][4], uint32_t (&weights)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    weights[i] = pack_pair(T(), powers[i / 2][i % 2 * 2], powers[i / 2][i % 2 * 2 + 1]);
  }
}

__device__ __forceinline__ float quad_max(float value) {
  value = fmaxf(value, __shfl_xor_sync(kAllLanes, value, 1));
  return fmaxf(value, __shfl_xor_sync(kAllLanes, value, 2));
}

// 16 rows of the output.
template <typename T, int kWidth>
struct Output {
  static constexpr int kPieces = Rows<kWidth>::kPieces;

  float sums[kPieces][4] = {};

  // += weights [16, 16] times the values of 16 keys, `offset` bytes from the lane's
  __device__ __forceinline__ void add(const uint32_t (&weights)[4], const Lane<T, kWidth>& lane, int offset) {
#pragma unroll
    for (int piece = 0; piece < kPieces; piece += 2) {
      uint32_t b[4];
      load_transposed(lane.pieces[piece / 2] + offset, b);
      multiply_add(T(), sums[piece], weights, b[0], b[2]);
      multiply_add(T(), sums[piece + 1], weights, b[1], b[3]);
    }
  }

  __device__ __forceinline__ void multiply(const float (&factors)[2]) {
#pragma unroll
    for (int i = 0; i < kPieces * 4; ++i) sums[i / 4][i % 4] *= factors[i % 4 / 2];
  }

  // Each of four lanes gets whole pieces of a row from the others, and stores 16 bytes at a time.
  __device__ __forceinline__ void store(const AttentionParams<T>& p, T* out, int row) const {
    const int lane = threadIdx.x % kWarp;
    const int64_t stride = static_cast<int64_t>(p.num_heads) * p.width;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int own = row + lane / 4 + half * 8;
#pragma unroll
      for (int first = 0; first < kPieces; first += 4) {
        uint32_t words[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          words[i] = first + i < kPieces ? pack_pair(T(), sums[(first + i) % kPieces][half * 2],
                                                     sums[(first + i) % kPieces][half * 2 + 1])
                                         : 0;
        }
        transpose_quad(words);
        const int channel = (first + lane % 4) * 8;
        if (own < p.num_tokens && channel < p.width) {
          *reinterpret_cast<uint4*>(out + own * stride + channel) = uint4{words[0], words[1], words[2], words[3]};
        }
      }
    }
  }
};

// 16 rows of the softmax over keys that come 64 at a time, their scores in registers: what larger scores that come
// later make of the earlier powers is one factor a row.
template <typename T, int kWidth>
struct Softmax {
  float largest[2] = {-INFINITY, -INFINITY}, sums[2] = {0.f, 0.f};  // sums: of the lane's own columns

  // Keys `offset` bytes from the lane's, and their values `values` bytes behind them; `steps` of 16 are there.
  // Scores of row 0 go to `cls` (or null) [`count` keys], by the four lanes that hold them.
  __device__ __forceinline__ void add(const Queries<T, kWidth>& queries, const Lane<T, kWidth>& lane, int offset,
                                      int values, const float* bias, float scale, int steps, Output<T, kWidth>& out,
                                      float* cls, int count) {
    constexpr int kStep = kTile * Lane<T, kWidth>::kBytes;
    float scores[kHeldSteps][2][4], subtract[2], decay[2], larger[2] = {largest[0], largest[1]};
#pragma unroll
    for (int i = 0; i < kHeldSteps; ++i) {
      if (i < steps) {
        queries.multiply(lane, offset + i * kStep, scores[i]);
        finish_scores(scores[i], bias + i * kTile, scale, larger);
      }
    }
    if (cls && threadIdx.x % kWarp < 4) {
#pragma unroll
      for (int i = 0; i < kHeldSteps * 4; ++i) {
        const int n = i / 4 * kTile + i % 4 / 2 * 8 + threadIdx.x % 4 * 2 + i % 2;
        if (n < count) cls[n] = scores[i / 4][i % 4 / 2][i % 2];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      larger[half] = quad_max(larger[half]);
      subtract[half] = finite_max(larger[half]);
      decay[half] = power_of_2(largest[half] - subtract[half]);
      largest[half] = larger[half];
      sums[half] *= decay[half];
    }
    out.multiply(decay);
#pragma unroll
    for (int i = 0; i < kHeldSteps; ++i) {
      if (i < steps) {
        uint32_t weights[4];
        finish_powers(scores[i], subtract, sums);
        to_weights<T>(scores[i], weights);
        out.add(weights, lane, offset + values + i * kStep);
      }
    }
  }

  // Divides by the sums and stores; the scores of row 0 [N] become its probabilities.
  __device__ __forceinline__ void finish(const AttentionParams<T>& p, const Head<T>& head, int row,
                                         Output<T, kWidth>& out) const {
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) inverse[half] = 1.f / group_sum(sums[half], 4);
    out.multiply(inverse);
    out.store(p, head.out, row);
    if (row > 0) return;
    const float subtract = finite_max(__shfl_sync(kAllLanes, largest[0], 0));
    const float factor = __shfl_sync(kAllLanes, inverse[0], 0);
    __syncwarp();
#pragma unroll 4
    for (int n = threadIdx.x % kWarp; n < p.num_tokens; n += kWarp) {
      head.cls[n] = power_of_2(head.cls[n] - subtract) * factor;
    }
  }
};

}  // namespace tokcomp::cuda
