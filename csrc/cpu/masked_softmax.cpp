#include <ATen/ops/empty.h>

#include "../common/checks.h"
#include "../common/registration.h"
#include "attention.h"

namespace tokcomp {
namespace {

// One row of scores in the accumulate type, -inf in the lanes beyond the last key; returns its maximum.
template <typename scalar_t, typename acc_t>
acc_t load_scores(const scalar_t* from, int64_t tokens, acc_t* to) {
  constexpr int64_t lanes = kLanes<acc_t>;
  constexpr acc_t kLowest = -std::numeric_limits<acc_t>::infinity();
  load_row(from, to, tokens);
  std::fill(to + tokens, to + round_up(tokens, lanes), kLowest);
  Vec<acc_t> maximum(kLowest);
  for (int64_t j = 0; j < tokens; j += lanes) maximum = max_ignoring_nan(Vec<acc_t>::loadu(to + j), maximum);
  acc_t maxima[lanes];
  maximum.store(maxima);
  return row_maximum<true>(maxima, 0);
}

Tensor masked_softmax_cpu(const Tensor& scores, const Tensor& token_mask, double eps) {
  check_masked_softmax(scores, token_mask, eps);
  const int64_t heads = scores.size(1), tokens = scores.size(3);
  Tensor out = at::empty(scores.sizes(), scores.options());
  if (out.numel() == 0) return out;
  const Tensor mask = per_token_acc(token_mask, scores), readable = with_contiguous_rows(scores);
  TOKCOMP_DISPATCH_CPU(scores.scalar_type(), "masked_softmax", [&] {
    using acc_t = acc_type<scalar_t>;
    scalar_t* probabilities = out.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, scores.size(0) * heads, 1, [&](int64_t begin, int64_t end) {
      const Scratch<acc_t> row_values(round_up(tokens, kLanes<acc_t>));
      RowMask<acc_t> row_mask(tokens);
      for (int64_t task = begin; task < end; ++task) {
        const Rows<scalar_t> rows = head_rows<scalar_t>(readable, task / heads, task % heads);
        row_mask.set_image(mask.const_data_ptr<acc_t>() + task / heads * tokens);
        for (int64_t row = 0; row < tokens; ++row) {
          const acc_t row_max = load_scores(rows[row], tokens, row_values.get());
          row_mask.enter_row(row);
          const acc_t sum =
              softmax_row<true>(row_values.get(), row_max, tokens, row_mask, acc_t(eps), row_values.get());
          row_mask.leave_row(row);
          store_row(row_values.get(), acc_t(1) / sum, probabilities + (task * tokens + row) * tokens, tokens);
        }
      }
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> masked_softmax_backward_cpu(const Tensor& grad, const Tensor& scores,
                                                       const Tensor& token_mask, double eps) {
  check_masked_softmax_backward(grad, scores, token_mask, eps);
  const int64_t batch = scores.size(0), heads = scores.size(1), tokens = scores.size(3);
  const auto acc_options = scores.options().dtype(acc_scalar_type(scores.scalar_type()));
  Tensor grad_scores = at::empty(scores.sizes(), scores.options());
  Tensor head_mask_grads = at::empty({batch, heads, tokens}, acc_options);
  Tensor grad_token_mask = at::empty({batch, tokens}, acc_options);
  const Tensor mask = per_token_acc(token_mask, scores);
  const Tensor readable = with_contiguous_rows(scores), readable_grad = with_contiguous_rows(grad);
  TOKCOMP_DISPATCH_CPU(scores.scalar_type(), "masked_softmax_backward", [&] {
    using acc_t = acc_type<scalar_t>;
    const int64_t padded_tokens = round_up(tokens, kLanes<acc_t>);
    scalar_t* out = grad_scores.mutable_data_ptr<scalar_t>();
    at::parallel_for(0, tokens == 0 ? 0 : batch * heads, 1, [&](int64_t begin, int64_t end) {
      const Scratch<acc_t> row_values(padded_tokens), row_grads(padded_tokens), mask_grads(padded_tokens);
      std::fill_n(row_grads.get(), padded_tokens, acc_t(0));
      RowMask<acc_t> row_mask(tokens);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t image = task / heads, head = task % heads;
        const Rows<scalar_t> rows = head_rows<scalar_t>(readable, image, head);
        const Rows<scalar_t> grad_rows = head_rows<scalar_t>(readable_grad, image, head);
        row_mask.set_image(mask.const_data_ptr<acc_t>() + image * tokens);
        std::fill_n(mask_grads.get(), padded_tokens, acc_t(0));
        for (int64_t row = 0; row < tokens; ++row) {
          const acc_t row_max = load_scores(rows[row], tokens, row_values.get());
          load_row(grad_rows[row], row_grads.get(), tokens);
          row_mask.enter_row(row);
          softmax_backward_row<true>(row_values.get(), row_grads.get(), row_max, tokens, row_mask, acc_t(eps),
                                     mask_grads.get(), row);
          row_mask.leave_row(row);
          store_row(row_grads.get(), acc_t(1), out + (task * tokens + row) * tokens, tokens);
        }
        std::copy_n(mask_grads.get(), tokens, head_mask_grads.mutable_data_ptr<acc_t>() + task * tokens);
      }
    });
    add_heads<acc_t>(head_mask_grads, acc_t(1), grad_token_mask);
  });
  return {grad_scores, grad_token_mask.to(token_mask.scalar_type())};
}

}  // namespace
}  // namespace tokcomp

TOKCOMP_REGISTER_CPU(masked_softmax, tokcomp::masked_softmax_cpu)
TOKCOMP_REGISTER_CPU(_masked_softmax_backward, tokcomp::masked_softmax_backward_cpu)
