// Small matrix products whose operands stay in one core's cache: the tiles that attention is made of.
//
// A product runs over *units*: a float, a double, or a pair of bfloat16 where the CPU multiplies and adds such pairs
// into float (AVX512-BF16). The right operand is packed in panels a few vectors wide; the left one is read one unit at
// a time, with any strides, so a transposed left operand costs nothing.
#pragma once

#include <cstring>

#include "vector.h"

namespace tokcomp {

struct BFloat16Pair {
  at::BFloat16 low, high;
};

template <typename unit_t>
struct UnitTraits {
  using acc_t = unit_t;
  using reg_t = Vec<unit_t>;
  static constexpr int64_t kElements = 1;
  static TOKCOMP_INLINE reg_t load(const unit_t* from) { return reg_t::loadu(from); }
  static TOKCOMP_INLINE reg_t broadcast(const unit_t* from) { return reg_t(*from); }
  static TOKCOMP_INLINE Vec<acc_t> multiply_add(const reg_t& a, const reg_t& b, const Vec<acc_t>& sum) {
    return at::vec::fmadd(a, b, sum);
  }
};

#ifdef TOKCOMP_BFLOAT16_PAIRS
template <>
struct UnitTraits<BFloat16Pair> {
  using acc_t = float;
  using reg_t = __m512i;
  static constexpr int64_t kElements = 2;
  static TOKCOMP_INLINE reg_t load(const BFloat16Pair* from) { return _mm512_loadu_si512(from); }
  static TOKCOMP_INLINE reg_t broadcast(const BFloat16Pair* from) {
    int32_t bits;
    std::memcpy(&bits, from, sizeof(bits));
    return _mm512_set1_epi32(bits);
  }
  static TOKCOMP_INLINE Vec<float> multiply_add(reg_t a, reg_t b, const Vec<float>& sum) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// What products of a tensor's elements run over.
template <typename scalar_t>
struct UnitOf {
  using type = acc_type<scalar_t>;
};
#ifdef TOKCOMP_BFLOAT16_PAIRS
template <>
struct UnitOf<at::BFloat16> {
  using type = BFloat16Pair;
};
#endif

// A tile's accumulators, kTileRows x up to kPanelVectors, with a panel's row and one broadcast, fill the registers.
constexpr int64_t kTileRows = 6;
#if defined(CPU_CAPABILITY_AVX512)
constexpr int64_t kPanelVectors = 4;
#else
constexpr int64_t kPanelVectors = 2;
#endif

// Vectors are cut into panels, runs of near equal width: 13 in 4, 3, 3, 3.
constexpr int64_t count_panels(int64_t num_vectors) { return (num_vectors + kPanelVectors - 1) / kPanelVectors; }

struct Panel {
  Panel(int64_t num_vectors, int64_t index) {
    const int64_t count = count_panels(num_vectors), wider = num_vectors % count;
    width = num_vectors / count + (index < wider);
    first = num_vectors / count * index + std::min(index, wider);
  }
  int64_t first, width;  // in vectors
};

// Calls panel(first, width) for every panel.
template <typename F>
inline void for_each_panel(int64_t num_vectors, F&& panel) {
  for (int64_t i = 0; i < count_panels(num_vectors); ++i) {
    const Panel one(num_vectors, i);
    panel(one.first, one.width);
  }
}

// A tile's rows for units of a type, which may need registers of their own.
template <typename unit_t>
constexpr int64_t kRowsOf = kTileRows;

template <typename unit_t, int kVectors, typename Store>
TOKCOMP_INLINE void gemm_tile(const unit_t* a, int64_t a_row_stride, int64_t a_depth_stride, const unit_t* b,
                              int64_t depth, Store&& store) {
  using Unit = UnitTraits<unit_t>;
  using acc_t = typename Unit::acc_t;
  constexpr int64_t lanes = kLanes<acc_t>;
  Vec<acc_t> sum[kRowsOf<unit_t>][kVectors];
#pragma GCC unroll 8
  for (int64_t row = 0; row < kRowsOf<unit_t>; ++row) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[row][v] = Vec<acc_t>(acc_t(0));
  }
  for (int64_t step = 0; step < depth; ++step) {
    typename Unit::reg_t right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = Unit::load(b + v * lanes);
#pragma GCC unroll 8
    for (int64_t row = 0; row < kRowsOf<unit_t>; ++row) {
      const typename Unit::reg_t left = Unit::broadcast(a + row * a_row_stride);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[row][v] = Unit::multiply_add(left, right[v], sum[row][v]);
    }
    a += a_depth_stride;
    b += kVectors * lanes;
  }
#pragma GCC unroll 8
  for (int64_t row = 0; row < kRowsOf<unit_t>; ++row) store(row, sum[row]);
}

// gemm_tile in a panel of that width, in vectors.
template <typename unit_t, typename Store>
TOKCOMP_INLINE void gemm_tile_of(int64_t width, const unit_t* a, int64_t a_row_stride, int64_t a_depth_stride,
                                 const unit_t* b, int64_t depth, Store&& store) {
  switch (width) {
    case 1: gemm_tile<unit_t, 1>(a, a_row_stride, a_depth_stride, b, depth, store); break;
    case 2: gemm_tile<unit_t, 2>(a, a_row_stride, a_depth_stride, b, depth, store); break;
    case 3: gemm_tile<unit_t, 3>(a, a_row_stride, a_depth_stride, b, depth, store); break;
    default: gemm_tile<unit_t, 4>(a, a_row_stride, a_depth_stride, b, depth, store); break;
  }
}

// Calls store(row, first_vector, sums) with runs of vectors of each row's sums over `depth` units. Rows go up to `rows`
// rounded up to kTileRows, so `a` must be readable, and what store writes writable, up to there.
// a: unit (row, step) is at a[row * a_row_stride + step * a_depth_stride]; b: panels of `depth` units.
template <typename unit_t, typename Store>
inline void gemm(const unit_t* a, int64_t a_row_stride, int64_t a_depth_stride, int64_t rows, const unit_t* b,
                 int64_t num_vectors, int64_t depth, Store&& store) {
  constexpr int64_t lanes = kLanes<typename UnitTraits<unit_t>::acc_t>;
  for_each_panel(num_vectors, [&](int64_t first, int64_t width) {
    for (int64_t top = 0; top < rows; top += kTileRows) {
      const auto tile_store = [&](int64_t row, const auto& sums)
                                  __attribute__((always_inline)) { store(top + row, first, sums); };
      gemm_tile_of<unit_t>(width, a + top * a_row_stride, a_row_stride, a_depth_stride, b + first * lanes * depth,
                           depth, tile_store);
    }
  });
}

// A store for gemm: to[row * stride + column] = sums.
template <typename acc_t>
struct StoreTo {
  acc_t* to;
  int64_t stride;
  template <size_t kVectors>
  TOKCOMP_INLINE void operator()(int64_t row, int64_t first, const Vec<acc_t> (&sums)[kVectors]) const {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) sums[v].store(to + row * stride + (first + v) * kLanes<acc_t>);
  }
};

