#include <ATen/ops/constant_pad_nd.h>

#include <cmath>
#include <tuple>

#include "attention_resident.cuh"
#include "attention_streaming.cuh"
#include "launch.cuh"
#include "partial_sums.cuh"

namespace tokcomp::cuda {
namespace {

template <int kWidth, typename T>
void launch_width(const AttentionParams<T>& p, const Launcher& launch) {
  if (p.num_tokens <= kResidentKeys) {
    launch_resident<kWidth>(p, launch);
  } else {
    launch_streaming<kWidth>(p, launch);
  }
}

// The kernels move 16 bytes at a time: rows of a multiple of 8 numbers, each on 16 bytes. A packed QKV tensor's are
// such.
Tensor whole_pieces(const Tensor& tensor, int64_t width) {
  if (tensor.size(3) == width && tensor.stride(3) == 1 && rows_aligned({tensor})) return tensor;
  return at::constant_pad_nd(tensor, {0, width - tensor.size(3)}).contiguous();
}

// out [B, H, N, D], stored as [B, N, H, D]; the class rows by heads [B, H, N].
std::tuple<Tensor, Tensor> attention_forward(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                             const OptionalTensor& size, std::optional<double> scale) {
  checks::qkv(op, q, k, v, size);
  TORCH_CHECK_TYPE(q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16, op,
                   ": q must be float16 or bfloat16 in CUDA C++, got ", checks::dtype_name(q),
                   "; TOKCOMP_BACKEND=triton takes it");
  TORCH_CHECK_VALUE(q.size(3) <= kWidest, op, ": q must have heads of at most ", kWidest,
                    " numbers in CUDA C++, got a tensor of shape ", checks::shape_name(q.sizes()),
                    "; TOKCOMP_BACKEND=triton takes it");
  const int64_t batch = q.size(0), heads = q.size(1), num_tokens = q.size(2), width = q.size(3);
  const int64_t padded = ceil_div(width, 8) * 8;
  const Tensor out = empty_like_with(q, {batch, num_tokens, heads, padded}, q.scalar_type());
  const Tensor cls_rows = empty_like_with(q, {batch, heads, num_tokens}, at::kFloat);
  const auto result = [&] {
    return std::tuple(padded == width ? out.transpose(1, 2) : out.narrow(3, 0, width).contiguous().transpose(1, 2),
                      cls_rows);
  };
  if (cls_rows.numel() == 0) return result();

  const Launcher launch(q);
  const Tensor q_rows = whole_pieces(q, padded), k_rows = whole_pieces(k, padded), v_rows = whole_pieces(v, padded);
  const OptionalTensor sizes = per_token_acc(size, q);
  const auto run = [&](auto element) {
    using T = decltype(element);
    AttentionParams<T> p{};
    p.q = input<T>(q_rows);
    p.k = input<T>(k_rows);
    p.v = input<T>(v_rows);
    p.size = input<float>(sizes);
    p.out = output<T>(out);
    p.cls = output<float>(cls_rows);
    p.q_stride_b = q_rows.stride(0);
    p.q_stride_h = q_rows.stride(1);
    p.q_stride_n = q_rows.stride(2);
    p.k_stride_b = k_rows.stride(0);
    p.k_stride_h = k_rows.stride(1);
    p.k_stride_n = k_rows.stride(2);
    p.v_stride_b = v_rows.stride(0);
    p.v_stride_h = v_rows.stride(1);
    p.v_stride_n = v_rows.stride(2);
    p.batch = batch;
    p.num_heads = to_int(op, "the number of heads", heads);
    p.num_tokens = to_int(op, "the number of tokens", num_tokens);
    p.width = static_cast<int>(padded);
    p.scale = static_cast<float>(scale.value_or(1. / std::sqrt(static_cast<double>(width)))) * kLog2E;
    if (padded <= 32) {
      launch_width<32>(p, launch);
    } else if (padded <= 48) {
      launch_width<48>(p, launch);
    } else if (padded <= 64) {
      launch_width<64>(p, launch);
    } else {
      launch_width<kWidest>(p, launch);
    }
  };
  q.scalar_type() == at::kHalf ? run(__half()) : run(__nv_bfloat16());
  return result();
}

std::tuple<Tensor, Tensor> attention_heads_cuda(const Tensor& q, const Tensor& k, const Tensor& v,
                                                const OptionalTensor& size, std::optional<double> scale) {
  return attention_forward("attention", q, k, v, size, scale);
}

std::tuple<Tensor, Tensor> attention_cuda(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& size,
                                          std::optional<double> scale) {
  const auto [out, cls_rows] = attention_forward("attention", q, k, v, size, scale);
  Tensor cls_attn = empty_like_with(q, {q.size(0), q.size(2)}, at::kFloat);
  if (cls_attn.numel() > 0) {
    launch_partial_sums({input<float>(cls_rows), output<float>(cls_attn), q.size(0), q.size(1),
                         static_cast<int>(q.size(2)), static_cast<float>(q.size(1))},
                        Launcher(q));
  }
  return {out, cls_attn};
}

}  // namespace

TOKCOMP_OFFER_CUDA(attention, attention_cuda)
TOKCOMP_OFFER_CUDA(_attention_heads, attention_heads_cuda)

}  // namespace tokcomp::cuda
