// attention, and what leaves its class row by heads, out of PyTorch's own operators, for devices where this library has
// no kernel for it: on CUDA a program without Python has no Triton. Two passes over the keys of the class token instead
// of one; [B, H, N, N] is not held.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>

#include "../common/checks.h"
#include "../common/dispatch.h"

namespace tokcomp {
namespace {

std::tuple<Tensor, Tensor> attention_heads_composed(const Tensor& q, const Tensor& k, const Tensor& v,
                                                    const OptionalTensor& size, std::optional<double> scale) {
  checks::qkv("_attention_heads", q, k, v, size);
  const double factor = scale.value_or(1. / std::sqrt(static_cast<double>(q.size(-1))));
  const auto accumulate = q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
  OptionalTensor bias;  // [B, 1, 1, N]
  if (size) {
    const Tensor wide = size->to(accumulate);
    const Tensor effective = at::where(wide > kMinSize, wide, kMinSize);
    bias = effective.log().unsqueeze(1).unsqueeze(1);
  }
  // In half precision the bias is rounded to q's type, which PyTorch's kernels demand; the class row has it whole.
  const OptionalTensor mask =
      bias ? OptionalTensor(bias->to(q.scalar_type()).expand({-1, q.size(1), q.size(2), -1})) : OptionalTensor();
  const Tensor out = at::scaled_dot_product_attention(q, k, v, mask, 0., false, factor);
  Tensor scores = at::matmul(q.narrow(2, 0, 1).to(accumulate), k.to(accumulate).mT()) * factor;  // [B, H, 1, N]
  if (bias) scores = scores + *bias;
  // Compiled programs rely on the memory format that the schema's other kernels have: a view of [B, N, H, D].
  return {out.transpose(1, 2).contiguous().transpose(1, 2), scores.softmax(-1).squeeze(2)};
}

std::tuple<Tensor, Tensor> attention_composed(const Tensor& q, const Tensor& k, const Tensor& v,
                                              const OptionalTensor& size, std::optional<double> scale) {
  check_attention(q, k, v, size);
  const auto [out, cls_attn] = attention_heads_composed(q, k, v, size, scale);
  return {out, cls_attn.mean(1)};
}

}  // namespace
}  // namespace tokcomp

TORCH_LIBRARY_IMPL(tokcomp, CompositeExplicitAutograd, m) {
  m.impl("attention", tokcomp::attention_composed);
  m.impl("_attention_heads", tokcomp::attention_heads_composed);
}
