// Linear layers of bytes, with what lies around the product: rows to bytes before it; both scales, bias and residual
// while the sums are in registers; a GELU and the next layer's bytes where those follow.
//
// A thread takes blocks of rows through panels of outputs: a block stays in a core's cache while the panels pass by.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

#include "byte_quad.h"
#include "quantize.h"

namespace tokcomp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

int64_t int8_levels() { return kByteLevels; }

#ifdef TOKCOMP_BYTE_QUADS

using int8::Floats;
using Integers = Vec<int32_t>;

constexpr int64_t kQuad = UnitTraits<ByteQuad>::kElements;
constexpr int64_t kTile = kRowsOf<ByteQuad>;
constexpr int64_t kOutputs = kLanes<int32_t>;  // of a vector
constexpr int64_t kPanelOutputs = kPanelVectors * kOutputs;
constexpr int64_t kBlockBytes = 192 * 1024;   // of a block of rows
constexpr int64_t kHiddenBytes = 256 * 1024;  // of what a block of rows becomes before its GELU
constexpr int64_t kLeastBlocks = 4;           // for each thread, that no thread waits long for another
constexpr int64_t kLeastPanels = 2;           // for which a thread is worth waking

// Activations [..., width] as bytes about `zero`, with a scale for each row.
struct ByteRows {
  const uint8_t* data;
  const float* scale;
  int64_t count, width, zero;

  ByteRows part(int64_t first, int64_t last) const {
    return {data + first * width, scale + first, last - first, width, zero};
  }
};

// A layer of [num_outputs, width], as pack_panels leaves it; the bias may be null.
struct ByteLayer {
  const ByteQuad* panels;
  const float *scale, *bias;
  const int32_t* sums;
  int64_t num_outputs, width;

  int64_t depth() const { return (width + kQuad - 1) / kQuad; }
  int64_t vectors() const { return (num_outputs + kOutputs - 1) / kOutputs; }
};

// What a panel's sums become: (sum - what the zero added) * both scales + bias + residual, to out [rows, num_outputs].
class PanelWriter {
 public:
  PanelWriter(const ByteRows& rows, const ByteLayer& layer, const float* residual, float* out)
      : rows_(rows), layer_(layer), residual_(residual), out_(out) {}

  void enter(const Panel& panel) {
    column_ = panel.first * kOutputs;
    for (int64_t i = 0; i < kPanelOutputs; ++i) {
      const int64_t output = column_ + i;
      const bool valid = output < layer_.num_outputs;
      excess_[i] = valid ? layer_.sums[output] * static_cast<int32_t>(rows_.zero) : 0;
      scale_[i] = valid ? layer_.scale[output] : 0.f;
      bias_[i] = valid && layer_.bias ? layer_.bias[output] : 0.f;
    }
  }

  template <size_t kVectors>
  TOKCOMP_INLINE void operator()(int64_t row, const Integers (&sums)[kVectors]) const {
    const Floats row_scale(rows_.scale[row]);
    const int64_t start = row * layer_.num_outputs + column_;
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) {
      const int64_t i = v * kOutputs;
      const int count = static_cast<int>(std::min(kOutputs, layer_.num_outputs - column_ - i));
      const Floats sum = at::vec::convert_to_fp_of_same_size<float>(sums[v] - Integers::loadu(excess_ + i));
      Floats value = at::vec::fmadd(sum * Floats::loadu(scale_ + i), row_scale, Floats::loadu(bias_ + i));
      if (residual_) value = value + Floats::loadu(residual_ + start + i, count);
      value.store(out_ + start + i, count);
    }
  }

 private:
  ByteRows rows_;
  ByteLayer layer_;
  const float* residual_;
  float* out_;
  int64_t column_ = 0;
  alignas(64) int32_t excess_[kPanelOutputs];
  alignas(64) float scale_[kPanelOutputs], bias_[kPanelOutputs];
};

// Asks for a part of what lies at `from`: one of `count` equal ones.
TOKCOMP_INLINE void prefetch_part(const ByteQuad* from, int64_t quads, int64_t part, int64_t count) {
  constexpr int64_t kLine = 64;
  const int64_t lines = quads * kQuad / kLine, each = (lines + count - 1) / count;
  const char* data = reinterpret_cast<const char*>(from);
  for (int64_t line = part * each; line < std::min(lines, (part + 1) * each); ++line) {
    __builtin_prefetch(data + line * kLine, 0, 2);
  }
}

