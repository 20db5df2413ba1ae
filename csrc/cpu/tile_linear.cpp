// Linear layers of bfloat16 on tiles: x W^T + bias, with a GELU where asked for.
//
// A thread takes groups of rows through panels of 32 outputs: a panel of the weight is read from memory once for the
// group, and what a product leaves, 32 x 32 floats, gets its bias and its activation while it is in the nearest cache.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <optional>

#include "gelu.h"
#include "tiles.h"

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

// out = product + bias, through the activation, for `rows` x `columns` (16 or 32) of a product.
template <bool kGelu>
TOKCOMP_INLINE void finish(const float* product, const float* bias, int64_t rows, int64_t columns, BFloat16* out,
                           int64_t out_stride, const TableGelu& gelu) {
  const __m512 bias_low = _mm512_loadu_ps(bias), bias_high = _mm512_loadu_ps(bias + tiles::kRows);
  const __mmask32 mask = columns == kBlock ? ~__mmask32(0) : 0xffff;
  for (int64_t row = 0; row < rows; ++row, product += kBlock, out += out_stride) {
    __m512 low = _mm512_add_ps(_mm512_loadu_ps(product), bias_low);
    __m512 high = _mm512_add_ps(_mm512_loadu_ps(product + tiles::kRows), bias_high);
    if constexpr (kGelu) {
      low = gelu(low);
      high = gelu(high);
    }
    _mm512_mask_storeu_epi16(out, mask, (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

template <bool kGelu>
void multiply_panels(const BFloat16* x, const BFloat16* weight, const BFloat16* bias, BFloat16* out, const Shape& shape,
                     int64_t begin, int64_t end) {
  const tiles::Session session;
  const TableGelu gelu;
  const int64_t steps = shape.steps(), column_stride = steps * tiles::kElements;
  const int64_t chunks = (steps + kMostDepth - 1) / kMostDepth, chunk = (steps + chunks - 1) / chunks;
  RowGroup group(x, shape);
  const Scratch<float> products(kGroupBlocks * kProduct);
  alignas(64) float panel_bias[kBlock] = {};
  for (int64_t task = begin; task < end; ++task) {
    const int64_t panel = task % shape.panels(), columns = std::min(kBlock, shape.width - panel * kBlock);
    if (task == begin || panel == 0) group.enter(task / shape.panels());
    if (bias) load_row(bias + panel * kBlock, panel_bias, columns);
    const BFloat16* right = weight + panel * 2 * column_stride;
    for (int64_t first = 0; first < steps; first += chunk) {
      const int64_t depth = std::min(chunk, steps - first);
      for (int64_t block = 0; block < group.count(); ++block) {
        float* product = products.get() + block * kProduct;
        tiles::multiply_all(group.data(block) + first * tiles::kDepth, shape.depth,
                            group.rows(block) > tiles::kRows ? 2 : 1, right + first * tiles::kElements, column_stride,
                            columns / tiles::kRows, depth, product, kBlock, first > 0);
        if (first + depth < steps) continue;
        finish<kGelu>(product, panel_bias, group.rows(block), columns,
                      out + group.row(block) * shape.width + panel * kBlock, shape.width, gelu);
      }
    }
  }
}

// x [..., K], weight as pack_tiles makes it of [N, K], bias [N].
Tensor tile_linear(const Tensor& x_in, const Tensor& weight, const OptionalTensor& bias_in, bool gelu) {
  const Tensor x = x_in.contiguous(), bias = bias_in ? bias_in->contiguous() : Tensor();
  const int64_t depth = weight.size(1) * tiles::kDepth, width = weight.size(0) * tiles::kRows;
  TORCH_CHECK_VALUE(x.scalar_type() == at::kBFloat16 && x.dim() > 0 && x.size(-1) == depth,
                    "tokcomp_tiles::linear: x must be bfloat16 [..., ", depth, "], got ", x.scalar_type(), " ",
                    x.sizes());
  TORCH_CHECK_VALUE(!bias.defined() || (bias.scalar_type() == at::kBFloat16 && bias.sizes() == at::IntArrayRef(width)),
                    "tokcomp_tiles::linear: bias must be bfloat16 [", width, "]");
  const Shape shape{x.numel() / depth, depth, width};
  std::vector<int64_t> sizes = x.sizes().vec();
  sizes.back() = width;
  Tensor out = at::empty(sizes, x.options());
  if (shape.rows == 0) return out;
  const auto run = gelu ? multiply_panels<true> : multiply_panels<false>;
  at::parallel_for(0, shape.groups() * shape.panels(), 4, [&](int64_t begin, int64_t end) {
    run(x.const_data_ptr<BFloat16>(), weight.const_data_ptr<BFloat16>(),
        bias.defined() ? bias.const_data_ptr<BFloat16>() : nullptr, out.mutable_data_ptr<BFloat16>(), shape, begin,
        end);
  });
  return out;
}

// weight [N, K], K a multiple of 32, N of 16 -> [N / 16, K / 32, 512], what a tile holds in one piece.
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
  m.impl("pack", pack_tiles);
}
#endif

}  // namespace tokcomp
