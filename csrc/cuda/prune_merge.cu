#include "prune_merge.cuh"

#include <algorithm>
#include <tuple>

#include "partial_sums.cuh"
#include "prune_merge_host.h"
#include "prune_merge_resident.cuh"
#include "prune_merge_streaming.cuh"

namespace tokcomp::cuda {
namespace {

// [B, N] int32: the token at each rank, for images that the kernels do not rank themselves.
Tensor rank_tokens(const Tensor& importance, const MergeShape& shape, const Launcher& launch) {
  const Tensor order = empty_like_with(importance, importance.sizes(), at::kInt);
  const int64_t batch = importance.size(0);
  const int count = shape.num_tokens, prefix = shape.num_prefix_tokens;
  int* out = output<int>(order);
  if (importance.scalar_type() == at::kDouble) {
    launch_rank(RankParams<double, int>{input<double>(importance), out, batch, count, prefix}, launch);
  } else {
    launch_rank(RankParams<float, int>{input<float>(importance), out, batch, count, prefix}, launch);
  }
  return order;
}

// [B, N]: the mean of values [B, H, N].
Tensor mean_of_heads(const Tensor& values, const Launcher& launch) {
  const Tensor mean = empty_like_with(values, {values.size(0), values.size(2)}, at::kFloat);
  launch_partial_sums({input<float>(values), output<float>(mean), values.size(0), values.size(1),
                       static_cast<int>(values.size(2)), static_cast<float>(values.size(1))},
                      launch);
  return mean;
}

std::tuple<Tensor, Tensor, Tensor> prune_merge_cuda(const Tensor& x, const Tensor& importance, int64_t num_prune_kept,
                                                    int64_t num_merge_kept, const OptionalTensor& size,
                                                    int64_t num_prefix_tokens, bool similarity_weighted_size) {
  check_prune_merge(x, importance, num_prune_kept, num_merge_kept, size, num_prefix_tokens);
  const auto [x_out, normalized, size_out, source] =
      run_prune_merge({"prune_merge", x, nullptr, importance, num_prune_kept, num_merge_kept, size, num_prefix_tokens,
                       similarity_weighted_size, nullptr});
  return {x_out, size_out, source};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> run_prune_merge(const PruneMergeArguments& arguments) {
  const auto& [op, x, branch, importance, num_prune_kept, num_merge_kept, size, num_prefix_tokens,
               similarity_weighted_size, norm] = arguments;
  check_dtype(op, "x", x);
  const int64_t batch = x.size(0);
  MergeShape shape{};
  shape.width = x.size(2);
  shape.num_tokens = to_int(op, "the number of tokens", x.size(1));
  shape.num_prefix_tokens = static_cast<int>(num_prefix_tokens);
  shape.num_alive = static_cast<int>(std::min<int64_t>(shape.num_tokens, num_prune_kept));
  shape.num_kept = static_cast<int>(std::min<int64_t>(shape.num_alive, num_merge_kept));
  Tensor x_out = empty_like_with(x, {batch, shape.num_kept, shape.width}, x.scalar_type()), normalized;
  if (norm) normalized = empty_like_with(x, x_out.sizes(), x.scalar_type());
  Tensor size_out = empty_like_with(x, {batch, shape.num_kept}, at::kFloat);
  Tensor source = empty_like_with(x, {batch, shape.num_tokens}, at::kLong);
  if (source.numel() == 0) return {x_out, normalized, size_out, source};

  const Launcher launch(x);
  const Tensor x_rows = with_rows(x);
  const OptionalTensor sizes = per_token_acc(size, x);
  OptionalTensor branch_rows, weight, bias;
  if (branch) branch_rows = with_rows(*branch);
  if (norm && norm->weight) weight = norm->weight->contiguous();
  if (norm && norm->bias) bias = norm->bias->contiguous();
  bool aligned = rows_aligned({x_rows, x_out});
  for (const OptionalTensor& other : {branch_rows, weight, bias})
    aligned = aligned && (!other || rows_aligned({*other}));
  // Importance is ranked in its own precision; float16 and bfloat16 widen exactly.
  const bool wide = importance.scalar_type() == at::kDouble;
  const Tensor values = per_token_acc(wide ? head_mean(importance) : importance, importance);  // [B, N] or [B, H, N]
  const int64_t heads = values.dim() == 3 ? values.size(1) : 1;
  const auto averaged = [&] { return heads > 1 ? mean_of_heads(values, launch) : values; };
  Tensor order;
  if (wide || !shape.ranked_here()) order = rank_tokens(averaged(), shape, launch);

  TOKCOMP_DISPATCH_CUDA(x.scalar_type(), "prune_merge", [&] {
    using T = typename DeviceType<scalar_t>::type;
    PruneMergeParams<T> p{};
    p.x = input<T>(x_rows);
    p.x_stride_b = x_rows.stride(0);
    p.x_stride_n = x_rows.stride(1);
    if (branch_rows) {
      p.branch = input<T>(branch_rows);
      p.branch_stride_b = branch_rows->stride(0);
      p.branch_stride_n = branch_rows->stride(1);
    }
    p.order = order.defined() ? input<int>(order) : nullptr;
    p.size = input<float>(sizes);
    p.weight = input<T>(weight);
    p.bias = input<T>(bias);
    p.x_out = output<T>(x_out);
    p.normalized = norm ? output<T>(normalized) : nullptr;
    p.size_out = output<float>(size_out);
    p.source = output<int64_t>(source);
    p.shape = shape;
    p.plan = make_merge_plan<T>(shape, launch.limits());
    // The streaming kernel has no register left for a mean.
    const Tensor ranked = order.defined() || p.plan.resident ? values : averaged();
    p.importance = order.defined() ? nullptr : input<float>(ranked);
    p.importance_heads = static_cast<int>(heads);
    p.norm_eps = norm ? static_cast<float>(norm->eps) : 0.f;
    p.similarity_weighted_size = similarity_weighted_size;
    p.aligned = aligned;
    if (p.plan.resident) {
      launch(prune_merge_resident_kernel<T>, batch * p.plan.slices, p.plan.shared_bytes, p, p.plan.slices);
    } else {
      Tensor lists;
      if (shape.num_sources() > 0) {
        lists = empty_like_with(x, {batch, 3 * shape.num_sources() + shape.num_kept}, at::kInt);
        p.lists = output<int>(lists);
      }
      launch(prune_merge_streaming_kernel<T>, batch, p.plan.shared_bytes, p);
    }
  });
  return {x_out, normalized, size_out, source};
}

TOKCOMP_REGISTER_CUDA(prune_merge, prune_merge_cuda)

}  // namespace tokcomp::cuda
