#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "../common/registration.h"
#include "rows.h"

namespace tokcomp {
namespace {

Tensor unmerge_cpu(const Tensor& x, const Tensor& source, const OptionalTensor& pruned_fill) {
  check_unmerge(x, source, pruned_fill);
  const int64_t batch = x.size(0), num_kept = x.size(1), width = x.size(2), num_tokens = source.size(1);
  const Tensor x_rows = rows::dense_rows(x), slot_of = source.contiguous();
  const Tensor fill_rows = pruned_fill ? rows::dense_rows(*pruned_fill) : Tensor();
  Tensor out = at::empty({batch, num_tokens, width}, x.options());

  TOKCOMP_DISPATCH_CPU(x.scalar_type(), "unmerge_cpu", [&] {
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const scalar_t* x_image = x_rows.const_data_ptr<scalar_t>() + b * x_rows.stride(0);
        const int64_t* slots = slot_of.const_data_ptr<int64_t>() + b * num_tokens;
        scalar_t* row_out = out.mutable_data_ptr<scalar_t>() + b * num_tokens * width;
        for (int64_t n = 0; n < num_tokens; ++n, row_out += width) {
          if (slots[n] >= 0 && slots[n] < num_kept) {
            rows::copy(x_image + slots[n] * x_rows.stride(1), row_out, width);
          } else if (fill_rows.defined()) {
            rows::copy(fill_rows.const_data_ptr<scalar_t>() + b * fill_rows.stride(0) + n * fill_rows.stride(1),
                       row_out, width);
          } else {
            std::fill_n(row_out, width, scalar_t(0));
          }
        }
      }
    });
  });
  return out;
}

Tensor unmerge_backward_cpu(const Tensor& grad, const Tensor& source, int64_t num_tokens) {
  check_unmerge_backward(grad, source, num_tokens);
  const int64_t batch = grad.size(0), num_positions = grad.size(1), width = grad.size(2);
  const Tensor grad_rows = rows::dense_rows(grad), slot_of = source.contiguous();
  Tensor out = at::empty({batch, num_tokens, width}, grad.options());

  TOKCOMP_DISPATCH_CPU(grad.scalar_type(), "unmerge_backward_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      rows::Groups groups;
      std::vector<const scalar_t*> members;
      for (int64_t b = begin; b < end; ++b) {
        const scalar_t* grad_image = grad_rows.const_data_ptr<scalar_t>() + b * grad_rows.stride(0);
        scalar_t* row_out = out.mutable_data_ptr<scalar_t>() + b * num_tokens * width;
        groups.build(slot_of.const_data_ptr<int64_t>() + b * num_positions, num_positions, num_tokens);
        for (int64_t slot = 0; slot < num_tokens; ++slot, row_out += width) {
          members.clear();
          for (int64_t i = 0; i < groups.count(slot); ++i) {
            members.push_back(grad_image + groups.items(slot)[i] * grad_rows.stride(1));
          }
          rows::combine<scalar_t>(members.data(), nullptr, groups.count(slot), acc_t(1), width, row_out);
        }
      }
    });
  });
  return out;
}

}  // namespace

TOKCOMP_REGISTER_CPU(unmerge, unmerge_cpu)
TOKCOMP_REGISTER_CPU(_unmerge_backward, unmerge_backward_cpu)

}  // namespace tokcomp
