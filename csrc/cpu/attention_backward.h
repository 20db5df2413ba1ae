// The backward pass of attention (kMasked = false) and masked_attention (true) on CPU. It recomputes each row; the
// gradients to K and V of one (image, head) grow in memory that its thread owns, so their order of summation is fixed.
#pragma once

#include <tuple>
#include <utility>

#include "attention.h"

namespace tokcomp {

constexpr int64_t kBackwardRows = 48;

// grad_mask: [B, H, N]; token_mask: [B, N]; both undefined where not kMasked.
template <bool kMasked, typename scalar_t>
void attention_backward_heads(const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const KeyBias<acc_type<scalar_t>>& bias, const at::Tensor& token_mask, double scale,
                              double eps, at::Tensor& grad_q, at::Tensor& grad_k, at::Tensor& grad_v,
                              at::Tensor& grad_mask) {
  using acc_t = acc_type<scalar_t>;
  using unit_t = typename UnitOf<scalar_t>::type;
  // Probabilities and gradients are left operands as they stand unless the products take them in another type.
  constexpr bool kInPlace = std::is_same_v<unit_t, acc_t>;
  constexpr int64_t lanes = kLanes<acc_t>;
  const AttentionShape shape(q);
  const int64_t tokens = shape.tokens, width = shape.width, heads = shape.heads;
  const int64_t padded_tokens = round_up(tokens, lanes), padded_width = round_up(width, lanes);
  const int64_t token_vectors = padded_tokens / lanes, width_vectors = padded_width / lanes;
  const int64_t grad_rows = round_up(tokens, kTileRows);
  const int64_t width_units = units<unit_t>(width), token_units = units<unit_t>(tokens);
  constexpr int64_t kBlockUnits = kBackwardRows / UnitTraits<unit_t>::kElements;
  // A tile of keys may reach kTileRows - 1 beyond the last row's end.
  const int64_t block = kBackwardRows * padded_tokens, by_key_block = kBlockUnits * padded_tokens;

  at::parallel_for(0, shape.batch * heads, 1, [&](int64_t begin, int64_t end) {
    const Scratch<unit_t> keys(width_units * padded_tokens), values(width_units * padded_tokens);
    const Scratch<unit_t> key_rows(token_units * padded_width);
    const Scratch<unit_t> left(kBackwardRows * width_units), right(kBlockUnits * padded_width);
    const Scratch<acc_t> scores(block + kTileRows), grads(block + kTileRows);
    const Scratch<unit_t> rounded_grads(kInPlace ? 0 : block / UnitTraits<unit_t>::kElements);
    const Scratch<unit_t> rounded_by_key(kInPlace ? 0 : by_key_block + kTileRows);
    const Scratch<unit_t> rounded_grads_by_key(kInPlace ? 0 : by_key_block + kTileRows);
    const Scratch<acc_t> maxima(kBackwardRows * lanes), products(kBackwardRows * padded_width);
    const Scratch<acc_t> key_grads(grad_rows * padded_width), value_grads(grad_rows * padded_width);
    const Scratch<acc_t> mask_grads(padded_tokens);
    RowMask<acc_t> mask(kMasked ? tokens : 0);
    if constexpr (kInPlace) {
      std::fill_n(scores.get() + block, kTileRows, acc_t(0));
      std::fill_n(grads.get() + block, kTileRows, acc_t(0));
    } else {
      std::fill_n(rounded_grads.get(), block / UnitTraits<unit_t>::kElements, unit_t{});
      std::fill_n(rounded_by_key.get() + by_key_block, kTileRows, unit_t{});
      std::fill_n(rounded_grads_by_key.get() + by_key_block, kTileRows, unit_t{});
    }

    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / heads, head = task % heads;
      const Rows<scalar_t> k_rows = head_rows<scalar_t>(k, image, head), v_rows = head_rows<scalar_t>(v, image, head);
      const Rows<scalar_t> q_rows = head_rows<scalar_t>(q, image, head);
      const Rows<scalar_t> out_rows = head_rows<scalar_t>(grad_out, image, head);
      pack_right_transposed(k_rows, tokens, width, keys.get());
      pack_right_transposed(v_rows, tokens, width, values.get());
      pack_right(k_rows, 0, tokens, width, key_rows.get());
      std::fill_n(key_grads.get(), grad_rows * padded_width, acc_t(0));
      std::fill_n(value_grads.get(), grad_rows * padded_width, acc_t(0));
      if (kMasked) {
        mask.set_image(token_mask.const_data_ptr<acc_t>() + image * tokens);
        std::fill_n(mask_grads.get(), padded_tokens, acc_t(0));
      }

      for (int64_t first = 0; first < tokens; first += kBackwardRows) {
        const int64_t rows = std::min(kBackwardRows, tokens - first), row_units = units<unit_t>(rows);
        pack_left(q_rows, first, rows, width, left.get());
        score_block(left.get(), rows, keys.get(), token_vectors, width_units, acc_t(scale), bias[image], scores.get(),
                    padded_tokens, maxima.get());
        pack_left(out_rows, first, rows, width, left.get());
        gemm(left.get(), width_units, 1, rows, values.get(), token_vectors, width_units,
             StoreTo<acc_t>{grads.get(), padded_tokens});
        for (int64_t row = 0; row < rows; ++row) {
          if (kMasked) mask.enter_row(first + row);
          softmax_backward_row<kMasked>(scores.get() + row * padded_tokens, grads.get() + row * padded_tokens,
                                        row_maximum<kMasked>(maxima.get(), row), tokens, mask, acc_t(eps),
                                        mask_grads.get(), first + row);
          if (kMasked) mask.leave_row(first + row);
        }
        // The left operands of grad_q = dS K, grad_v += P^T grad_out and grad_k += dS^T q; of the last two, what is
        // one step further is one query further.
        const unit_t *grad_lefts, *by_key, *grads_by_key;
        if constexpr (kInPlace) {
          grad_lefts = grads_by_key = grads.get();
          by_key = scores.get();
        } else {
          round_rows(grads.get(), rows, padded_tokens, rounded_grads.get());
          round_columns(scores.get(), rows, padded_tokens, rounded_by_key.get());
          round_columns(grads.get(), rows, padded_tokens, rounded_grads_by_key.get());
          grad_lefts = rounded_grads.get();
          by_key = rounded_by_key.get();
          grads_by_key = rounded_grads_by_key.get();
        }
        gemm(grad_lefts, padded_tokens / UnitTraits<unit_t>::kElements, 1, rows, key_rows.get(), width_vectors,
             token_units, StoreTo<acc_t>{products.get(), padded_width});
        scalar_t* q_grads = grad_q.mutable_data_ptr<scalar_t>() + (task * tokens + first) * width;
        for (int64_t row = 0; row < rows; ++row) {
          store_row(products.get() + row * padded_width, acc_t(scale), q_grads + row * width, width);
        }
        pack_right(out_rows, first, rows, width, right.get());
        gemm(by_key, 1, padded_tokens, tokens, right.get(), width_vectors, row_units,
             AddTo<acc_t>{value_grads.get(), padded_width});
        pack_right(q_rows, first, rows, width, right.get());
        gemm(grads_by_key, 1, padded_tokens, tokens, right.get(), width_vectors, row_units,
             AddTo<acc_t>{key_grads.get(), padded_width});
      }
      for (int64_t j = 0; j < tokens; ++j) {
        const int64_t at = (task * tokens + j) * width;
        store_row(key_grads.get() + j * padded_width, acc_t(scale), grad_k.mutable_data_ptr<scalar_t>() + at, width);
        store_row(value_grads.get() + j * padded_width, acc_t(1), grad_v.mutable_data_ptr<scalar_t>() + at, width);
      }
      if (kMasked) std::copy_n(mask_grads.get(), tokens, grad_mask.mutable_data_ptr<acc_t>() + task * tokens);
    }
  });
}

