// Linear layers of bfloat16, and of bytes, on tiles: x W^T + bias, with a GELU where asked for.
//
// A thread takes groups of rows through panels of 32 outputs: a panel of the weight is read from memory once for the
// group, and what a product leaves, 32 x 32 floats, gets its bias and its activation while it is in the nearest cache.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <optional>

#include "../gelu.h"
#include "../tiles.h"

namespace tokcomp {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

bool tiles_usable() {
#ifdef TOKCOMP_TILES
  return tiles::usable();
#else
  return false;
#endif
}

#ifdef TOKCOMP_TILES

using at::BFloat16;

constexpr int64_t kBlock = 2 * tiles::kRows;  // rows and columns of a product that tiles hold at once
constexpr int64_t kGroupBlocks = 4;           // blocks of rows that share a panel of the weight
// Tiles of depth that are multiplied at a time: two operands of 16 KiB and a product leave the nearest cache room.
constexpr int64_t kMostDepth = 8;
constexpr int64_t kLeastPanels = 4;            // for which a thread is worth waking
constexpr int64_t kProduct = kBlock * kBlock;  // floats

struct Shape {
  int64_t rows, depth, width;
  int64_t steps() const { return depth / tiles::kDepth; }
  int64_t groups() const { return (rows + kGroupBlocks * kBlock - 1) / (kGroupBlocks * kBlock); }
  int64_t panels() const { return (width + kBlock - 1) / kBlock; }
};

// The blocks of one group of rows; the last one, where it is not whole, is copied and filled up with zeros.
class RowGroup {
 public:
  RowGroup(const BFloat16* x, const Shape& shape) : x_(x), shape_(shape), edge_(kBlock * shape.depth) {}

  void enter(int64_t group) {
    first_ = group * kGroupBlocks * kBlock;
    const int64_t last = std::min(first_ + kGroupBlocks * kBlock, shape_.rows);
    count_ = (last - first_ + kBlock - 1) / kBlock;
    const int64_t rest = rows(count_ - 1);
    if (rest % tiles::kRows != 0) {
      BFloat16* end = std::copy_n(x_ + row(count_ - 1) * shape_.depth, rest * shape_.depth, edge_.get());
      std::fill(end, edge_.get() + kBlock * shape_.depth, BFloat16(0));
    }
  }
  int64_t count() const { return count_; }
  int64_t row(int64_t block) const { return first_ + block * kBlock; }
  int64_t rows(int64_t block) const { return std::min(kBlock, shape_.rows - row(block)); }
  const BFloat16* data(int64_t block) const {
    return rows(block) % tiles::kRows != 0 ? edge_.get() : x_ + row(block) * shape_.depth;
  }

 private:
  const BFloat16* x_;
  Shape shape_;
  Scratch<BFloat16> edge_;
  int64_t first_ = 0, count_ = 0;
};

// A panel's part of what is given for every output, filled up with zeros.
template <typename to_t, typename from_t>
class PanelValues {
 public:
  void enter(const from_t* from, int64_t first, int64_t count, to_t factor = to_t(1)) {
    for (int64_t i = 0; i < kBlock; ++i) {
      values_[i] = from && i < count ? static_cast<to_t>(from[first + i]) * factor : to_t(0);
    }
  }
  const to_t* get() const { return values_; }

 private:
  alignas(64) to_t values_[kBlock];
};

// Writes products of bfloat16: out = product + bias, through the activation, rounded.
template <bool kGelu>
class WriteBFloat16 {
 public:
  WriteBFloat16(const BFloat16* bias, BFloat16* out, int64_t width) : bias_in_(bias), out_(out), width_(width) {}

