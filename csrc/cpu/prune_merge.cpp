#include "prune_merge.h"
#include "../common/registration.h"

namespace tokcomp {
namespace {

std::tuple<Tensor, Tensor, Tensor> prune_merge_cpu(const Tensor& x, const Tensor& importance, int64_t num_prune_kept,
                                                   int64_t num_merge_kept, const OptionalTensor& size,
                                                   int64_t num_prefix_tokens, bool similarity_weighted_size) {
  check_prune_merge(x, importance, num_prune_kept, num_merge_kept, size, num_prefix_tokens);
  const auto counts =
      prune_merging::counts_of(x, num_prune_kept, num_merge_kept, num_prefix_tokens, similarity_weighted_size);
  const auto out = prune_merging::run(x, importance, counts, size);
  return {out.x, out.size, out.source};
}

}  // namespace

TOKCOMP_REGISTER_CPU(prune_merge, prune_merge_cpu)

}  // namespace tokcomp