// grad_q, grad_k, grad_v [B, H, N, D], contiguous; grad_token_mask [B, N] in the accumulate type, undefined where not
// kMasked.
template <bool kMasked>
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor> attention_backward(
    const at::Tensor& grad_out, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
    const at::Tensor& token_mask, const std::optional<at::Tensor>& size, std::optional<double> scale, double eps) {
  const AttentionShape shape(q);
  const at::TensorOptions acc_options = q.options().dtype(acc_scalar_type(q.scalar_type()));
  at::Tensor grad_q = at::empty(q.sizes(), q.options());
  at::Tensor grad_k = at::empty(q.sizes(), q.options());
  at::Tensor grad_v = at::empty(q.sizes(), q.options());
  at::Tensor head_mask_grads, grad_token_mask, mask;
  if (kMasked) {
    head_mask_grads = at::empty({shape.batch, shape.heads, shape.tokens}, acc_options);
    grad_token_mask = at::empty({shape.batch, shape.tokens}, acc_options);
    mask = per_token_acc(token_mask, q);
  }
  TOKCOMP_DISPATCH_CPU(q.scalar_type(), "attention_backward", [&] {
    using acc_t = acc_type<scalar_t>;
    const KeyBias<acc_t> bias(size, shape.batch, shape.tokens);
    attention_backward_heads<kMasked, scalar_t>(
        with_contiguous_rows(grad_out), with_contiguous_rows(q), with_contiguous_rows(k), with_contiguous_rows(v), bias,
        mask, score_scale(scale, shape.width), eps, grad_q, grad_k, grad_v, head_mask_grads);
    if (kMasked) add_heads<acc_t>(head_mask_grads, acc_t(1), grad_token_mask);
  });
  return {grad_q, grad_k, grad_v, grad_token_mask};
}

}  // namespace tokcomp
