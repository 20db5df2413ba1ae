// What each operator refuses, in the words of tokcomp_kernels/_checks.py: "<op>: <argument> must <rule>, got <what>".
// One table of wrong inputs tests both by message.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <string>

namespace tokcomp {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

namespace checks {

inline std::string dtype_name(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf: return "float16";
    case at::kBFloat16: return "bfloat16";
    case at::kFloat: return "float32";
    case at::kDouble: return "float64";
    case at::kByte: return "uint8";
    case at::kChar: return "int8";
    case at::kShort: return "int16";
    case at::kInt: return "int32";
    case at::kLong: return "int64";
    case at::kBool: return "bool";
    default: return c10::toString(tensor.scalar_type());
  }
}

inline std::string shape_name(at::IntArrayRef sizes) {
  std::ostringstream text;
  text << '[';
  for (size_t i = 0; i < sizes.size(); ++i) text << (i ? ", " : "") << sizes[i];
  text << ']';
  return text.str();
}

// The dispatcher takes None for a tensor that the schema demands.
inline void defined(const char* op, const char* argument, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.defined(), op, ": ", argument, " must be a tensor, got None");
}

inline void dim(const char* op, const char* argument, const Tensor& tensor, const char* letters) {
  defined(op, argument, tensor);
  const std::string text(letters);
  const int64_t want = std::count(text.begin(), text.end(), ',') + 1;
  TORCH_CHECK_VALUE(tensor.dim() == want, op, ": ", argument, " must be ", letters, ", got a tensor of shape ",
                    shape_name(tensor.sizes()));
}

inline void shape(const char* op, const char* argument, const Tensor& tensor, const char* letters,
                  at::IntArrayRef sizes) {
  defined(op, argument, tensor);
  TORCH_CHECK_VALUE(tensor.sizes() == sizes, op, ": ", argument, " must be ", letters, " = ", shape_name(sizes),
                    ", got a tensor of shape ", shape_name(tensor.sizes()));
}

inline void floating(const char* op, const char* argument, const Tensor& tensor) {
  const auto type = tensor.scalar_type();
  TORCH_CHECK_TYPE(type == at::kHalf || type == at::kBFloat16 || type == at::kFloat || type == at::kDouble, op, ": ",
                   argument, " must be float16, bfloat16, float32 or float64, got ", dtype_name(tensor));
}

inline void device(const char* op, const char* argument, const Tensor& tensor, const char* other_name,
                   const Tensor& other) {
  TORCH_CHECK_VALUE(tensor.device() == other.device(), op, ": ", argument, " must be on the device of ", other_name,
                    " (", other.device().str(), "), got ", tensor.device().str());
}

inline void like(const char* op, const char* argument, const Tensor& tensor, const char* other_name,
                 const Tensor& other) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == other.scalar_type(), op, ": ", argument, " must have the dtype of ",
                   other_name, " (", dtype_name(other), "), got ", dtype_name(tensor));
  device(op, argument, tensor, other_name, other);
}

// A floating value per token, [B, N], such as size, token_mask or importance.
inline void per_token(const char* op, const char* argument, const Tensor& tensor, const char* other_name,
                      const Tensor& other, at::IntArrayRef sizes) {
  shape(op, argument, tensor, "[B, N]", sizes);
  floating(op, argument, tensor);
  device(op, argument, tensor, other_name, other);
}

inline void per_token(const char* op, const char* argument, const OptionalTensor& tensor, const char* other_name,
                      const Tensor& other, at::IntArrayRef sizes) {
  if (tensor.has_value()) per_token(op, argument, *tensor, other_name, other, sizes);
}

// A value per token, [B, N], or several whose mean counts, [B, H, N].
inline void importance(const char* op, const Tensor& tensor, const Tensor& x) {
  const int64_t batch = x.size(0), num_tokens = x.size(1);
  if (!tensor.defined() || tensor.dim() != 3) return per_token(op, "importance", tensor, "x", x, {batch, num_tokens});
  const int64_t heads = tensor.size(1);
  TORCH_CHECK_VALUE(heads >= 1, op, ": importance must have at least one head, got a tensor of shape ",
                    shape_name(tensor.sizes()));
  shape(op, "importance", tensor, "[B, H, N]", {batch, heads, num_tokens});
  floating(op, "importance", tensor);
  device(op, "importance", tensor, "x", x);
}