// A store for gemm: to[row * stride + column] += sums.
template <typename acc_t>
struct AddTo {
  acc_t* to;
  int64_t stride;
  template <size_t kVectors>
  TOKCOMP_INLINE void operator()(int64_t row, int64_t first, const Vec<acc_t> (&sums)[kVectors]) const {
#pragma GCC unroll 4
    for (size_t v = 0; v < kVectors; ++v) {
      acc_t* at = to + row * stride + (first + v) * kLanes<acc_t>;
      (Vec<acc_t>::loadu(at) + sums[v]).store(at);
    }
  }
};

// Rows of elements, the last dimension contiguous.
template <typename scalar_t>
struct Rows {
  const scalar_t* data;
  int64_t stride;
  const scalar_t* operator[](int64_t row) const { return data + row * stride; }
};

template <typename unit_t>
constexpr int64_t units(int64_t elements) {
  return (elements + UnitTraits<unit_t>::kElements - 1) / UnitTraits<unit_t>::kElements;
}

// One row of elements as units, the last one filled up with zero.
template <typename scalar_t, typename unit_t>
inline void load_units(const scalar_t* from, unit_t* to, int64_t count) {
  if constexpr (std::is_same_v<unit_t, BFloat16Pair>) {
    std::memcpy(to, from, count * sizeof(scalar_t));
    if (count % 2) to[count / 2].high = at::BFloat16(0);
  } else {
    load_row(from, to, count);
  }
}

// Left operand: `count` rows from `first` on, [round_up(count, kTileRows), units(width)], zero below the last row.
template <typename scalar_t, typename unit_t>
inline void pack_left(const Rows<scalar_t>& rows, int64_t first, int64_t count, int64_t width, unit_t* to) {
  const int64_t row_units = units<unit_t>(width);
  for (int64_t row = 0; row < count; ++row) load_units(rows[first + row], to + row * row_units, width);
  std::fill(to + count * row_units, to + round_up(count, kTileRows) * row_units, unit_t{});
}

// Left operand whose rows are those of a float matrix, rounded: to[row * stride / 2 + step] holds columns 2 step and
// 2 step + 1 of the row. stride: a multiple of a vector's lanes.
inline void round_rows([[maybe_unused]] const float* from, [[maybe_unused]] int64_t rows,
                       [[maybe_unused]] int64_t stride, [[maybe_unused]] BFloat16Pair* to) {
#ifdef TOKCOMP_BFLOAT16_PAIRS
  constexpr int64_t lanes = kLanes<float>;
  for (int64_t i = 0; i < rows * stride; i += lanes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i / 2), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
  }
#endif
}

