#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "../common/registration.h"
#include "rows.h"

namespace tokcomp {
namespace {

Tensor masked_merge_backward_cpu(const Tensor& grad, const Tensor& destination) {
  check_masked_merge_backward(grad, destination);
  const int64_t batch = grad.size(0), num_tokens = grad.size(1), width = grad.size(2);
  const Tensor grad_rows = rows::dense_rows(grad), merged_into = destination.contiguous();
  Tensor out = at::empty({batch, num_tokens, width}, grad.options());

  TOKCOMP_DISPATCH_CPU(grad.scalar_type(), "masked_merge_backward_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<int64_t> num_sources(num_tokens);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t* targets = merged_into.const_data_ptr<int64_t>() + b * num_tokens;
        scalar_t* row_out = out.mutable_data_ptr<scalar_t>() + b * num_tokens * width;
        const auto row = [&](int64_t n) {
          return grad_rows.const_data_ptr<scalar_t>() + b * grad_rows.stride(0) + n * grad_rows.stride(1);
        };
        const auto merges = [&](int64_t n) { return targets[n] >= 0 && targets[n] < num_tokens && targets[n] != n; };
        const auto share = [&](int64_t n) { return acc_t(1) / acc_t(1 + num_sources[n]); };

        std::fill(num_sources.begin(), num_sources.end(), int64_t{0});
        for (int64_t n = 0; n < num_tokens; ++n) {
          if (merges(n)) ++num_sources[targets[n]];
        }
        for (int64_t n = 0; n < num_tokens; ++n, row_out += width) {
          const bool is_source = merges(n);
          if (!is_source && num_sources[n] == 0) {
            rows::copy(row(n), row_out, width);
            continue;
          }
          const int64_t target = is_source ? targets[n] : n;
          const scalar_t* members[2] = {row(n), row(target)};
          const acc_t weights[2] = {share(n), share(target)};
          rows::combine<scalar_t>(members, weights, is_source ? 2 : 1, acc_t(1), width, row_out);
        }
      }
    });
  });
  return out;
}

}  // namespace

TOKCOMP_REGISTER_CPU(_masked_merge_backward, masked_merge_backward_cpu)

}  // namespace tokcomp