// Rows [first, last) of the rows that `write` is for, times one panel.
void multiply_panel(const ByteRows& rows, int64_t first, int64_t last, const ByteLayer& layer, const Panel& panel,
                    ByteQuad* edge, PanelWriter& write) {
  const int64_t depth = layer.depth(), quads = panel.width * kOutputs * depth;
  const ByteQuad* right = layer.panels + panel.first * kOutputs * depth;
  const int64_t tiles = (last - first + kTile - 1) / kTile;
  const bool has_next = panel.first + panel.width < layer.vectors();
  write.enter(panel);
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t top = first + i * kTile, count = std::min(kTile, last - top);
    const uint8_t* tile = rows.data + top * rows.width;
    if (count < kTile || rows.width % kQuad != 0) {
      // A tile whose rows are not all there, or end within four bytes, is filled up with zeros.
      std::memset(static_cast<void*>(edge), 0, kTile * depth * kQuad);
      for (int64_t row = 0; row < count; ++row) {
        std::memcpy(static_cast<void*>(edge + row * depth), tile + row * rows.width, rows.width);
      }
      tile = reinterpret_cast<const uint8_t*>(edge);
    }
    // The weights of a model outgrow the nearer caches: the next panel is on its way while this one is multiplied.
    if (has_next) prefetch_part(right + quads, quads, i, tiles);
    gemm_tile_of<ByteQuad>(panel.width, reinterpret_cast<const ByteQuad*>(tile), depth, 1, right, depth,
                           [&](int64_t row, const auto& sums) __attribute__((always_inline)) {
                             if (row < count) write(top + row, sums);
                           });
  }
}

// As many rows as a block of `bytes` holds, in whole tiles.
constexpr int64_t rows_within(int64_t bytes, int64_t row_bytes) {
  return std::max<int64_t>(1, bytes / row_bytes / kTile) * kTile;
}

void multiply(const ByteRows& rows, const ByteLayer& layer, const float* residual, float* out) {
  const int64_t vectors = layer.vectors(), panels = count_panels(vectors);
  const int64_t block = rows_within(kBlockBytes, std::max<int64_t>(1, layer.depth()) * kQuad);
  const int64_t blocks = (rows.count + block - 1) / block;
  at::parallel_for(0, blocks * panels, kLeastPanels, [&](int64_t begin, int64_t end) {
    PanelWriter write(rows, layer, residual, out);
    const Scratch<ByteQuad> edge(kTile * layer.depth());
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / panels * block, last = std::min(first + block, rows.count);
      multiply_panel(rows, first, last, layer, Panel(vectors, task % panels), edge.get(), write);
    }
  });
}

#endif

// Rows to bytes [..., width] and scales [...], each row by quantize(row, bytes), which returns the scale.
template <typename Quantize>
std::tuple<Tensor, Tensor> quantize_each(const Tensor& x, const Quantize& quantize) {
  const int64_t width = x.size(-1), num_rows = width > 0 ? x.numel() / width : 0;
  Tensor bytes = at::empty(x.sizes(), x.options().dtype(at::kByte));
  Tensor scale = at::empty(x.sizes().slice(0, x.dim() - 1), x.options());
  uint8_t* to = bytes.mutable_data_ptr<uint8_t>();
  float* scales = scale.mutable_data_ptr<float>();
  if (width == 0) std::fill_n(scales, scale.numel(), 0.f);  // as of rows of zeros
  at::parallel_for(0, num_rows, int8::grain_of(width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) scales[row] = quantize(row, to + row * width);
  });
  return {bytes, scale};
}

std::tuple<Tensor, Tensor> quantize_rows_cpu(const Tensor& x_in, int64_t levels) {
  TORCH_CHECK_VALUE(x_in.scalar_type() == at::kFloat && x_in.dim() > 0 && levels >= 1 && levels <= 127,
                    "tokcomp_int8: x must be float32 [..., C] and levels 1 to 127, got ", x_in.scalar_type(), " ",
                    x_in.sizes(), " and ", levels);
  const Tensor x = x_in.contiguous();
  const int64_t width = x.size(-1);
  const float* from = x.const_data_ptr<float>();
  return quantize_each(x, [&](int64_t row, uint8_t* to) {
    return int8::quantize_row(from + row * width, int8::magnitude(from + row * width, width), to, width, levels);
  });
}

