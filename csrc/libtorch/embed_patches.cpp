// _embed_patches out of PyTorch's own operators: the kernel is Triton's, which a program without Python does not have.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "../common/checks.h"

namespace tokcomp {
namespace {

std::tuple<Tensor, Tensor> embed_patches_composed(const Tensor& images, const Tensor& weight,
                                                  const OptionalTensor& bias, const Tensor& position,
                                                  const OptionalTensor& prefix, const OptionalTensor& norm_weight,
                                                  const OptionalTensor& norm_bias, double norm_eps) {
  checks::dim("_embed_patches", "weight", weight, "[C, A, P, Q]");
  Tensor tokens = at::conv2d(images, weight, bias, weight.sizes().slice(2)).flatten(2).mT();
  if (prefix) tokens = at::cat({prefix->expand({images.size(0), -1, -1}), tokens}, 1);
  const Tensor x = (tokens + position).contiguous();
  return {x, at::layer_norm(x, {x.size(2)}, norm_weight, norm_bias, norm_eps)};
}

}  // namespace
}  // namespace tokcomp

TORCH_LIBRARY_IMPL(tokcomp, CompositeExplicitAutograd, m) { m.impl("_embed_patches", tokcomp::embed_patches_composed); }
