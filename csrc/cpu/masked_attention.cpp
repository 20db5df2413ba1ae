#include "../common/checks.h"
#include "../common/registration.h"
#include "attention_forward.h"

namespace tokcomp {
namespace {

std::tuple<Tensor, Tensor> masked_attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const Tensor& token_mask, const OptionalTensor& size,
                                                std::optional<double> scale, double eps) {
  check_masked_attention("masked_attention", q, k, v, token_mask, size, eps);
  return attention_forward<true>(q, k, v, token_mask, size, scale, eps);
}

}  // namespace
}  // namespace tokcomp

TOKCOMP_REGISTER_CPU(masked_attention, tokcomp::masked_attention_cpu)