inline void int64(const char* op, const char* argument, const Tensor& tensor) {
  TORCH_CHECK_TYPE(tensor.scalar_type() == at::kLong, op, ": ", argument, " must be int64, got ", dtype_name(tensor));
}

inline void source_map(const char* op, const Tensor& source, const char* other_name, const Tensor& other) {
  dim(op, "source", source, "[B, N]");
  int64(op, "source", source);
  device(op, "source", source, other_name, other);
  TORCH_CHECK_VALUE(source.size(0) == other.size(0), op, ": source must have the batch size of ", other_name, " (",
                    other.size(0), "), got ", source.size(0));
}

inline void prefix(const char* op, int64_t num_prefix_tokens, int64_t num_tokens) {
  TORCH_CHECK_VALUE(num_prefix_tokens >= 0 && num_prefix_tokens <= num_tokens, op,
                    ": num_prefix_tokens must be between 0 and the number of tokens (", num_tokens, "), got ",
                    num_prefix_tokens);
}

inline void positive_eps(const char* op, double eps) {
  TORCH_CHECK_VALUE(eps > 0, op, ": eps must be positive, got ", eps);
}

// Heads [B, H, N, D] that are no numbers wide have no scale of their own, D ** -0.5.
inline void head_width(const char* op, const char* argument, const Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.size(3) >= 1, op, ": ", argument,
                    " must have heads of at least one number (D >= 1), got a tensor of shape ",
                    shape_name(tensor.sizes()));
}

inline void qk(const char* op, const Tensor& q, const Tensor& k) {
  dim(op, "q", q, "[B, H, N, D]");
  floating(op, "q", q);
  TORCH_CHECK_VALUE(q.size(2) >= 1, op, ": q must hold at least one token, got a tensor of shape ",
                    shape_name(q.sizes()));
  head_width(op, "q", q);
  shape(op, "k", k, "[B, H, N, D]", q.sizes());
  like(op, "k", k, "q", q);
}

inline void qkv(const char* op, const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& size) {
  qk(op, q, k);
  shape(op, "v", v, "[B, H, N, D]", q.sizes());
  like(op, "v", v, "q", q);
  per_token(op, "size", size, "q", q, {q.size(0), q.size(2)});
}

}  // namespace checks

inline void check_class_attention_sort(const Tensor& q_cls, const Tensor& k, const OptionalTensor& size,
                                       int64_t num_prefix_tokens) {
  const char* op = "class_attention_sort";
  checks::dim(op, "k", k, "[B, H, N, D]");
  checks::floating(op, "k", k);
  checks::head_width(op, "k", k);
  checks::shape(op, "q_cls", q_cls, "[B, H, D]", {k.size(0), k.size(1), k.size(3)});
  checks::like(op, "q_cls", q_cls, "k", k);
  checks::per_token(op, "size", size, "k", k, {k.size(0), k.size(2)});
  checks::prefix(op, num_prefix_tokens, k.size(2));
}

inline void check_prune_merge(const Tensor& x, const Tensor& importance, int64_t num_prune_kept, int64_t num_merge_kept,
                              const OptionalTensor& size, int64_t num_prefix_tokens, const char* op = "prune_merge") {
  checks::dim(op, "x", x, "[B, N, C]");
  checks::floating(op, "x", x);
  const int64_t batch = x.size(0), num_tokens = x.size(1);
  checks::importance(op, importance, x);
  checks::per_token(op, "size", size, "x", x, {batch, num_tokens});
  checks::prefix(op, num_prefix_tokens, num_tokens);
  TORCH_CHECK_VALUE(num_prune_kept >= num_prefix_tokens, op, ": num_prune_kept must be at least num_prefix_tokens (",
                    num_prefix_tokens, "), got ", num_prune_kept);
  TORCH_CHECK_VALUE(num_merge_kept >= std::min(num_prune_kept, num_tokens) || num_merge_kept > num_prefix_tokens, op,
                    ": num_merge_kept must be more than num_prefix_tokens (", num_prefix_tokens,
                    ") where tokens merge, which need a destination, got ", num_merge_kept);
}

