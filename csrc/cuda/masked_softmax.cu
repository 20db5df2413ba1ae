#include "masked_softmax.cuh"

#include <tuple>

#include "launch.cuh"

namespace tokcomp::cuda {
namespace {

template <typename T>
MaskedSoftmaxParams<T> forward_params(const char* op, const Tensor& scores, const Tensor& mask, const Tensor& out,
                                      double eps) {
  MaskedSoftmaxParams<T> p{};
  p.scores = input<T>(scores);
  p.mask = input<float>(mask);
  p.out = output<T>(out);
  p.stride_b = scores.stride(0);
  p.stride_h = scores.stride(1);
  p.stride_n = scores.stride(2);
  p.batch = scores.size(0);
  p.num_heads = to_int(op, "the number of heads", scores.size(1));
  p.num_tokens = to_int(op, "the number of tokens", scores.size(3));
  p.eps = static_cast<float>(eps);
  return p;
}

Tensor masked_softmax_cuda(const Tensor& scores, const Tensor& token_mask, double eps) {
  constexpr const char* op = "masked_softmax";
  check_masked_softmax(scores, token_mask, eps);
  check_dtype(op, "scores", scores);
  Tensor out = empty_like_with(scores, scores.sizes(), scores.scalar_type());
  if (out.numel() == 0) return out;

  const Launcher launch(scores);
  const Tensor rows = with_rows(scores), mask = per_token_acc(token_mask, scores);
  TOKCOMP_DISPATCH_CUDA(scores.scalar_type(), op, [&] {
    using T = typename DeviceType<scalar_t>::type;
    launch_masked_softmax(forward_params<T>(op, rows, mask, out, eps), launch);
  });
  return out;
}

std::tuple<Tensor, Tensor> masked_softmax_backward_cuda(const Tensor& grad, const Tensor& scores,
                                                        const Tensor& token_mask, double eps) {
  constexpr const char* op = "_masked_softmax_backward";
  check_masked_softmax_backward(grad, scores, token_mask, eps);
  check_dtype(op, "scores", scores);
  const int64_t batch = scores.size(0), heads = scores.size(1), num_tokens = scores.size(3);
  Tensor grad_scores = empty_like_with(scores, scores.sizes(), scores.scalar_type());
  Tensor grad_mask = empty_like_with(scores, {batch, num_tokens}, at::kFloat);
  if (grad_mask.numel() == 0) return {grad_scores, grad_mask.to(token_mask.scalar_type())};

  const Launcher launch(scores);
  const Tensor rows = with_rows(scores), grad_rows = with_rows(grad), mask = per_token_acc(token_mask, scores);
  const int64_t blocks = batch * heads * masked_softmax_row_blocks(num_tokens);
  const Tensor partial = empty_like_with(scores, {blocks, num_tokens}, at::kFloat);
  Tensor scratch;
  if (masked_softmax_backward_needs_scratch(num_tokens)) {
    scratch = empty_like_with(scores, {blocks, kWarps, num_tokens}, at::kFloat);
  }
  TOKCOMP_DISPATCH_CUDA(scores.scalar_type(), op, [&] {
    using T = typename DeviceType<scalar_t>::type;
    MaskedSoftmaxBackwardParams<T> p{};
    p.forward = forward_params<T>(op, rows, mask, grad_scores, eps);
    p.grad = input<T>(grad_rows);
    p.partial = output<float>(partial);
    p.grad_mask = output<float>(grad_mask);
    p.scratch = scratch.defined() ? output<float>(scratch) : nullptr;
    p.grad_stride_b = grad_rows.stride(0);
    p.grad_stride_h = grad_rows.stride(1);
    p.grad_stride_n = grad_rows.stride(2);
    launch_masked_softmax_backward(p, launch);
  });
  return {grad_scores, grad_mask.to(token_mask.scalar_type())};
}

}  // namespace

TOKCOMP_REGISTER_CUDA(masked_softmax, masked_softmax_cuda)
TOKCOMP_REGISTER_CUDA(_masked_softmax_backward, masked_softmax_backward_cuda)

}  // namespace tokcomp::cuda
