#include "../common/checks.h"
#include "../common/registration.h"
#include "attention.h"

namespace tokcomp {
namespace {

// total [N] += the rows of probabilities [rows, stride], each times its factor. A block's rows are added up before they
// join the total, which halves the length of every chain of roundings in its logarithm.
template <typename acc_t>
void add_rows(const acc_t* probabilities, int64_t rows, int64_t stride, const acc_t* factors, acc_t* total) {
  constexpr int64_t lanes = kLanes<acc_t>;
  for (int64_t j = 0; j < stride; j += lanes) {
    Vec<acc_t> sum(acc_t(0));
    for (int64_t row = 0; row < rows; ++row) {
      sum = at::vec::fmadd(Vec<acc_t>::loadu(probabilities + row * stride + j), Vec<acc_t>(factors[row]), sum);
    }
    (Vec<acc_t>::loadu(total + j) + sum).store(total + j);
  }
}

// received [B, H, N]: each key's probabilities, added up over all queries of its head.
template <typename scalar_t>
void attention_received_heads(const Tensor& q, const Tensor& k, const KeyBias<acc_type<scalar_t>>& bias, double scale,
                              acc_type<scalar_t>* received) {
  using acc_t = acc_type<scalar_t>;
  using unit_t = typename UnitOf<scalar_t>::type;
  constexpr int64_t lanes = kLanes<acc_t>;
  const AttentionShape shape(q);
  const int64_t tokens = shape.tokens, width = shape.width, heads = shape.heads;
  const int64_t padded_tokens = round_up(tokens, lanes), depth = units<unit_t>(width);

  at::parallel_for(0, shape.batch * heads, 1, [&](int64_t begin, int64_t end) {
    const Scratch<unit_t> keys(depth * padded_tokens), queries(kBlockRows * depth);
    const Scratch<acc_t> scores(kBlockRows * padded_tokens), maxima(kBlockRows * lanes), total(padded_tokens);
    const RowMask<acc_t> no_mask(0);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / heads, head = task % heads;
      pack_right_transposed(head_rows<scalar_t>(k, image, head), tokens, width, keys.get());
      const Rows<scalar_t> query_rows = head_rows<scalar_t>(q, image, head);
      std::fill_n(total.get(), padded_tokens, acc_t(0));
      for (int64_t first = 0; first < tokens; first += kBlockRows) {
        const int64_t rows = std::min(kBlockRows, tokens - first);
        pack_left(query_rows, first, rows, width, queries.get());
        score_block(queries.get(), rows, keys.get(), padded_tokens / lanes, depth, acc_t(scale), bias[image],
                    scores.get(), padded_tokens, maxima.get());
        acc_t inverse_sums[kBlockRows];
        for (int64_t row = 0; row < rows; ++row) {
          acc_t* of_row = scores.get() + row * padded_tokens;
          inverse_sums[row] = acc_t(1) / softmax_row<false>(of_row, row_maximum<false>(maxima.get(), row), tokens,
                                                            no_mask, acc_t(0), of_row);
        }
        add_rows(scores.get(), rows, padded_tokens, inverse_sums, total.get());
      }
      std::copy_n(total.get(), tokens, received + task * tokens);
    }
  });
}

Tensor attention_received_cpu(const Tensor& q, const Tensor& k, const OptionalTensor& size, std::optional<double> scale,
                              int64_t num_prefix_tokens) {
  check_attention_received(q, k, size, num_prefix_tokens);
  const AttentionShape shape(q);
  const at::TensorOptions acc_options = q.options().dtype(acc_scalar_type(q.scalar_type()));
  Tensor by_head = at::empty({shape.batch, shape.heads, shape.tokens}, acc_options);
  Tensor received = at::empty({shape.batch, shape.tokens}, acc_options);
  TOKCOMP_DISPATCH_CPU(q.scalar_type(), "attention_received", [&] {
    using acc_t = acc_type<scalar_t>;
    const KeyBias<acc_t> bias(size, shape.batch, shape.tokens);
    attention_received_heads<scalar_t>(with_contiguous_rows(q), with_contiguous_rows(k), bias,
                                       score_scale(scale, shape.width), by_head.mutable_data_ptr<acc_t>());
    add_heads<acc_t>(by_head, acc_t(shape.heads * shape.tokens), received);
  });
  return received;
}

}  // namespace
}  // namespace tokcomp

TOKCOMP_REGISTER_CPU(attention_received, tokcomp::attention_received_cpu)