namespace checks {

// What is added to x, and the LayerNorm over its last dimension.
inline void branch_and_norm(const char* op, const Tensor& x, const char* letters, const Tensor& branch,
                            const OptionalTensor& weight, const OptionalTensor& bias, double norm_eps) {
  shape(op, "branch", branch, letters, x.sizes());
  like(op, "branch", branch, "x", x);
  const auto per_channel = [&](const char* argument, const OptionalTensor& tensor) {
    if (!tensor.has_value()) return;
    shape(op, argument, *tensor, "[C]", x.sizes().slice(x.dim() - 1));
    like(op, argument, *tensor, "x", x);
  };
  per_channel("weight", weight);
  per_channel("bias", bias);
  TORCH_CHECK_VALUE(norm_eps >= 0, op, ": norm_eps must be at least 0, got ", norm_eps);
}

}  // namespace checks

inline void check_prune_merge_norm(const Tensor& x, const Tensor& branch, const Tensor& importance,
                                   int64_t num_prune_kept, int64_t num_merge_kept, const OptionalTensor& weight,
                                   const OptionalTensor& bias, const OptionalTensor& size, int64_t num_prefix_tokens,
                                   double norm_eps) {
  const char* op = "prune_merge_norm";
  check_prune_merge(x, importance, num_prune_kept, num_merge_kept, size, num_prefix_tokens, op);
  checks::branch_and_norm(op, x, "[B, N, C]", branch, weight, bias, norm_eps);
}

inline void check_add_layer_norm(const Tensor& x, const Tensor& branch, const OptionalTensor& weight,
                                 const OptionalTensor& bias, double norm_eps) {
  const char* op = "add_layer_norm";
  checks::defined(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1, op, ": x must be [..., C], got a tensor of shape ", checks::shape_name(x.sizes()));
  checks::floating(op, "x", x);
  checks::branch_and_norm(op, x, "[..., C]", branch, weight, bias, norm_eps);
}

inline void check_scores(const char* op, const Tensor& scores, const Tensor& token_mask, double eps) {
  checks::dim(op, "scores", scores, "[B, H, N, N]");
  const int64_t batch = scores.size(0), num_tokens = scores.size(3);
  checks::shape(op, "scores", scores, "[B, H, N, N]", {batch, scores.size(1), num_tokens, num_tokens});
  checks::floating(op, "scores", scores);
  checks::per_token(op, "token_mask", token_mask, "scores", scores, {batch, num_tokens});
  checks::positive_eps(op, eps);
}

inline void check_masked_softmax(const Tensor& scores, const Tensor& token_mask, double eps) {
  check_scores("masked_softmax", scores, token_mask, eps);
}

inline void check_masked_softmax_backward(const Tensor& grad, const Tensor& scores, const Tensor& token_mask,
                                          double eps) {
  const char* op = "_masked_softmax_backward";
  check_scores(op, scores, token_mask, eps);
  checks::shape(op, "grad", grad, "[B, H, N, N]", scores.sizes());
  checks::like(op, "grad", grad, "scores", scores);
}

inline void check_masked_attention(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                   const Tensor& token_mask, const OptionalTensor& size, double eps) {
  checks::qkv(op, q, k, v, size);
  checks::per_token(op, "token_mask", token_mask, "q", q, {q.size(0), q.size(2)});
  checks::positive_eps(op, eps);
}

inline void check_masked_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                            const Tensor& token_mask, const OptionalTensor& size, double eps) {
  const char* op = "_masked_attention_backward";
  check_masked_attention(op, q, k, v, token_mask, size, eps);
  checks::shape(op, "grad_out", grad_out, "[B, H, N, D]", q.sizes());
  checks::like(op, "grad_out", grad_out, "q", q);
}

inline void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& size) {
  checks::qkv("attention", q, k, v, size);
}

inline void check_attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k, const Tensor& v,
                                     const OptionalTensor& size) {
  const char* op = "_attention_backward";
  checks::qkv(op, q, k, v, size);
  checks::shape(op, "grad_out", grad_out, "[B, H, N, D]", q.sizes());
  checks::like(op, "grad_out", grad_out, "q", q);
}

inline void check_attention_received(const Tensor& q, const Tensor& k, const OptionalTensor& size,
                                     int64_t num_prefix_tokens) {
  const char* op = "attention_received";
  checks::qk(op, q, k);
  checks::per_token(op, "size", size, "q", q, {q.size(0), q.size(2)});
  checks::prefix(op, num_prefix_tokens, q.size(2));
}

