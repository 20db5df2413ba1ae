// What attention and masked_attention share on CPU: a block of query rows of one (image, head) against all of its keys.
//
// One thread owns one (image, head) at a time. It packs K and V once, then goes through the queries in blocks small
// enough that a block's scores stay in cache; no more of the [B, H, N, N] map ever exists. Every row's arithmetic is
// the same whatever block, batch or thread it falls in.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <optional>

#include "gemm.h"
#include "softmax.h"

namespace tokcomp {

constexpr int64_t kBlockRows = 24;

struct AttentionShape {
  int64_t batch, heads, tokens, width;
  explicit AttentionShape(const at::Tensor& q)
      : batch(q.size(0)), heads(q.size(1)), tokens(q.size(2)), width(q.size(3)) {}
};

// The tensor itself where its last dimension is contiguous, else a copy for which that holds.
inline at::Tensor with_contiguous_rows(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

// tensor: [B, H, N, D]
template <typename scalar_t>
inline Rows<scalar_t> head_rows(const at::Tensor& tensor, int64_t image, int64_t head) {
  return {tensor.const_data_ptr<scalar_t>() + image * tensor.stride(0) + head * tensor.stride(1), tensor.stride(2)};
}

inline double score_scale(std::optional<double> scale, int64_t width) {
  return scale.has_value() ? *scale : 1.0 / std::sqrt(static_cast<double>(width));
}

// What is added to a key's scores: log of its size, and -inf to the lanes beyond the last key. [B or 1, padded]
template <typename acc_t>
class KeyBias {
 public:
  KeyBias(const std::optional<at::Tensor>& size, int64_t batch, int64_t tokens)
      : padded_(round_up(tokens, kLanes<acc_t>)),
        image_stride_(size.has_value() ? padded_ : 0),
        bias_((size.has_value() ? std::max<int64_t>(batch, 1) : 1) * padded_) {
    constexpr int64_t lanes = kLanes<acc_t>;
    constexpr at::ScalarType kType = c10::CppTypeToScalarType<acc_t>::value;
    const at::Tensor sizes = size.has_value() ? size->to(kType).contiguous() : at::Tensor();
    for (int64_t image = 0; image < (size.has_value() ? batch : 1); ++image) {
      acc_t* row = bias_.get() + image * padded_;
      std::fill(row, row + padded_, acc_t(0));
      if (size.has_value()) {
        const acc_t* from = sizes.const_data_ptr<acc_t>() + image * tokens;
        for (int64_t j = 0; j < tokens; ++j) row[j] = effective_size(from[j]);
        for (int64_t j = 0; j < padded_; j += lanes) Vec<acc_t>::loadu(row + j).log().store(row + j);
      }
      std::fill(row + tokens, row + padded_, -std::numeric_limits<acc_t>::infinity());
    }
  }
  const acc_t* operator[](int64_t image) const { return bias_.get() + image * image_stride_; }

 private:
  int64_t padded_, image_stride_;
  Scratch<acc_t> bias_;
};

// A store for gemm: scores from products, and each row's maximum so far, lane by lane.
template <typename acc_t>
struct ScoreStore {
  acc_t* scores;
  int64_t stride;
  const acc_t* bias;
  acc_t* maxima;
  Vec<acc_t> scale;
  template <size_t kVectors>
  TOKCOMP_INLINE void operator()(int64_t row, int64_t first, const Vec<acc_t> (&sums)[kVectors]) const {
    constexpr int64_t lanes = kLanes<acc_t>;
    Vec<acc_t> maximum = Vec<acc_t>::loadu(maxima + row * lanes);
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) {
      const Vec<acc_t> score = at::vec::fmadd(sums[v], scale, Vec<acc_t>::loadu(bias + (first + v) * lanes));
      score.store(scores + row * stride + (first + v) * lanes);
      maximum = max_ignoring_nan(score, maximum);
    }
    maximum.store(maxima + row * lanes);
  }
};

// scores[row][key] = q k^T * scale + bias for a block of rows, and each row's maximum over the keys, lane by lane.
// queries: pack_left's rows; keys: pack_right_transposed's panels; scores: [kBlockRows, stride]; maxima: [kBlockRows,
// lanes].
template <typename unit_t, typename acc_t>
inline void score_block(const unit_t* queries, int64_t rows, const unit_t* keys, int64_t num_key_vectors, int64_t depth,
                        acc_t scale, const acc_t* bias, acc_t* scores, int64_t stride, acc_t* maxima) {
  constexpr int64_t lanes = kLanes<acc_t>;
  std::fill(maxima, maxima + round_up(rows, kTileRows) * lanes, -std::numeric_limits<acc_t>::infinity());
  gemm(queries, depth, 1, rows, keys, num_key_vectors, depth,
       ScoreStore<acc_t>{scores, stride, bias, maxima, Vec<acc_t>(scale)});
}

}  // namespace tokcomp
