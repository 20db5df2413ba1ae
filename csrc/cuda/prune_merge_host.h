// The host's side of prune_merge and prune_merge_norm: one pair of kernels, so the same bits from both.
#pragma once

#include <tuple>

#include "launch.cuh"

namespace tokcomp::cuda {

struct LayerNormArguments {
  const OptionalTensor& weight;
  const OptionalTensor& bias;
  double eps;
};

struct PruneMergeArguments {
  const char* op;
  const Tensor& x;
  const Tensor* branch;  // null: x is what is pruned and merged
  const Tensor& importance;
  int64_t num_prune_kept, num_merge_kept;
  const OptionalTensor& size;
  int64_t num_prefix_tokens;
  bool similarity_weighted_size;
  const LayerNormArguments* norm;  // null: none
};

// x, normalized (undefined without norm), size, source. The arguments have been checked, but for what only CUDA
// refuses.
std::tuple<Tensor, Tensor, Tensor, Tensor> run_prune_merge(const PruneMergeArguments& arguments);

}  // namespace tokcomp::cuda
