#include "attention_received.cuh"

#include <cmath>

#include "launch.cuh"

namespace tokcomp::cuda {
namespace {

Tensor attention_received_cuda(const Tensor& q, const Tensor& k, const OptionalTensor& size,
                               std::optional<double> scale, int64_t num_prefix_tokens) {
  constexpr const char* op = "attention_received";
  check_attention_received(q, k, size, num_prefix_tokens);
  check_dtype(op, "q", q);
  const int64_t batch = q.size(0), heads = q.size(1), num_tokens = q.size(2), width = q.size(3);
  Tensor received = empty_like_with(q, {batch, num_tokens}, at::kFloat);
  if (received.numel() == 0) return received;

  const Launcher launch(q);
  const Tensor q_rows = with_rows(q), k_rows = with_rows(k);
  const OptionalTensor sizes = per_token_acc(size, q);
  Tensor parts = empty_like_with(q, {batch, heads, received_row_blocks(num_tokens), num_tokens}, at::kFloat);

  TOKCOMP_DISPATCH_CUDA(q.scalar_type(), op, [&] {
    using T = typename DeviceType<scalar_t>::type;
    AttentionReceivedParams<T> p{};
    p.q = input<T>(q_rows);
    p.k = input<T>(k_rows);
    p.size = input<float>(sizes);
    p.parts = output<float>(parts);
    p.q_stride_b = q_rows.stride(0);
    p.q_stride_h = q_rows.stride(1);
    p.q_stride_n = q_rows.stride(2);
    p.k_stride_b = k_rows.stride(0);
    p.k_stride_h = k_rows.stride(1);
    p.k_stride_n = k_rows.stride(2);
    p.batch = batch;
    p.num_heads = to_int(op, "the number of heads", heads);
    p.num_tokens = to_int(op, "the number of tokens", num_tokens);
    p.width = to_int(op, "the head width", width);
    p.scale = static_cast<float>(scale.value_or(1. / std::sqrt(static_cast<double>(width)))) * kLog2E;
    p.aligned = rows_aligned({q_rows, k_rows});
    launch_attention_received(p, output<float>(received), launch);
  });
  return received;
}

}  // namespace

TOKCOMP_REGISTER_CUDA(attention_received, attention_received_cuda)

}  // namespace tokcomp::cuda