  void enter(int64_t panel, int64_t columns) {
    bias_.enter(bias_in_, panel * kBlock, columns);
    column_ = panel * kBlock;
    mask_ = columns == kBlock ? ~__mmask32(0) : 0xffff;
  }
  TOKCOMP_INLINE void operator()(const float* product, int64_t first, int64_t rows) const {
    const __m512 bias_low = _mm512_load_ps(bias_.get()), bias_high = _mm512_load_ps(bias_.get() + tiles::kRows);
    BFloat16* out = out_ + first * width_ + column_;
    for (int64_t row = 0; row < rows; ++row, product += kBlock, out += width_) {
      __m512 low = _mm512_add_ps(_mm512_loadu_ps(product), bias_low);
      __m512 high = _mm512_add_ps(_mm512_loadu_ps(product + tiles::kRows), bias_high);
      if constexpr (kGelu) {
        low = gelu_(low);
        high = gelu_(high);
      }
      _mm512_mask_storeu_epi16(out, mask_, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
  }

 private:
  const BFloat16* bias_in_;
  BFloat16* out_;
  int64_t width_, column_ = 0;
  __mmask32 mask_ = 0;
  PanelValues<float, BFloat16> bias_;
  TableGelu gelu_;
};

// Writes products of bytes: out = (product - what the bytes' zero adds) * both scales + bias, through the activation.
template <bool kGelu>
class WriteFloat {
 public:
  WriteFloat(const float* row_scale, const float* scale, const int32_t* sums, int64_t zero, const float* bias,
             float* out, int64_t width)
      : row_scale_(row_scale),
        scale_in_(scale),
        bias_in_(bias),
        sums_in_(sums),
        zero_(static_cast<int32_t>(zero)),
        out_(out),
        width_(width) {}

  void enter(int64_t panel, int64_t columns) {
    scale_.enter(scale_in_, panel * kBlock, columns);
    bias_.enter(bias_in_, panel * kBlock, columns);
    excess_.enter(sums_in_, panel * kBlock, columns, zero_);
    column_ = panel * kBlock;
    vectors_ = columns / tiles::kRows;
  }
  TOKCOMP_INLINE void operator()(const float* product, int64_t first, int64_t rows) const {
    float* out = out_ + first * width_ + column_;
    for (int64_t row = 0; row < rows; ++row, product += kBlock, out += width_) {
      const __m512 row_scale = _mm512_set1_ps(row_scale_[first + row]);
      for (int64_t i = 0; i < vectors_ * tiles::kRows; i += tiles::kRows) {
        const __m512i sum = _mm512_sub_epi32(_mm512_loadu_si512(product + i), _mm512_load_si512(excess_.get() + i));
        const __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_load_ps(scale_.get() + i));
        __m512 value = _mm512_fmadd_ps(scaled, row_scale, _mm512_load_ps(bias_.get() + i));
        if constexpr (kGelu) value = gelu_(value);
        _mm512_storeu_ps(out + i, value);
      }
    }
  }

 private:
  const float *row_scale_, *scale_in_, *bias_in_;
  const int32_t* sums_in_;
  int32_t zero_;
  float* out_;
  int64_t width_, column_ = 0, vectors_ = 0;
  PanelValues<float, float> scale_, bias_;
  PanelValues<int32_t, int32_t> excess_;
  TableGelu gelu_;
};

// Products of rows x with a weight, handed block by block to `write`. Bytes are counted in pairs, as bfloat16 would be.
template <bool kBytes, typename Write>
void multiply_panels(const BFloat16* x, const BFloat16* weight, const Shape& shape, int64_t begin, int64_t end,
                     Write write) {
  const tiles::Session session;
  const int64_t steps = shape.steps(), column_stride = steps * tiles::kElements;
  const int64_t chunks = (steps + kMostDepth - 1) / kMostDepth, chunk = (steps + chunks - 1) / chunks;
  RowGroup group(x, shape);
  const Scratch<float> products(kGroupBlocks * kProduct);
  for (int64_t task = begin; task < end; ++task) {
    const int64_t panel = task % shape.panels(), columns = std::min(kBlock, shape.width - panel * kBlock);
    if (task == begin || panel == 0) group.enter(task / shape.panels());
    write.enter(panel, columns);
    const BFloat16* right = weight + panel * 2 * column_stride;
    for (int64_t first = 0; first < steps; first += chunk) {
      const int64_t depth = std::min(chunk, steps - first);
      for (int64_t block = 0; block < group.count(); ++block) {
        float* product = products.get() + block * kProduct;
        tiles::multiply_all<kBytes>(group.data(block) + first * tiles::kDepth, shape.depth,
                                    group.rows(block) > tiles::kRows ? 2 : 1, right + first * tiles::kElements,
                                    column_stride, columns / tiles::kRows, depth, product, kBlock, first > 0);
        if (first + depth == steps) write(product, group.row(block), group.rows(block));
      }
    }
  }
}

template <bool kBytes, typename Write>
void multiply_in_parallel(const void* x, const void* weight, const Shape& shape, const Write& write) {
  at::parallel_for(0, shape.groups() * shape.panels(), kLeastPanels, [&](int64_t begin, int64_t end) {
    multiply_panels<kBytes>(static_cast<const BFloat16*>(x), static_cast<const BFloat16*>(weight), shape, begin, end,
                            write);
  });
}

Tensor empty_output(const Tensor& x, int64_t width, at::ScalarType dtype) {
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = width;
  return at::empty(sizes, x.options().dtype(dtype));
}

// Values, contiguous; nothing where none are given.
Tensor checked(const char* name, const OptionalTensor& values, at::ScalarType dtype, int64_t count) {
  if (!values) return Tensor();
  TORCH_CHECK_VALUE(values->scalar_type() == dtype && values->numel() == count, "tokcomp_tiles: ", name, " must be ",
                    dtype, " of ", count, " elements, got ", values->scalar_type(), " ", values->sizes());
  return values->contiguous();
}

template <typename T>
const T* data_or_null(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr<T>() : nullptr;
}

// x [..., K], weight as pack_tiles makes it of [N, K], bias [N].
Tensor tile_linear(const Tensor& x_in, const Tensor& weight, const OptionalTensor& bias_in, bool gelu) {
  const Tensor x = x_in.contiguous();
  const int64_t depth = weight.size(1) * tiles::kDepth, width = weight.size(0) * tiles::kRows;
  TORCH_CHECK_VALUE(x.scalar_type() == at::kBFloat16 && x.dim() > 0 && x.size(-1) == depth,
                    "tokcomp_tiles::linear: x must be bfloat16 [..., ", depth, "], got ", x.scalar_type(), " ",
                    x.sizes());
  const Tensor bias = checked("bias", bias_in, at::kBFloat16, width);
  const Shape shape{x.numel() / depth, depth, width};
  Tensor out = empty_output(x, width, at::kBFloat16);
  const auto* added = data_or_null<BFloat16>(bias);
  BFloat16* to = out.mutable_data_ptr<BFloat16>();
  if (gelu) {
    multiply_in_parallel<false>(x.const_data_ptr(), weight.const_data_ptr(), shape,
                                WriteBFloat16<true>(added, to, width));
  } else {
    multiply_in_parallel<false>(x.const_data_ptr(), weight.const_data_ptr(), shape,
                                WriteBFloat16<false>(added, to, width));
  }
  return out;
}

// q [..., K] bytes about `zero` with row_scale [...]; weight as pack_tiles makes it of the bytes of [N, K], with scale
// [N] and the sums of its rows [N]; bias [N].
Tensor tile_linear_bytes(const Tensor& q_in, const Tensor& row_scale_in, const Tensor& weight, const Tensor& scale_in,
                         const Tensor& sums_in, int64_t zero, const OptionalTensor& bias_in, bool gelu) {
  const Tensor q = q_in.contiguous();
  const int64_t depth = weight.size(1) * tiles::kDepth, width = weight.size(0) * tiles::kRows;  // in pairs of bytes
  TORCH_CHECK_VALUE(q.scalar_type() == at::kByte && q.dim() > 0 && q.size(-1) == 2 * depth,
                    "tokcomp_tiles::linear_bytes: q must be uint8 [..., ", 2 * depth, "], got ", q.scalar_type(), " ",
                    q.sizes());
  const Shape shape{q.numel() / (2 * depth), depth, width};
  const Tensor row_scale = checked("row_scale", row_scale_in, at::kFloat, shape.rows);
  const Tensor scale = checked("scale", scale_in, at::kFloat, width);
  const Tensor sums = checked("sums", sums_in, at::kInt, width);
  const Tensor bias = checked("bias", bias_in, at::kFloat, width);
  Tensor out = empty_output(q, width, at::kFloat);
  const float *factors = row_scale.const_data_ptr<float>(), *scales = scale.const_data_ptr<float>();
  const auto* added = data_or_null<float>(bias);
  const int32_t* added_up = sums.const_data_ptr<int32_t>();
  float* to = out.mutable_data_ptr<float>();
  if (gelu) {
    multiply_in_parallel<true>(q.const_data_ptr(), weight.const_data_ptr(), shape,
                               WriteFloat<true>(factors, scales, added_up, zero, added, to, width));
  } else {
    multiply_in_parallel<true>(q.const_data_ptr(), weight.const_data_ptr(), shape,
                               WriteFloat<false>(factors, scales, added_up, zero, added, to, width));
  }
  return out;
}

// weight [N, K] of bfloat16, or of pairs of bytes; K a multiple of 32, N of 16 -> [N / 16, K / 32, 512]: what a tile
// holds in one piece.
Tensor pack_tiles(const Tensor& weight_in) {
  const Tensor weight = weight_in.contiguous();
  TORCH_CHECK_VALUE(weight.scalar_type() == at::kBFloat16 && weight.dim() == 2 && weight.numel() > 0 &&
                        weight.size(0) % tiles::kRows == 0 && weight.size(1) % tiles::kDepth == 0,
                    "tokcomp_tiles::pack: weight must be bfloat16 [multiple of 16, multiple of 32], got ",
                    weight.scalar_type(), " ", weight.sizes());
  Tensor out =
      at::empty({weight.size(0) / tiles::kRows, weight.size(1) / tiles::kDepth, tiles::kElements}, weight.options());
  tiles::pack_right_transposed({weight.const_data_ptr<BFloat16>(), weight.size(1)}, weight.size(0), weight.size(1),
                               out.mutable_data_ptr<BFloat16>());
  return out;
}

#endif

}  // namespace

// Their schemas: tokcomp_kernels/tiles.py. Without tiles there is nothing that stands in: who calls them asks first.
TORCH_LIBRARY_IMPL(tokcomp_tiles, CompositeExplicitAutograd, m) { m.impl("usable", tiles_usable); }

#ifdef TOKCOMP_TILES
TORCH_LIBRARY_IMPL(tokcomp_tiles, CPU, m) {
  m.impl("linear", tile_linear);
  m.impl("linear_bytes", tile_linear_bytes);
  m.impl("pack", pack_tiles);
}
#endif

}  // namespace tokcomp
