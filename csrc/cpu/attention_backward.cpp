#include "attention_backward.h"
#include "../common/checks.h"
#include "../common/registration.h"

namespace tokcomp {
namespace {

std::tuple<Tensor, Tensor, Tensor> attention_backward_cpu(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                          const Tensor& v, const OptionalTensor& size,
                                                          std::optional<double> scale) {
  check_attention_backward(grad_out, q, k, v, size);
  auto [grad_q, grad_k, grad_v, unused] = attention_backward<false>(grad_out, q, k, v, Tensor(), size, scale, 0.0);
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace tokcomp

TOKCOMP_REGISTER_CPU(_attention_backward, tokcomp::attention_backward_cpu)
