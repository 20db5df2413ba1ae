// linear_gelu out of PyTorch's own operators: it has no kernel in C++, those of PyTorch's product being the best there
// is.
#include <ATen/ATen.h>
#include <torch/library.h>

namespace tokcomp {
namespace {

at::Tensor linear_gelu_composed(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias) {
  return at::gelu(at::linear(x, weight, bias)).contiguous();
}

}  // namespace
}  // namespace tokcomp

TORCH_LIBRARY_IMPL(tokcomp, CompositeExplicitAutograd, m) { m.impl("linear_gelu", tokcomp::linear_gelu_composed); }
