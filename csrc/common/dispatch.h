// Element types: which each device takes, and what they accumulate in.
#pragma once

#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/core/Tensor.h>

#include <optional>

#include "min_size.h"

// Runs a lambda with `scalar_t` set to the tensor's type; the operator's checks have refused all other types before.
#define TOKCOMP_DISPATCH_CPU(type, name, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::ScalarType::Half, at::ScalarType::BFloat16, type, name, __VA_ARGS__)

#define TOKCOMP_DISPATCH_CUDA(type, name, ...)                                              \
  AT_DISPATCH_SWITCH(type, name,                                                            \
                     AT_DISPATCH_CASE(at::ScalarType::Float, __VA_ARGS__) AT_DISPATCH_CASE( \
                         at::ScalarType::Half, __VA_ARGS__) AT_DISPATCH_CASE(at::ScalarType::BFloat16, __VA_ARGS__))

namespace tokcomp {

// float for float16, bfloat16 and float; double for double.
template <typename scalar_t>
using acc_type = at::opmath_type<scalar_t>;

inline at::ScalarType acc_scalar_type(at::ScalarType type) { return at::toOpMathType(type); }

// Sizes stay above zero wherever they are read or written; NaN becomes the least size.
template <typename acc_t>
constexpr acc_t effective_size(acc_t size) {
  return size > acc_t(kMinSize) ? size : acc_t(kMinSize);
}

// A value per token, [B, N] of any floating type and strides, contiguous in the type that `like` accumulates in.
inline at::Tensor per_token_acc(const at::Tensor& values, const at::Tensor& like) {
  return values.to(acc_scalar_type(like.scalar_type())).contiguous();
}

inline std::optional<at::Tensor> per_token_acc(const std::optional<at::Tensor>& values, const at::Tensor& like) {
  if (!values.has_value()) return std::nullopt;
  return per_token_acc(*values, like);
}

// Importance [B, N] as it is; of heads, [B, H, N], their mean, added up in the order of heads.
inline at::Tensor head_mean(const at::Tensor& importance) {
  if (importance.dim() == 2) return importance;
  const at::Tensor heads = importance.to(acc_scalar_type(importance.scalar_type()));
  at::Tensor sum = heads.select(1, 0).clone();
  for (int64_t head = 1; head < heads.size(1); ++head) sum.add_(heads.select(1, head));
  return sum.div_(heads.size(1));
}

}  // namespace tokcomp
