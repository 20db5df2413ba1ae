#include "prune_merge.cuh"

#include <algorithm>
#include <tuple>

#include "launch.cuh"

namespace tokcomp::cuda {
namespace {

// [B, N] int32: the token at each rank, for images that the kernel does not rank itself.
Tensor rank_tokens(const Tensor& importance, int num_tokens, int num_prefix_tokens, const Launcher& launch) {
  const Tensor order = empty_like_with(importance, importance.sizes(), at::kInt);
  const int64_t batch = importance.size(0);
  int* out = output<int>(order);
  if (importance.scalar_type() == at::kDouble) {
    launch_rank(RankParams<double, int>{input<double>(importance), out, batch, num_tokens, num_prefix_tokens}, launch);
  } else {
    launch_rank(RankParams<float, int>{input<float>(importance), out, batch, num_tokens, num_prefix_tokens}, launch);
  }
  return order;
}

std::tuple<Tensor, Tensor, Tensor> prune_merge_cuda(const Tensor& x, const Tensor& importance, int64_t num_prune_kept,
                                                    int64_t num_merge_kept, const OptionalTensor& size,
                                                    int64_t num_prefix_tokens, bool similarity_weighted_size) {
  constexpr const char* op = "prune_merge";
  check_prune_merge(x, importance, num_prune_kept, num_merge_kept, size, num_prefix_tokens);
  check_dtype(op, "x", x);
  const int64_t batch = x.size(0), width = x.size(2);
  const int num_tokens = to_int(op, "the number of tokens", x.size(1)), prefix = static_cast<int>(num_prefix_tokens);
  const int num_alive = static_cast<int>(std::min<int64_t>(num_tokens, num_prune_kept));
  const int num_kept = static_cast<int>(std::min<int64_t>(num_alive, num_merge_kept));
  Tensor x_out = empty_like_with(x, {batch, num_kept, width}, x.scalar_type());
  Tensor size_out = empty_like_with(x, {batch, num_kept}, at::kFloat);
  Tensor source = empty_like_with(x, {batch, num_tokens}, at::kLong);
  if (source.numel() == 0) return {x_out, size_out, source};

  const Launcher launch(x);
  const Tensor x_rows = with_rows(x);
  const OptionalTensor sizes = per_token_acc(size, x);
  // Importance is ranked in its own precision; float16 and bfloat16 widen exactly.
  const bool wide = importance.scalar_type() == at::kDouble;
  const Tensor values = wide ? importance.contiguous() : per_token_acc(importance, x);
  Tensor order;
  if (wide || prune_merge_needs_order(num_tokens)) order = rank_tokens(values, num_tokens, prefix, launch);
  const Tensor best_slot = empty_like_with(x, {batch, num_alive - num_kept}, at::kInt);
  const Tensor best_cosine = empty_like_with(x, {batch, num_alive - num_kept}, at::kFloat);

  TOKCOMP_DISPATCH_CUDA(x.scalar_type(), op, [&] {
    using T = typename DeviceType<scalar_t>::type;
    PruneMergeParams<T> p{};
    p.x = input<T>(x_rows);
    p.importance = wide ? nullptr : input<float>(values);
    p.order = order.defined() ? input<int>(order) : nullptr;
    p.size = input<float>(sizes);
    p.x_out = output<T>(x_out);
    p.size_out = output<float>(size_out);
    p.source = output<int64_t>(source);
    p.best_slot = output<int>(best_slot);
    p.best_cosine = output<float>(best_cosine);
    p.x_stride_b = x_rows.stride(0);
    p.x_stride_n = x_rows.stride(1);
    p.batch = batch;
    p.width = width;
    p.num_tokens = num_tokens;
    p.num_prefix_tokens = prefix;
    p.num_alive = num_alive;
    p.num_kept = num_kept;
    p.similarity_weighted_size = similarity_weighted_size;
    p.aligned = rows_aligned({x_rows, x_out});
    launch_prune_merge(p, launch);
  });
  return {x_out, size_out, source};
}

}  // namespace

TOKCOMP_REGISTER_CUDA(prune_merge, prune_merge_cuda)

}  // namespace tokcomp::cuda