// Left operand whose rows are the columns of a float matrix, rounded: to[step * stride + column] holds rows 2 step and
// 2 step + 1 of the column, the last one filled up with zero.
inline void round_columns([[maybe_unused]] const float* from, [[maybe_unused]] int64_t rows,
                          [[maybe_unused]] int64_t stride, [[maybe_unused]] BFloat16Pair* to) {
#ifdef TOKCOMP_BFLOAT16_PAIRS
  constexpr int64_t lanes = kLanes<float>;
  for (int64_t row = 0; row < rows; row += 2, from += 2 * stride, to += stride) {
    for (int64_t i = 0; i < stride; i += lanes) {
      const __m512 even = _mm512_loadu_ps(from + i);
      const __m512 odd = row + 1 < rows ? _mm512_loadu_ps(from + stride + i) : _mm512_setzero_ps();
      const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
      const __m512i high = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
      _mm512_storeu_si512(to + i, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
#endif
}

// A block of at most one vector's lanes of rows, transposed: to[step * to_stride + lane] = from[lane][step].
template <typename unit_t>
inline void transpose_block(const unit_t* from, int64_t from_stride, int64_t count, int64_t depth, unit_t* to,
                            int64_t to_stride) {
  constexpr int64_t lanes = kLanes<typename UnitTraits<unit_t>::acc_t>;
  int64_t done = 0;
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (sizeof(unit_t) == sizeof(float)) {
    if (count == lanes) {
      for (; done + lanes <= depth; done += lanes) {
        at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(from + done), from_stride,
                                      reinterpret_cast<float*>(to + done * to_stride), to_stride, lanes, lanes);
      }
    }
  }
#endif
  for (int64_t step = done; step < depth; ++step) {
    for (int64_t lane = 0; lane < count; ++lane) to[step * to_stride + lane] = from[lane * from_stride + step];
    std::fill(to + step * to_stride + count, to + step * to_stride + lanes, unit_t{});
  }
}

// Right operand whose columns are the rows given: panels of [units(width), columns], zero beyond `count` columns.
template <typename scalar_t, typename unit_t>
inline void pack_right_transposed(const Rows<scalar_t>& rows, int64_t count, int64_t width, unit_t* to) {
  constexpr int64_t lanes = kLanes<typename UnitTraits<unit_t>::acc_t>;
  const int64_t depth = units<unit_t>(width);
  // Elements that are units as they stand are read in place, others through a copy of one block.
  const bool in_place = std::is_same_v<scalar_t, unit_t> ||
                        (std::is_same_v<unit_t, BFloat16Pair> && width % 2 == 0 && rows.stride % 2 == 0);
  const Scratch<unit_t> copy(in_place ? 0 : lanes * depth);
  for_each_panel((count + lanes - 1) / lanes, [&](int64_t first, int64_t panel_width) {
    unit_t* panel = to + first * lanes * depth;
    for (int64_t v = 0; v < panel_width; ++v) {
      const int64_t top = (first + v) * lanes, filled = std::min(lanes, count - top);
      const unit_t* from = reinterpret_cast<const unit_t*>(rows[top]);
      int64_t from_stride = rows.stride / UnitTraits<unit_t>::kElements;
      if (!in_place) {
        for (int64_t row = 0; row < filled; ++row) load_units(rows[top + row], copy.get() + row * depth, width);
        from = copy.get();
        from_stride = depth;
      }
      transpose_block(from, from_stride, filled, depth, panel + v * lanes, panel_width * lanes);
    }
  });
}

// Right operand whose depth runs over the rows given: panels of [units(count), columns], zero beyond `width` columns.
template <typename scalar_t, typename unit_t>
inline void pack_right(const Rows<scalar_t>& rows, int64_t first_row, int64_t count, int64_t width, unit_t* to) {
  constexpr int64_t lanes = kLanes<typename UnitTraits<unit_t>::acc_t>;
  const int64_t depth = units<unit_t>(count);
  for_each_panel((width + lanes - 1) / lanes, [&](int64_t first, int64_t panel_width) {
    const int64_t begin = first * lanes, columns = panel_width * lanes, filled = std::min(columns, width - begin);
    unit_t* panel = to + begin * depth;
    for (int64_t step = 0; step < depth; ++step, panel += columns) {
      if constexpr (std::is_same_v<unit_t, BFloat16Pair>) {
        const scalar_t* even = rows[first_row + 2 * step] + begin;
        const bool paired = 2 * step + 1 < count;
        const scalar_t* odd = paired ? even + rows.stride : even;
        const uint32_t odd_mask = paired ? 0xffffffffu : 0u;
        for (int64_t i = 0; i < filled; ++i) {
          const uint32_t bits = uint32_t(even[i].x) | ((uint32_t(odd[i].x) << 16) & odd_mask);
          std::memcpy(panel + i, &bits, sizeof(bits));
        }
      } else {
        load_row(rows[first_row + step] + begin, panel, filled);
      }
      std::fill(panel + filled, panel + columns, unit_t{});
    }
  });
}

}  // namespace tokcomp
