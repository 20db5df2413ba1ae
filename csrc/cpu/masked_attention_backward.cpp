#include "../common/checks.h"
#include "../common/registration.h"
#include "attention_backward.h"

namespace tokcomp {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_attention_backward_cpu(const Tensor& grad_out, const Tensor& q,
                                                                         const Tensor& k, const Tensor& v,
                                                                         const Tensor& token_mask,
                                                                         const OptionalTensor& size,
                                                                         std::optional<double> scale, double eps) {
  check_masked_attention_backward(grad_out, q, k, v, token_mask, size, eps);
  auto [grad_q, grad_k, grad_v, grad_token_mask] =
      attention_backward<true>(grad_out, q, k, v, token_mask, size, scale, eps);
  return {grad_q, grad_k, grad_v, grad_token_mask.to(token_mask.scalar_type())};
}

}  // namespace
}  // namespace tokcomp

TOKCOMP_REGISTER_CPU(_masked_attention_backward, tokcomp::masked_attention_backward_cpu)
