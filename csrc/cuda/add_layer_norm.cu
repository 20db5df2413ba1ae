#include "add_layer_norm.cuh"

#include <tuple>

#include "launch.cuh"

namespace tokcomp::cuda {
namespace {

std::tuple<Tensor, Tensor> add_layer_norm_cuda(const Tensor& x, const Tensor& branch, const OptionalTensor& weight,
                                               const OptionalTensor& bias, double norm_eps) {
  constexpr const char* op = "add_layer_norm";
  check_add_layer_norm(x, branch, weight, bias, norm_eps);
  check_dtype(op, "x", x);
  Tensor x_out = empty_like_with(x, x.sizes(), x.scalar_type());
  Tensor normalized = empty_like_with(x, x.sizes(), x.scalar_type());
  if (x_out.numel() == 0) return {x_out, normalized};

  const Launcher launch(x);
  const int64_t width = x.size(-1), rows = x.numel() / width;
  const Tensor x_rows = with_rows(x.reshape({rows, width})), branch_rows = with_rows(branch.reshape({rows, width}));
  OptionalTensor scale, shift;
  if (weight) scale = weight->contiguous();
  if (bias) shift = bias->contiguous();
  bool aligned = rows_aligned({x_rows, branch_rows, x_out, normalized});
  for (const OptionalTensor& other : {scale, shift}) aligned = aligned && (!other || rows_aligned({*other}));
  TOKCOMP_DISPATCH_CUDA(x.scalar_type(), op, [&] {
    using T = typename DeviceType<scalar_t>::type;
    AddLayerNormParams<T> p{};
    p.x = input<T>(x_rows);
    p.branch = input<T>(branch_rows);
    p.weight = input<T>(scale);
    p.bias = input<T>(shift);
    p.x_out = output<T>(x_out);
    p.normalized = output<T>(normalized);
    p.x_stride = x_rows.stride(0);
    p.branch_stride = branch_rows.stride(0);
    p.rows = rows;
    p.width = to_int(op, "the number of channels", width);
    p.norm_eps = static_cast<float>(norm_eps);
    p.aligned = aligned;
    launch_add_layer_norm(p, launch);
  });
  return {x_out, normalized};
}

}  // namespace

TOKCOMP_REGISTER_CUDA(add_layer_norm, add_layer_norm_cuda)

}  // namespace tokcomp::cuda
