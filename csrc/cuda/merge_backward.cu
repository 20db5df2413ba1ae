#include "merge_backward.cuh"

#include "launch.cuh"

namespace tokcomp::cuda {
namespace {

Tensor merge_backward_cuda(const Tensor& grad, const Tensor& source, const OptionalTensor& size) {
  constexpr const char* op = "_merge_backward";
  check_merge_backward(grad, source, size);
  check_dtype(op, "grad", grad);
  const int64_t batch = grad.size(0), num_kept = grad.size(1), width = grad.size(2), num_tokens = source.size(1);
  Tensor grad_x = empty_like_with(grad, {batch, num_tokens, width}, grad.scalar_type());
  if (grad_x.numel() == 0) return grad_x;

  const Launcher launch(grad);
  const Tensor grad_rows = with_rows(grad), slots = source.contiguous();
  const OptionalTensor sizes = per_token_acc(size, grad);
  TOKCOMP_DISPATCH_CUDA(grad.scalar_type(), op, [&] {
    using T = typename DeviceType<scalar_t>::type;
    MergeBackwardParams<T> p{};
    p.grad = input<T>(grad_rows);
    p.source = input<int64_t>(slots);
    p.size = input<float>(sizes);
    p.grad_x = output<T>(grad_x);
    p.grad_stride_b = grad_rows.stride(0);
    p.grad_stride_m = grad_rows.stride(1);
    p.batch = batch;
    p.width = width;
    p.num_tokens = to_int(op, "the number of tokens", num_tokens);
    p.num_kept = to_int(op, "the number of kept tokens", num_kept);
    p.aligned = rows_aligned({grad_rows, grad_x});
    launch_merge_backward(p, launch);
  });
  return grad_x;
}

}  // namespace

TOKCOMP_REGISTER_CUDA(_merge_backward, merge_backward_cuda)

}  // namespace tokcomp::cuda
