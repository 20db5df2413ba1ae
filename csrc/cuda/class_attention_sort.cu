#include "class_attention_sort.cuh"

#include <cmath>
#include <tuple>

#include "launch.cuh"

namespace tokcomp::cuda {
namespace {

std::tuple<Tensor, Tensor> class_attention_sort_cuda(const Tensor& q_cls, const Tensor& k, const OptionalTensor& size,
                                                     std::optional<double> scale, int64_t num_prefix_tokens) {
  constexpr const char* op = "class_attention_sort";
  check_class_attention_sort(q_cls, k, size, num_prefix_tokens);
  check_dtype(op, "k", k);
  const int64_t batch = k.size(0), heads = k.size(1), num_tokens = k.size(2), width = k.size(3);
  Tensor cls_attn = empty_like_with(k, {batch, num_tokens}, at::kFloat);
  Tensor token_order = empty_like_with(k, {batch, num_tokens}, at::kLong);
  if (token_order.numel() == 0) return {cls_attn, token_order};

  const Launcher launch(k);
  const Tensor q_rows = with_rows(q_cls), k_rows = with_rows(k);
  const OptionalTensor sizes = per_token_acc(size, k);
  Tensor scratch;
  if (class_attention_needs_scratch(num_tokens)) scratch = empty_like_with(k, {batch, heads, num_tokens}, at::kFloat);

  TOKCOMP_DISPATCH_CUDA(k.scalar_type(), op, [&] {
    using T = typename DeviceType<scalar_t>::type;
    ClassAttentionParams<T> p{};
    p.q = input<T>(q_rows);
    p.k = input<T>(k_rows);
    p.size = input<float>(sizes);
    p.cls_attn = output<float>(cls_attn);
    p.order = output<int64_t>(token_order);
    p.scratch = scratch.defined() ? output<float>(scratch) : nullptr;
    p.q_stride_b = q_rows.stride(0);
    p.q_stride_h = q_rows.stride(1);
    p.k_stride_b = k_rows.stride(0);
    p.k_stride_h = k_rows.stride(1);
    p.k_stride_n = k_rows.stride(2);
    p.batch = batch;
    p.num_heads = to_int(op, "the number of heads", heads);
    p.num_tokens = to_int(op, "the number of tokens", num_tokens);
    p.width = to_int(op, "the head width", width);
    p.num_prefix_tokens = static_cast<int>(num_prefix_tokens);
    p.scale = static_cast<float>(scale.value_or(1. / std::sqrt(static_cast<double>(width))));
    p.aligned = rows_aligned({q_rows, k_rows});
    launch_class_attention_sort(p, launch);
  });
  return {cls_attn, token_order};
}

}  // namespace

TOKCOMP_REGISTER_CUDA(class_attention_sort, class_attention_sort_cuda)

}  // namespace tokcomp::cuda