inline void check_tome_merge(const Tensor& x, const Tensor& metric, int64_t r, const OptionalTensor& size,
                             int64_t num_prefix_tokens) {
  const char* op = "tome_merge";
  checks::dim(op, "x", x, "[B, N, C]");
  checks::floating(op, "x", x);
  checks::dim(op, "metric", metric, "[B, N, K]");
  checks::shape(op, "metric", metric, "[B, N, K]", {x.size(0), x.size(1), metric.size(2)});
  checks::floating(op, "metric", metric);
  checks::device(op, "metric", metric, "x", x);
  checks::per_token(op, "size", size, "x", x, {x.size(0), x.size(1)});
  checks::prefix(op, num_prefix_tokens, x.size(1));
  TORCH_CHECK_VALUE(r >= 0, op, ": r must be at least 0, got ", r);
}

inline void check_unmerge(const Tensor& x, const Tensor& source, const OptionalTensor& pruned_fill) {
  const char* op = "unmerge";
  checks::dim(op, "x", x, "[B, M, C]");
  checks::floating(op, "x", x);
  checks::source_map(op, source, "x", x);
  if (pruned_fill.has_value()) {
    checks::shape(op, "pruned_fill", *pruned_fill, "[B, N, C]", {x.size(0), source.size(1), x.size(2)});
    checks::like(op, "pruned_fill", *pruned_fill, "x", x);
  }
}

inline void check_masked_merge(const Tensor& x, const Tensor& importance, const Tensor& token_mask,
                               const Tensor& counts, const OptionalTensor& size, int64_t num_prefix_tokens,
                               std::optional<double> min_weighted_size) {
  const char* op = "masked_merge";
  checks::dim(op, "x", x, "[B, N, C]");
  checks::floating(op, "x", x);
  const int64_t batch = x.size(0), num_tokens = x.size(1);
  checks::per_token(op, "importance", importance, "x", x, {batch, num_tokens});
  checks::per_token(op, "token_mask", token_mask, "x", x, {batch, num_tokens});
  checks::defined(op, "counts", counts);
  TORCH_CHECK_VALUE(counts.dim() == 1 && counts.size(0) == 2, op,
                    ": counts must be [num_before_merge, num_merge_kept], got a tensor of shape ",
                    checks::shape_name(counts.sizes()));
  checks::int64(op, "counts", counts);
  checks::device(op, "counts", counts, "x", x);
  checks::per_token(op, "size", size, "x", x, {batch, num_tokens});
  checks::prefix(op, num_prefix_tokens, num_tokens);
  TORCH_CHECK_VALUE(!min_weighted_size || !std::isnan(*min_weighted_size), op,
                    ": min_weighted_size must be a number, got nan");
}

inline void check_masked_merge_backward(const Tensor& grad, const Tensor& destination) {
  const char* op = "_masked_merge_backward";
  checks::dim(op, "grad", grad, "[B, N, C]");
  checks::floating(op, "grad", grad);
  checks::shape(op, "destination", destination, "[B, N]", {grad.size(0), grad.size(1)});
  checks::int64(op, "destination", destination);
  checks::device(op, "destination", destination, "grad", grad);
}

inline void check_merge_backward(const Tensor& grad, const Tensor& source, const OptionalTensor& size) {
  const char* op = "_merge_backward";
  checks::dim(op, "grad", grad, "[B, M, C]");
  checks::floating(op, "grad", grad);
  checks::source_map(op, source, "grad", grad);
  checks::per_token(op, "size", size, "grad", grad, {source.size(0), source.size(1)});
}

inline void check_unmerge_backward(const Tensor& grad, const Tensor& source, int64_t num_tokens) {
  const char* op = "_unmerge_backward";
  checks::dim(op, "grad", grad, "[B, N, C]");
  checks::floating(op, "grad", grad);
  checks::source_map(op, source, "grad", grad);
  TORCH_CHECK_VALUE(source.size(1) == grad.size(1), op, ": source must have the tokens of grad (", grad.size(1),
                    "), got ", source.size(1));
  TORCH_CHECK_VALUE(num_tokens >= 0, op, ": num_tokens must be at least 0, got ", num_tokens);
}

}  // namespace tokcomp
