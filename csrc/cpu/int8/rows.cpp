// What lies around a product of int8 on CPU: rows of activations to bytes with a scale each, and products back.
//
// oneDNN multiplies the bytes. Its own scales are one for all rows; a scale per row keeps an image's result apart from
// what else is in the batch, so the rows are scaled here, in the pass that adds the bias and applies the activation.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "../vector.h"

namespace tokcomp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Floats = Vec<float>;

// Elements for which a thread is worth waking.
constexpr int64_t kInt8Grain = 16384;

int64_t grain_of(int64_t width) { return std::max<int64_t>(1, kInt8Grain / std::max<int64_t>(1, width)); }

// The greatest magnitude of a row; NaN if it holds one.
float magnitude(const float* row, int64_t width) {
  Floats most(0.f);
  int64_t i = 0;
  for (; i + kLanes<float> <= width; i += kLanes<float>) most = at::vec::maximum(most, Floats::loadu(row + i).abs());
  if (i < width) most = at::vec::maximum(most, Floats::loadu(row + i, width - i).abs());
  return at::vec::vec_reduce_all<float>([](Floats& a, Floats& b) { return at::vec::maximum(a, b); }, most);
}

// out[i] = row[i] / scale to the nearest, ties to even, about `zero`; returns the scale, magnitude / levels.
float quantize_row(const float* row, uint8_t* out, int64_t width, int64_t levels) {
  const float most = magnitude(row, width), scale = most / static_cast<float>(levels);
  // A row of zeros, or of what is too small to have an inverse, is zeros; NaN and infinity stay in the scale.
  const float inverse = std::isnormal(scale) ? 1.f / scale : 0.f;
  const int32_t zero = static_cast<int32_t>(levels) + 1;
  const Floats factor(inverse), greatest(static_cast<float>(levels)), least(-static_cast<float>(levels));
  alignas(64) int32_t whole[kLanes<float>];
  for (int64_t i = 0; i < width; i += kLanes<float>) {
    const int64_t count = std::min<int64_t>(kLanes<float>, width - i);
    const Floats value = (count == kLanes<float> ? Floats::loadu(row + i) : Floats::loadu(row + i, count)) * factor;
    at::vec::convert_to_int_of_same_size<float>(at::vec::clamp(value.round(), least, greatest)).store(whole);
    if (count == kLanes<float>) {
      for (int64_t j = 0; j < kLanes<float>; ++j) out[i + j] = static_cast<uint8_t>(whole[j] + zero);
    } else {
      for (int64_t j = 0; j < count; ++j) out[i + j] = static_cast<uint8_t>(whole[j] + zero);
    }
  }
  return inverse == 0.f && std::isfinite(scale) ? 0.f : scale;
}

TOKCOMP_INLINE Floats gelu(const Floats& x) {
  return x * Floats(0.5f) * (Floats(1.f) + (x * Floats(static_cast<float>(M_SQRT1_2))).erf());
}

// One row of products: times the row's scale, plus the bias and the residual, through the activation. In place is fine.
template <bool kGelu>
void rescale_row(const float* row, float scale, const float* bias, const float* residual, float* out, int64_t width) {
  const Floats factor(scale);
  for (int64_t i = 0; i < width; i += kLanes<float>) {
    const int64_t count = std::min<int64_t>(kLanes<float>, width - i);
    const auto load = [&](const float* from) {
      return count == kLanes<float> ? Floats::loadu(from + i) : Floats::loadu(from + i, count);
    };
    Floats value = bias ? at::vec::fmadd(load(row), factor, load(bias)) : load(row) * factor;
    if (residual) value = value + load(residual);
    if constexpr (kGelu) value = gelu(value);
    value.store(out + i, static_cast<int>(count));
  }
}

const float* data_of(const OptionalTensor& tensor) { return tensor ? tensor->const_data_ptr<float>() : nullptr; }

std::tuple<Tensor, Tensor> quantize_rows_cpu(const Tensor& x, int64_t levels) {
  const int64_t width = x.size(-1), num_rows = width > 0 ? x.numel() / width : 0;
  Tensor out = at::empty(x.sizes(), x.options().dtype(at::kByte));
  Tensor scale = at::zeros(x.sizes().slice(0, x.dim() - 1), x.options());
  const Tensor rows = x.contiguous();
  const float* from = rows.const_data_ptr<float>();
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  float* scales = scale.mutable_data_ptr<float>();
  at::parallel_for(0, num_rows, grain_of(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      scales[row] = quantize_row(from + row * width, to + row * width, width, levels);
    }
  });
  return {out, scale};
}

Tensor rescale_rows_cpu(Tensor product, const Tensor& scale, const OptionalTensor& bias,
                        const OptionalTensor& residual) {
  const int64_t width = product.size(-1), num_rows = width > 0 ? product.numel() / width : 0;
  const Tensor left = residual ? residual->contiguous() : Tensor();
  const float *factors = scale.const_data_ptr<float>(), *added = data_of(bias);
  const float* other = left.defined() ? left.const_data_ptr<float>() : nullptr;
  float* data = product.mutable_data_ptr<float>();
  at::parallel_for(0, num_rows, grain_of(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* here = data + row * width;
      rescale_row<false>(here, factors[row], added, other ? other + row * width : nullptr, here, width);
    }
  });
  return product;
}

std::tuple<Tensor, Tensor> requantize_gelu_rows_cpu(const Tensor& product, const Tensor& scale,
                                                    const OptionalTensor& bias, int64_t levels) {
  const int64_t width = product.size(-1), num_rows = width > 0 ? product.numel() / width : 0;
  Tensor out = at::empty(product.sizes(), product.options().dtype(at::kByte));
  Tensor next = at::zeros(scale.sizes(), scale.options());
  const float *from = product.const_data_ptr<float>(), *factors = scale.const_data_ptr<float>(), *added = data_of(bias);
  uint8_t* to = out.mutable_data_ptr<uint8_t>();
  float* scales = next.mutable_data_ptr<float>();
  at::parallel_for(0, num_rows, grain_of(width), [&](int64_t begin, int64_t end) {
    const Scratch<float> hidden(round_up(width, kLanes<float>));
    for (int64_t row = begin; row < end; ++row) {
      rescale_row<true>(from + row * width, factors[row], added, nullptr, hidden.get(), width);
      scales[row] = quantize_row(hidden.get(), to + row * width, width, levels);
    }
  });
  return {out, next};
}

}  // namespace

// Their schemas, and the plain form that stands in where there are no compiled kernels: tokcomp_kernels/int8.py.
TORCH_LIBRARY_IMPL(tokcomp_int8, CPU, m) {
  m.impl("quantize_rows", quantize_rows_cpu);
  m.impl("rescale_rows", rescale_rows_cpu);
  m.impl("requantize_gelu_rows", requantize_gelu_rows_cpu);
}

}  // namespace tokcomp
