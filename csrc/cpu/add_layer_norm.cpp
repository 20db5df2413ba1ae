#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "../common/registration.h"
#include "layer_norm.h"

namespace tokcomp {
namespace {

// Elements for which a thread is worth waking.
constexpr int64_t kGrain = 16384;

// Where the rows lie. The first tokens of each image, x[:, :M], are read in place; what lies otherwise is copied.
struct RowLayout {
  explicit RowLayout(const Tensor& x) : tensor(x), rows_per_group(1), row_stride(0), group_stride(x.size(-1)) {
    if (x.dim() == 3 && x.stride(2) == 1) {
      rows_per_group = std::max<int64_t>(1, x.size(1));
      row_stride = x.stride(1);
      group_stride = x.stride(0);
    } else {
      tensor = x.contiguous();
    }
  }

  int64_t offset(int64_t row) const { return row / rows_per_group * group_stride + row % rows_per_group * row_stride; }

  Tensor tensor;
  int64_t rows_per_group, row_stride, group_stride;
};

std::tuple<Tensor, Tensor> add_layer_norm_cpu(const Tensor& x, const Tensor& branch, const OptionalTensor& weight_in,
                                              const OptionalTensor& bias_in, double norm_eps) {
  check_add_layer_norm(x, branch, weight_in, bias_in, norm_eps);
  const int64_t width = x.size(-1), num_rows = width > 0 ? x.numel() / width : 0;
  const RowLayout left(x), right(branch);
  const Tensor weight = weight_in ? weight_in->contiguous() : Tensor(),
               bias = bias_in ? bias_in->contiguous() : Tensor();
  Tensor total = at::empty(x.sizes(), x.options()), normalized = at::empty(x.sizes(), x.options());
  TOKCOMP_DISPATCH_CPU(x.scalar_type(), "add_layer_norm_cpu", [&] {
    const auto data = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<scalar_t>() : nullptr; };
    const LayerNorm<scalar_t> norm{data(weight), data(bias), static_cast<acc_type<scalar_t>>(norm_eps), width};
    const scalar_t *left_data = data(left.tensor), *right_data = data(right.tensor);
    scalar_t *total_data = total.mutable_data_ptr<scalar_t>(), *out = normalized.mutable_data_ptr<scalar_t>();
    const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
    at::parallel_for(0, num_rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const int64_t offset = row * width;
        rows::add(left_data + left.offset(row), right_data + right.offset(row), total_data + offset, width);
        norm(total_data + offset, out + offset);
      }
    });
  });
  return {total, normalized};
}

}  // namespace

TOKCOMP_REGISTER_CPU(add_layer_norm, add_layer_norm_cpu)

}  // namespace tokcomp
