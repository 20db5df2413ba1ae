#include <tuple>

#include "prune_merge_host.h"

namespace tokcomp::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> prune_merge_norm_cuda(const Tensor& x, const Tensor& branch,
                                                                 const Tensor& importance, int64_t num_prune_kept,
                                                                 int64_t num_merge_kept, const OptionalTensor& weight,
                                                                 const OptionalTensor& bias, const OptionalTensor& size,
                                                                 int64_t num_prefix_tokens,
                                                                 bool similarity_weighted_size, double norm_eps) {
  check_prune_merge_norm(x, branch, importance, num_prune_kept, num_merge_kept, weight, bias, size, num_prefix_tokens,
                         norm_eps);
  const LayerNormArguments norm{weight, bias, norm_eps};
  return run_prune_merge({"prune_merge_norm", x, &branch, importance, num_prune_kept, num_merge_kept, size,
                          num_prefix_tokens, similarity_weighted_size, &norm});
}

}  // namespace

TOKCOMP_REGISTER_CUDA(prune_merge_norm, prune_merge_norm_cuda)

}  // namespace tokcomp::cuda
