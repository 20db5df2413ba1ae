#include "../common/registration.h"
#include "prune_merge.h"

namespace tokcomp {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> prune_merge_norm_cpu(const Tensor& x, const Tensor& branch,
                                                                const Tensor& importance, int64_t num_prune_kept,
                                                                int64_t num_merge_kept, const OptionalTensor& weight,
                                                                const OptionalTensor& bias, const OptionalTensor& size,
                                                                int64_t num_prefix_tokens,
                                                                bool similarity_weighted_size, double norm_eps) {
  check_prune_merge_norm(x, branch, importance, num_prune_kept, num_merge_kept, weight, bias, size, num_prefix_tokens,
                         norm_eps);
  const auto counts =
      prune_merging::counts_of(x, num_prune_kept, num_merge_kept, num_prefix_tokens, similarity_weighted_size);
  const prune_merging::Fused fused{branch, weight, bias, norm_eps};
  const auto out = prune_merging::run(x, importance, counts, size, &fused);
  return {out.x, out.normalized, out.size, out.source};
}

}  // namespace

TOKCOMP_REGISTER_CPU(prune_merge_norm, prune_merge_norm_cpu)

}  // namespace tokcomp