#ifdef TOKCOMP_BYTE_QUADS

// Values, contiguous; nothing where none are given.
Tensor checked(const char* name, const OptionalTensor& values, at::ScalarType dtype, int64_t count) {
  if (!values) return Tensor();
  TORCH_CHECK_VALUE(values->scalar_type() == dtype && values->numel() == count, "tokcomp_int8: ", name, " must be ",
                    dtype, " of ", count, " elements, got ", values->scalar_type(), " ", values->sizes());
  return values->contiguous();
}

// Activations [..., K]: float32, or bytes of as many levels with row_scale [...].
class Input {
 public:
  Input(const Tensor& x, const OptionalTensor& row_scale, int64_t levels) : levels_(levels) {
    TORCH_CHECK_VALUE(levels >= 1 && levels <= kByteLevels, "tokcomp_int8: levels must be 1 to ", kByteLevels,
                      " on this CPU, got ", levels);
    TORCH_CHECK_VALUE(x.dim() > 0 && x.scalar_type() == (row_scale ? at::kByte : at::kFloat),
                      "tokcomp_int8: x must be float32 [..., C], or uint8 with its rows' scales, got ", x.scalar_type(),
                      " ", x.sizes());
    if (row_scale) {
      bytes_ = x.contiguous();
      scale_ = checked("row_scale", row_scale, at::kFloat, c10::multiply_integers(x.sizes().slice(0, x.dim() - 1)));
    } else {
      std::tie(bytes_, scale_) = quantize_rows_cpu(x, levels);
    }
  }

  const Tensor& scale() const { return scale_; }
  ByteRows rows() const {
    return {bytes_.const_data_ptr<uint8_t>(), scale_.const_data_ptr<float>(), scale_.numel(), bytes_.size(-1),
            levels_ + 1};
  }
  std::vector<int64_t> sizes_with(int64_t width) const {
    std::vector<int64_t> sizes = bytes_.sizes().vec();
    sizes.back() = width;
    return sizes;
  }

 private:
  Tensor bytes_, scale_;
  int64_t levels_;
};

// weight: as pack_panels leaves it of [N, K]; scale, sums and bias: [N].
class Layer {
 public:
  Layer(const Tensor& weight, const Tensor& scale, const Tensor& sums, const OptionalTensor& bias, int64_t width)
      : weight_(weight), scale_(scale) {
    const int64_t count = scale.numel();
    TORCH_CHECK_VALUE(weight.scalar_type() == at::kChar && weight.dim() == 4 && weight.is_contiguous() &&
                          weight.size(1) == (width + kQuad - 1) / kQuad &&
                          weight.size(0) == (count + kOutputs - 1) / kOutputs,
                      "tokcomp_int8: weight must be packed of [", count, ", ", width, "], got ", weight.scalar_type(),
                      " ", weight.sizes());
    scale_ = checked("scale", scale, at::kFloat, count);
    sums_ = checked("sums", sums, at::kInt, count);
    bias_ = checked("bias", bias, at::kFloat, count);
    layer_ = {reinterpret_cast<const ByteQuad*>(weight_.const_data_ptr<int8_t>()),
              scale_.const_data_ptr<float>(),
              bias_.defined() ? bias_.const_data_ptr<float>() : nullptr,
              sums_.const_data_ptr<int32_t>(),
              count,
              width};
  }
  const ByteLayer& operator*() const { return layer_; }
  Tensor empty_output(at::IntArrayRef sizes) const { return at::empty(sizes, scale_.options()); }

 private:
  Tensor weight_, scale_, sums_, bias_;
  ByteLayer layer_;
};

Tensor linear_cpu(const Tensor& x, const OptionalTensor& row_scale, const Tensor& weight, const Tensor& scale,
                  const Tensor& sums, const OptionalTensor& bias, const OptionalTensor& residual_in, int64_t levels) {
  const Input input(x, row_scale, levels);
  const Layer layer(weight, scale, sums, bias, x.size(-1));
  Tensor out = layer.empty_output(input.sizes_with((*layer).num_outputs));
  const Tensor residual = checked("residual", residual_in, at::kFloat, out.numel());
  multiply(input.rows(), *layer, residual.defined() ? residual.const_data_ptr<float>() : nullptr,
           out.mutable_data_ptr<float>());
  return out;
}

