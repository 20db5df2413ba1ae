// The rows of a softmax on CPU, plain and under a token mask, forward and backward, for whole score tensors and for the
// blocks of attention.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include <utility>

#include "vector.h"

namespace tokcomp {

constexpr double kLog2E = 1.4426950408889634;

// exp(score - row maximum) of the keys of one row; inside() is 0 in the lanes beyond the last key.
template <typename acc_t>
class RowExp {
 public:
  RowExp(acc_t row_max, int64_t tokens)
      : last_((tokens - 1) / kLanes<acc_t>),
        row_max_(row_max),
        last_lanes_(first_lanes<acc_t>(tokens - last_ * kLanes<acc_t>)) {}
  TOKCOMP_INLINE Vec<acc_t> inside(const Vec<acc_t>& values, int64_t v) const {
    return v == last_ ? values & last_lanes_ : values;
  }
  TOKCOMP_INLINE Vec<acc_t> operator()(const Vec<acc_t>& scores, int64_t v) const {
    return inside(exp2_nonpositive<acc_t>((scores - row_max_) * Vec<acc_t>(acc_t(kLog2E))), v);
  }

 private:
  int64_t last_;
  Vec<acc_t> row_max_, last_lanes_;
};

template <bool kMasked, typename acc_t>
TOKCOMP_INLINE acc_t row_maximum(const acc_t* maxima, int64_t row) {
  const acc_t maximum = reduce_max(Vec<acc_t>::loadu(maxima + row * kLanes<acc_t>));
  return kMasked && maximum == -std::numeric_limits<acc_t>::infinity() ? acc_t(0) : maximum;
}

// The mask of one image as its rows see it: row i sees 1 at key i. Zero beyond the last key.
template <typename acc_t>
class RowMask {
 public:
  explicit RowMask(int64_t tokens) : tokens_(tokens), values_(round_up(tokens, kLanes<acc_t>)) {}
  void set_image(const acc_t* mask) {
    std::copy_n(mask, tokens_, values_.get());
    std::fill(values_.get() + tokens_, values_.get() + round_up(tokens_, kLanes<acc_t>), acc_t(0));
  }
  void enter_row(int64_t row) { outside_ = std::exchange(values_.get()[row], acc_t(1)); }
  void leave_row(int64_t row) { values_.get()[row] = outside_; }
  TOKCOMP_INLINE Vec<acc_t> operator[](int64_t v) const { return Vec<acc_t>::loadu(values_.get() + v * kLanes<acc_t>); }

 private:
  int64_t tokens_;
  Scratch<acc_t> values_;
  acc_t outside_ = 0;
};

// Probabilities of one row before the division by the sum that is returned, written as left operand of the product with
// V.
template <bool kMasked, typename acc_t, typename left_t>
inline acc_t softmax_row(const acc_t* scores, acc_t row_max, int64_t tokens, const RowMask<acc_t>& mask, acc_t eps,
                         left_t* probabilities) {
  constexpr int64_t lanes = kLanes<acc_t>;
  const RowExp<acc_t> row_exp(row_max, tokens);
  const Vec<acc_t> floor(eps / acc_t(tokens));
  Vec<acc_t> sum(acc_t(0));
  for (int64_t v = 0; v * lanes < tokens; ++v) {
    Vec<acc_t> e = row_exp(Vec<acc_t>::loadu(scores + v * lanes), v);
    if constexpr (kMasked) e = e * mask[v];
    sum = sum + e;
    if constexpr (kMasked) e = e + floor;
    if constexpr (std::is_same_v<left_t, acc_t>) {
      e.store(probabilities + v * lanes);
    } else {
#ifdef TOKCOMP_BFLOAT16_PAIRS
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(probabilities + v * lanes), (__m256i)_mm512_cvtneps_pbh(e));
#endif
    }
  }
  return reduce_add(sum) + (kMasked ? eps : acc_t(0));
}

// One row: scores become probabilities P, and the gradient to P becomes the gradient to the scores.
// grad_mask [N]: what this row adds to the gradient of the mask, all keys but the row's own.
template <bool kMasked, typename acc_t>
inline void softmax_backward_row(acc_t* scores, acc_t* grad, acc_t row_max, int64_t tokens, const RowMask<acc_t>& mask,
                                 acc_t eps, acc_t* grad_mask, int64_t own_key) {
  using V = Vec<acc_t>;
  constexpr int64_t lanes = kLanes<acc_t>;
  const RowExp<acc_t> row_exp(row_max, tokens);
  const int64_t vectors = (tokens + lanes - 1) / lanes;
  V total_lanes(acc_t(0)), dot(acc_t(0));
  for (int64_t v = 0; v < vectors; ++v) {
    const V e = row_exp(V::loadu(scores + v * lanes), v);
    const V masked = kMasked ? e * mask[v] : e;
    e.store(scores + v * lanes);
    total_lanes = total_lanes + masked;
    if constexpr (!kMasked) dot = at::vec::fmadd(masked, V::loadu(grad + v * lanes), dot);
  }
  const acc_t floor = kMasked ? eps / acc_t(tokens) : acc_t(0);
  const acc_t total = reduce_add(total_lanes) + (kMasked ? eps : acc_t(0));
  const acc_t inverse = acc_t(1) / total;
  if constexpr (kMasked) {
    // A true division: a row that sees one key has the probability 1, and its gradient cancels exactly.
    for (int64_t v = 0; v < vectors; ++v) {
      const V probability = (V::loadu(scores + v * lanes) * mask[v] + V(floor)) / V(total);
      dot = at::vec::fmadd(probability, row_exp.inside(V::loadu(grad + v * lanes), v), dot);
    }
  }
  const acc_t mean = kMasked ? reduce_add(dot) : reduce_add(dot) * inverse;

  const acc_t own_grad = kMasked ? grad_mask[own_key] : acc_t(0);
  for (int64_t v = 0; v < vectors; ++v) {
    const V e = V::loadu(scores + v * lanes);
    const V masked = kMasked ? e * mask[v] : e;
    const V grad_masked = (V::loadu(grad + v * lanes) - V(mean)) * V(inverse);
    (kMasked ? (masked + V(floor)) * V(inverse) : masked * V(inverse)).store(scores + v * lanes);
    (masked * grad_masked).store(grad + v * lanes);
    if constexpr (kMasked) at::vec::fmadd(e, grad_masked, V::loadu(grad_mask + v * lanes)).store(grad_mask + v * lanes);
  }
  if constexpr (kMasked) grad_mask[own_key] = own_grad;
}

// to [B, N]: the sum over heads of from [B, H, N], in the order of the heads, over `divisor`.
template <typename acc_t>
inline void add_heads(const at::Tensor& from, acc_t divisor, at::Tensor& to) {
  const int64_t heads = from.size(1), tokens = from.size(2);
  const acc_t* rows = from.const_data_ptr<acc_t>();
  acc_t* sums = to.mutable_data_ptr<acc_t>();
  at::parallel_for(0, from.size(0), 16, [&](int64_t begin, int64_t end) {
    for (int64_t image = begin; image < end; ++image) {
      acc_t* sum = sums + image * tokens;
      std::fill(sum, sum + tokens, acc_t(0));
      for (int64_t head = 0; head < heads; ++head) {
        const acc_t* row = rows + (image * heads + head) * tokens;
        for (int64_t j = 0; j < tokens; ++j) sum[j] += row[j];
      }
      for (int64_t j = 0; j < tokens; ++j) sum[j] /= divisor;
    }
  });
}

}  // namespace tokcomp
