// The forward pass of attention (kMasked = false) and masked_attention (true) on CPU.
#pragma once

#include <tuple>
#include <utility>

#include "attention.h"
#include "attention_tiles.h"

namespace tokcomp {

// first_rows: [B, H, N]; out: [B, N, H, D]; mask: [B, N] or undefined.
template <bool kMasked, typename scalar_t>
void attention_forward_heads(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const KeyBias<acc_type<scalar_t>>& bias, const at::Tensor& token_mask, double scale,
                             double eps, scalar_t* out, acc_type<scalar_t>* first_rows) {
  using acc_t = acc_type<scalar_t>;
  using unit_t = typename UnitOf<scalar_t>::type;
  // Probabilities overwrite the scores unless the product takes them in another type.
  constexpr bool kInPlace = std::is_same_v<unit_t, acc_t>;
  using left_t = std::conditional_t<kInPlace, acc_t, at::BFloat16>;
  constexpr int64_t lanes = kLanes<acc_t>;
  const AttentionShape shape(q);
  const int64_t tokens = shape.tokens, width = shape.width, heads = shape.heads;
  const int64_t padded_tokens = round_up(tokens, lanes), padded_width = round_up(width, lanes);
  const int64_t depth = units<unit_t>(width);

  at::parallel_for(0, shape.batch * heads, 1, [&](int64_t begin, int64_t end) {
    const Scratch<unit_t> keys(depth * padded_tokens), values(units<unit_t>(tokens) * padded_width);
    const Scratch<unit_t> queries(kBlockRows * depth);
    const Scratch<acc_t> scores(kBlockRows * padded_tokens), maxima(kBlockRows * lanes);
    const Scratch<acc_t> products(kBlockRows * padded_width);
    const Scratch<left_t> separate(kInPlace ? 0 : kBlockRows * padded_tokens);
    left_t* probabilities = kInPlace ? reinterpret_cast<left_t*>(scores.get()) : separate.get();
    RowMask<acc_t> mask(kMasked ? tokens : 0);

    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / heads, head = task % heads;
      pack_right_transposed(head_rows<scalar_t>(k, image, head), tokens, width, keys.get());
      pack_right(head_rows<scalar_t>(v, image, head), 0, tokens, width, values.get());
      if (kMasked) mask.set_image(token_mask.const_data_ptr<acc_t>() + image * tokens);
      const Rows<scalar_t> query_rows = head_rows<scalar_t>(q, image, head);

      for (int64_t first = 0; first < tokens; first += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, tokens - first);
        pack_left(query_rows, first, rows, width, queries.get());
        score_block(queries.get(), rows, keys.get(), padded_tokens / lanes, depth, acc_t(scale), bias[image],
                    scores.get(), padded_tokens, maxima.get());
        acc_t sums[kBlockRows];
        for (int64_t row = 0; row < rows; ++row) {
          if (kMasked) mask.enter_row(first + row);
          sums[row] = softmax_row<kMasked>(scores.get() + row * padded_tokens, row_maximum<kMasked>(maxima.get(), row),
                                           tokens, mask, acc_t(eps), probabilities + row * padded_tokens);
          if (first + row == 0) {
            // The scores are still there where the probabilities were rounded.
            if constexpr (!kInPlace) {
              softmax_row<kMasked>(scores.get(), row_maximum<kMasked>(maxima.get(), 0), tokens, mask, acc_t(eps),
                                   scores.get());
            }
            store_row(scores.get(), acc_t(1) / sums[0], first_rows + task * tokens, tokens);
          }
          if (kMasked) mask.leave_row(first + row);
        }
        gemm(reinterpret_cast<const unit_t*>(probabilities), padded_tokens / UnitTraits<unit_t>::kElements, 1, rows,
             values.get(), padded_width / lanes, units<unit_t>(tokens), StoreTo<acc_t>{products.get(), padded_width});
        for (int64_t row = 0; row < rows; ++row) {
          store_row(products.get() + row * padded_width, acc_t(1) / sums[row],
                    out + ((image * tokens + first + row) * heads + head) * width, width);
        }
      }
    }
  });
}

// out [B, H, N, D], a view of contiguous [B, N, H, D]; cls_attn [B, N].
template <bool kMasked>
std::tuple<at::Tensor, at::Tensor> attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                                     const at::Tensor& token_mask,
                                                     const std::optional<at::Tensor>& size, std::optional<double> scale,
                                                     double eps) {
  const AttentionShape shape(q);
  const at::TensorOptions acc_options = q.options().dtype(acc_scalar_type(q.scalar_type()));
  at::Tensor out = at::empty({shape.batch, shape.tokens, shape.heads, shape.width}, q.options());
  at::Tensor first_rows = at::empty({shape.batch, shape.heads, shape.tokens}, acc_options);
  at::Tensor cls_attn = at::empty({shape.batch, shape.tokens}, acc_options);
  const at::Tensor mask = kMasked ? per_token_acc(token_mask, q) : at::Tensor();
  TOKCOMP_DISPATCH_CPU(q.scalar_type(), "attention", [&] {
    using acc_t = acc_type<scalar_t>;
    const KeyBias<acc_t> bias(size, shape.batch, shape.tokens);
    const at::Tensor q_rows = with_contiguous_rows(q), k_rows = with_contiguous_rows(k),
                     v_rows = with_contiguous_rows(v);
    const double factor = score_scale(scale, shape.width);
    scalar_t* to = out.mutable_data_ptr<scalar_t>();
    acc_t* to_first = first_rows.mutable_data_ptr<acc_t>();
    if (kMasked || !attention_on_tiles(q_rows, k_rows, v_rows, bias, factor, to, to_first)) {
      attention_forward_heads<kMasked, scalar_t>(q_rows, k_rows, v_rows, bias, mask, factor, eps, to, to_first);
    }
    add_heads<acc_t>(first_rows, acc_t(shape.heads), cls_attn);
  });
  return {out.transpose(1, 2), cls_attn};
}

}  // namespace tokcomp
