#include "bipartite_merge.cuh"

#include <limits>
#include <optional>
#include <tuple>

#include "../common/partition_checks.h"
#include "launch.cuh"

namespace tokcomp::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor> bipartite_merge_cuda(const Tensor& x, const Tensor& metric, const Tensor& role,
                                                        int64_t r, const OptionalTensor& size, c10::string_view average,
                                                        std::optional<double> threshold) {
  constexpr const char* op = "bipartite_merge";
  check_bipartite_merge(x, metric, role, r, size, average, threshold);
  check_dtype(op, "x", x);
  const int64_t batch = x.size(0), width = x.size(2);
  const int num_tokens = to_int(op, "the number of tokens", x.size(1));
  const int num_kept = threshold ? num_tokens : num_tokens - static_cast<int>(r);
  Tensor x_out = empty_like_with(x, {batch, num_kept, width}, x.scalar_type());
  Tensor size_out = empty_like_with(x, {batch, num_kept}, at::kFloat);
  Tensor source = empty_like_with(x, {batch, num_tokens}, at::kLong);
  if (source.numel() == 0) return {x_out, size_out, source};

  const Launcher launch(x);
  const auto indices = [&](int64_t each) { return empty_like_with(x, {batch, each}, at::kInt); };
  const Tensor sources = indices(num_tokens), destinations = indices(num_tokens), counts = indices(2),
               joins = indices(num_tokens), order = indices(num_kept);
  const Tensor roles = role.contiguous();
  launch(partition_kernel, batch, 2 * kWarps * sizeof(int),
         PartitionParams{input<int64_t>(roles), output<int>(sources), output<int>(destinations), output<int>(counts),
                         output<int>(joins), num_tokens});
  if (r > 0) {
    const Tensor rows = with_rows(metric.scalar_type() == at::kDouble ? metric.to(at::kFloat) : metric);
    const Tensor inverse_norm = empty_like_with(x, {batch, num_tokens}, at::kFloat);
    const Tensor best = empty_like_with(x, {batch, num_tokens}, at::kFloat), match = indices(num_tokens);
    TOKCOMP_DISPATCH_CUDA(rows.scalar_type(), op, [&] {
      using T = typename DeviceType<scalar_t>::type;
      MatchParams<T> p{};
      p.metric = input<T>(rows);
      p.inverse_norm = input<float>(inverse_norm);
      p.sources = input<int>(sources);
      p.destinations = input<int>(destinations);
      p.counts = input<int>(counts);
      p.best = output<float>(best);
      p.match = output<int>(match);
      p.stride_b = rows.stride(0);
      p.stride_n = rows.stride(1);
      p.batch = batch;
      p.num_tokens = num_tokens;
      p.width = to_int(op, "the width of the metric", rows.size(2));
      p.aligned = rows_aligned({rows});
      launch_inverse_norms(InverseNormParams<T>{p.metric, output<float>(inverse_norm), p.stride_b, p.stride_n, batch,
                                                num_tokens, p.width, p.aligned},
                           launch);
      launch_matches(p, launch);
    });
    launch_joins({input<int>(sources), input<int>(counts), input<float>(best), input<int>(match), output<int>(joins),
                  batch, num_tokens, static_cast<int>(r),
                  threshold ? static_cast<float>(*threshold) : -std::numeric_limits<float>::infinity()},
                 launch);
  }
  launch(slot_kernel, batch, 2 * kWarps * sizeof(int),
         SlotParams{input<int>(joins), output<int>(indices(num_tokens)), output<int>(order), output<int64_t>(source),
                    num_tokens, num_kept});

  const Tensor x_rows = with_rows(x);
  const OptionalTensor sizes = per_token_acc(size, x);
  TOKCOMP_DISPATCH_CUDA(x.scalar_type(), op, [&] {
    using T = typename DeviceType<scalar_t>::type;
    JoinedRowsParams<T> p{};
    p.x = input<T>(x_rows);
    p.size = input<float>(sizes);
    p.joins = input<int>(joins);
    p.order = input<int>(order);
    p.x_out = output<T>(x_out);
    p.size_out = output<float>(size_out);
    p.stride_b = x_rows.stride(0);
    p.stride_n = x_rows.stride(1);
    p.batch = batch;
    p.width = width;
    p.num_tokens = num_tokens;
    p.num_kept = num_kept;
    p.average = average == "size" ? Average::kSize : average == "mean" ? Average::kMean : Average::kSum;
    p.aligned = rows_aligned({x_rows, x_out});
    launch_joined_rows(p, launch);
  });
  return {x_out, size_out, source};
}

}  // namespace

TOKCOMP_REGISTER_CUDA(bipartite_merge, bipartite_merge_cuda)

}  // namespace tokcomp::cuda