std::tuple<Tensor, Tensor> linear_gelu_cpu(const Tensor& x, const OptionalTensor& row_scale, const Tensor& weight,
                                           const Tensor& scale, const Tensor& sums, const OptionalTensor& bias,
                                           int64_t levels) {
  const Input input(x, row_scale, levels);
  const Layer held(weight, scale, sums, bias, x.size(-1));
  const ByteLayer& layer = *held;
  const int64_t width = layer.num_outputs, count = input.rows().count;
  Tensor bytes = at::empty(input.sizes_with(width), x.options().dtype(at::kByte));
  Tensor next = at::empty(input.scale().sizes(), scale.options());
  uint8_t* to = bytes.mutable_data_ptr<uint8_t>();
  float* scales = next.mutable_data_ptr<float>();
  const auto finish = [&, gelu = int8::Gelu()](float* hidden, int64_t row) {
    scales[row] =
        int8::quantize_row(hidden, int8::gelu_magnitude(hidden, width, gelu), to + row * width, width, levels);
  };

  const int64_t block = rows_within(kHiddenBytes, std::max<int64_t>(1, width) * sizeof(float));
  const int64_t blocks = (count + block - 1) / block;
  if (blocks < kLeastBlocks * at::get_num_threads()) {
    const Tensor hidden = held.empty_output({count, width});
    float* data = hidden.mutable_data_ptr<float>();
    multiply(input.rows(), layer, nullptr, data);
    at::parallel_for(0, count, int8::grain_of(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) finish(data + row * width, row);
    });
    return {bytes, next};
  }
  at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    const Scratch<float> hidden(block * width);
    const Scratch<ByteQuad> edge(kTile * layer.depth());
    for (int64_t first = begin * block; first < std::min(end * block, count); first += block) {
      const ByteRows rows = input.rows().part(first, std::min(first + block, count));
      PanelWriter write(rows, layer, nullptr, hidden.get());
      for (int64_t i = 0; i < count_panels(layer.vectors()); ++i) {
        multiply_panel(rows, 0, rows.count, layer, Panel(layer.vectors(), i), edge.get(), write);
      }
      for (int64_t row = 0; row < rows.count; ++row) finish(hidden.get() + row * width, first + row);
    }
  });
  return {bytes, next};
}

// A weight of int8 [N, K] in panels of [K / 4, outputs, 4], filled up with zeros.
Tensor pack_panels(const Tensor& weight_in) {
  TORCH_CHECK_VALUE(weight_in.scalar_type() == at::kChar && weight_in.dim() == 2,
                    "tokcomp_int8::pack: weight must be int8 [out, in], got ", weight_in.scalar_type(), " ",
                    weight_in.sizes());
  const Tensor weight = weight_in.contiguous();
  const int64_t width = weight.size(1), depth = (width + kQuad - 1) / kQuad;
  const int64_t vectors = (weight.size(0) + kOutputs - 1) / kOutputs;
  const Tensor packed = at::zeros({vectors, depth, kOutputs, kQuad}, weight.options());
  const int8_t* from = weight.const_data_ptr<int8_t>();
  int8_t* to = packed.mutable_data_ptr<int8_t>();
  if (vectors == 0) return packed;
  for_each_panel(vectors, [&](int64_t first, int64_t panel_vectors) {
    const int64_t columns = panel_vectors * kOutputs, begin = first * kOutputs;
    for (int64_t output = begin; output < std::min(begin + columns, weight.size(0)); ++output) {
      for (int64_t i = 0; i < width; ++i) {
        to[(begin * depth + i / kQuad * columns + output - begin) * kQuad + i % kQuad] = from[output * width + i];
      }
    }
  });
  return packed;
}

#endif

}  // namespace

// Their schemas, and their plain forms: tokcomp_kernels/int8.py.
TORCH_LIBRARY_IMPL(tokcomp_int8, CompositeExplicitAutograd, m) { m.impl("levels", int8_levels); }

TORCH_LIBRARY_IMPL(tokcomp_int8, CPU, m) {
  m.impl("quantize_rows", quantize_rows_cpu);
#ifdef TOKCOMP_BYTE_QUADS
  m.impl("pack", pack_panels);
  m.impl("linear", linear_cpu);
  m.impl("linear_gelu", linear_gelu_cpu);
#endif
}

}  // namespace tokcomp
