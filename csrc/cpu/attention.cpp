#include "../common/checks.h"
#include "../common/registration.h"
#include "attention_forward.h"

namespace tokcomp {
namespace {

std::tuple<Tensor, Tensor> attention_cpu(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& size,
                                         std::optional<double> scale) {
  check_attention(q, k, v, size);
  return attention_forward<false>(q, k, v, Tensor(), size, scale, 0.0);
}

}  // namespace
}  // namespace tokcomp

TOKCOMP_REGISTER_CPU(attention, tokcomp::attention_cpu)
