#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <cmath>

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "../common/registration.h"
#include "rows.h"

namespace tokcomp {
namespace {

Tensor merge_backward_cpu(const Tensor& grad, const Tensor& source, const OptionalTensor& size) {
  check_merge_backward(grad, source, size);
  const int64_t batch = grad.size(0), num_kept = grad.size(1), width = grad.size(2), num_tokens = source.size(1);
  const Tensor grad_rows = rows::dense_rows(grad), slot_of = source.contiguous();
  const OptionalTensor size_in = per_token_acc(size, grad);
  Tensor out = at::empty({batch, num_tokens, width}, grad.options());

  TOKCOMP_DISPATCH_CPU(grad.scalar_type(), "merge_backward_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      std::vector<acc_t> total(num_kept);
      for (int64_t b = begin; b < end; ++b) {
        const scalar_t* grad_image = grad_rows.const_data_ptr<scalar_t>() + b * grad_rows.stride(0);
        const acc_t* sizes = size_in ? size_in->const_data_ptr<acc_t>() + b * num_tokens : nullptr;
        const int64_t* slots = slot_of.const_data_ptr<int64_t>() + b * num_tokens;
        scalar_t* row_out = out.mutable_data_ptr<scalar_t>() + b * num_tokens * width;
        const auto weight = [sizes](int64_t n) { return sizes ? effective_size(sizes[n]) : acc_t(1); };
        const auto inside = [num_kept](int64_t slot) { return slot >= 0 && slot < num_kept; };

        std::fill(total.begin(), total.end(), acc_t(0));
        for (int64_t n = 0; n < num_tokens; ++n) {
          if (inside(slots[n])) total[slots[n]] += weight(n);
        }
        for (int64_t n = 0; n < num_tokens; ++n, row_out += width) {
          if (!inside(slots[n])) {
            std::fill_n(row_out, width, scalar_t(0));
            continue;
          }
          const scalar_t* row = grad_image + slots[n] * grad_rows.stride(1);
          const acc_t own = weight(n);
          if (own == total[slots[n]] && std::isfinite(own)) {  // of an infinite size no share is known: NaN
            rows::copy(row, row_out, width);
          } else {
            rows::combine<scalar_t>(&row, &own, 1, total[slots[n]], width, row_out);
          }
        }
      }
    });
  });
  return out;
}

}  // namespace

TOKCOMP_REGISTER_CPU(_merge_backward, merge_backward_cpu)

}  // namespace tokcomp
