#include <ATen/ops/empty.h>

#include "../common/checks.h"
#include "../common/registration.h"
#include "attention.h"
#include "rank.h"

namespace tokcomp {
namespace {

// Parallel over images: an image's heads are added to its mean in their order.
std::tuple<Tensor, Tensor> class_attention_sort_cpu(const Tensor& q_cls, const Tensor& k, const OptionalTensor& size,
                                                    std::optional<double> scale, int64_t num_prefix_tokens) {
  check_class_attention_sort(q_cls, k, size, num_prefix_tokens);
  const AttentionShape shape(k);
  const int64_t tokens = shape.tokens, width = shape.width, heads = shape.heads;
  Tensor cls_attn = at::empty({shape.batch, tokens}, k.options().dtype(acc_scalar_type(k.scalar_type())));
  Tensor token_order = at::empty({shape.batch, tokens}, k.options().dtype(at::kLong));
  if (tokens == 0) return {cls_attn, token_order};
  const Tensor queries = with_contiguous_rows(q_cls), keys = with_contiguous_rows(k);
  TOKCOMP_DISPATCH_CPU(k.scalar_type(), "class_attention_sort", [&] {
    using acc_t = acc_type<scalar_t>;
    constexpr int64_t lanes = kLanes<acc_t>;
    const int64_t padded_tokens = round_up(tokens, lanes), padded_width = round_up(width, lanes);
    const KeyBias<acc_t> bias(size, shape.batch, tokens);
    const acc_t factor = acc_t(score_scale(scale, width));
    at::parallel_for(0, shape.batch, 1, [&](int64_t begin, int64_t end) {
      const Scratch<acc_t> query(padded_width), key(padded_width), scores(padded_tokens), total(padded_tokens);
      RowMask<acc_t> no_mask(0);
      std::fill_n(query.get(), padded_width, acc_t(0));
      std::fill_n(key.get(), padded_width, acc_t(0));
      for (int64_t image = begin; image < end; ++image) {
        std::fill_n(total.get(), padded_tokens, acc_t(0));
        for (int64_t head = 0; head < heads; ++head) {
          load_row(queries.const_data_ptr<scalar_t>() + image * queries.stride(0) + head * queries.stride(1),
                   query.get(), width);
          const Rows<scalar_t> key_rows = head_rows<scalar_t>(keys, image, head);
          acc_t row_max = -std::numeric_limits<acc_t>::infinity();
          for (int64_t j = 0; j < tokens; ++j) {
            load_row(key_rows[j], key.get(), width);
            Vec<acc_t> dot(acc_t(0));
            for (int64_t i = 0; i < padded_width; i += lanes) {
              dot = at::vec::fmadd(Vec<acc_t>::loadu(query.get() + i), Vec<acc_t>::loadu(key.get() + i), dot);
            }
            scores.get()[j] = reduce_add(dot) * factor + bias[image][j];
            if (scores.get()[j] > row_max) row_max = scores.get()[j];
          }
          std::copy(bias[image] + tokens, bias[image] + padded_tokens, scores.get() + tokens);
          const acc_t sum = softmax_row<false>(scores.get(), row_max, tokens, no_mask, acc_t(0), scores.get());
          const Vec<acc_t> inverse(acc_t(1) / sum);
          for (int64_t j = 0; j < padded_tokens; j += lanes) {
            at::vec::fmadd(Vec<acc_t>::loadu(scores.get() + j), inverse, Vec<acc_t>::loadu(total.get() + j))
                .store(total.get() + j);
          }
        }
        acc_t* mean = cls_attn.mutable_data_ptr<acc_t>() + image * tokens;
        for (int64_t j = 0; j < tokens; ++j) mean[j] = total.get()[j] / acc_t(heads);
        rank_tokens(mean, tokens, num_prefix_tokens, token_order.mutable_data_ptr<int64_t>() + image * tokens,
                    static_cast<int64_t*>(nullptr));
      }
    });
  });
  return {cls_attn, token_order};
}

}  // namespace
}  // namespace tokcomp

TOKCOMP_REGISTER_CPU(class_attention_sort, tokcomp::class_attention_sort_cpu)
