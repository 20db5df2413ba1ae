// What the operators over a partition of the caller's refuse, as checks.h for the others; in Python, _partition_checks.
#pragma once

#include <c10/util/string_view.h>

#include <optional>

#include "checks.h"

namespace tokcomp {

inline void check_bipartite_merge(const Tensor& x, const Tensor& metric, const Tensor& role, int64_t r,
                                  const OptionalTensor& size, c10::string_view average,
                                  std::optional<double> threshold) {
  const char* op = "bipartite_merge";
  checks::dim(op, "x", x, "[B, N, C]");
  checks::floating(op, "x", x);
  const int64_t batch = x.size(0), num_tokens = x.size(1), most = std::max<int64_t>(num_tokens - 1, 0);
  checks::dim(op, "metric", metric, "[B, N, K]");
  checks::shape(op, "metric", metric, "[B, N, K]", {batch, num_tokens, metric.size(2)});
  checks::floating(op, "metric", metric);
  checks::device(op, "metric", metric, "x", x);
  checks::shape(op, "role", role, "[B, N]", {batch, num_tokens});
  checks::int64(op, "role", role);
  checks::device(op, "role", role, "x", x);
  checks::per_token(op, "size", size, "x", x, {batch, num_tokens});
  TORCH_CHECK_VALUE(r >= 0 && r <= most, op, ": r must be between 0 and ", most,
                    ", so that a destination is left, got ", r);
  TORCH_CHECK_VALUE(average == "size" || average == "mean" || average == "sum", op,
                    ": average must be one of size, mean, sum, got '", average, "'");
  TORCH_CHECK_VALUE(!threshold || (*threshold >= -1 && *threshold <= 1), op,
                    ": threshold must be between -1 and 1, as cosines are, got ", threshold.value_or(0));
}

inline void check_select_diverse(const Tensor& features, int64_t num_kept, const OptionalTensor& relevance,
                                 int64_t num_prefix_tokens, c10::string_view rule) {
  const char* op = "select_diverse";
  checks::dim(op, "features", features, "[B, N, K]");
  checks::floating(op, "features", features);
  const int64_t num_tokens = features.size(1);
  TORCH_CHECK_VALUE(rule == "farthest" || rule == "dpp", op, ": rule must be one of farthest, dpp, got '", rule, "'");
  TORCH_CHECK_VALUE(!relevance || rule == "dpp", op,
                    ": relevance must be None for the rule 'farthest', which asks for distances alone, got a tensor");
  checks::per_token(op, "relevance", relevance, "features", features, {features.size(0), num_tokens});
  checks::prefix(op, num_prefix_tokens, num_tokens);
  TORCH_CHECK_VALUE(num_kept >= num_prefix_tokens && num_kept <= num_tokens, op,
                    ": num_kept must be between num_prefix_tokens (", num_prefix_tokens, ") and ", num_tokens,
                    " tokens, got ", num_kept);
}

}  // namespace tokcomp
