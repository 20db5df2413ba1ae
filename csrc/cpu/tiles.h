// Matrix tiles (AMX): 16 rows of 64 bytes each, multiplied as pairs of bfloat16 into 16 x 16 floats, or as fours of
// unsigned by signed bytes into 16 x 16 integers. Bytes lie as bfloat16 would that held two of them each.
//
// A left tile is 16 rows of 32 elements. A right tile has 16 rows of 16 pairs: row p, column j holds elements 2 p and
// 2 p + 1 of column j. Both lie in memory as 1024 bytes, right ones always packed.
#pragma once

#include "gemm.h"

#if defined(TOKCOMP_BFLOAT16_PAIRS) && defined(__AMX_BF16__) && defined(__AMX_INT8__)
#define TOKCOMP_TILES 1

#include <ATen/cpu/Utils.h>
#include <cpuid.h>
#include <immintrin.h>

#include <array>

namespace tokcomp::tiles {

constexpr int64_t kRows = 16;   // of every tile; columns of a right one and of a sum
constexpr int64_t kDepth = 32;  // elements of a left tile's row
constexpr int64_t kElements = kRows * kDepth;

// Whether the processor has tiles of bfloat16 and of bytes, and the system lets this process use them.
inline bool usable() {
  static const bool granted = [] {
    constexpr unsigned kNeeded = 1u << 22 | 1u << 24 | 1u << 25;  // bfloat16, tiles, bytes
    unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
    const bool has = __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & kNeeded) == kNeeded;
    return has && at::cpu::init_amx();
  }();
  return granted;
}

// All eight tiles at their full size, while it lives, on the thread that made it.
class Session {
 public:
  Session() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) {
      config.bytes[i] = 64;
      config.rows[i] = kRows;
    }
    _tile_loadconfig(&config);
  }
  ~Session() { _tile_release(); }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
};

// Tiles are named by constants that only a macro can pass on.
#define TOKCOMP_TILE_PRODUCT(sum, left, right) \
  do {                                         \
    if constexpr (kBytes) {                    \
      _tile_dpbusd(sum, left, right);          \
    } else {                                   \
      _tile_dpbf16ps(sum, left, right);        \
    }                                          \
  } while (false)

// to [kRowTiles * 16, kColumnTiles * 16] = left right, or += where `adds`, by `steps` tiles of depth.
// left: rows left_stride elements apart. right: tiles of one column of tiles follow each other by depth, and the next
// column of tiles is right_stride elements on. to: rows to_stride floats apart.
// kBytes: of bytes; the sums are then 32-bit integers in the floats' place.
template <int kRowTiles, int kColumnTiles, bool kBytes>
TOKCOMP_INLINE void multiply(const at::BFloat16* left, int64_t left_stride, const at::BFloat16* right,
                             int64_t right_stride, int64_t steps, float* to, int64_t to_stride, bool adds) {
  static_assert(kRowTiles >= 1 && kRowTiles <= 2 && kColumnTiles >= 1 && kColumnTiles <= 2);
  const int64_t left_bytes = left_stride * 2, to_bytes = to_stride * 4;
  if (adds) {
    _tile_loadd(0, to, to_bytes);
    if constexpr (kColumnTiles == 2) _tile_loadd(1, to + kRows, to_bytes);
    if constexpr (kRowTiles == 2) _tile_loadd(2, to + kRows * to_stride, to_bytes);
    if constexpr (kRowTiles == 2 && kColumnTiles == 2) _tile_loadd(3, to + kRows * to_stride + kRows, to_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kColumnTiles == 2) _tile_zero(1);
    if constexpr (kRowTiles == 2) _tile_zero(2);
    if constexpr (kRowTiles == 2 && kColumnTiles == 2) _tile_zero(3);
  }
  for (int64_t step = 0; step < steps; ++step, left += kDepth, right += kElements) {
    _tile_loadd(4, left, left_bytes);
    _tile_loadd(6, right, 64);
    TOKCOMP_TILE_PRODUCT(0, 4, 6);
    if constexpr (kColumnTiles == 2) {
      _tile_loadd(7, right + right_stride, 64);
      TOKCOMP_TILE_PRODUCT(1, 4, 7);
    }
    if constexpr (kRowTiles == 2) {
      _tile_loadd(5, left + kRows * left_stride, left_bytes);
      TOKCOMP_TILE_PRODUCT(2, 5, 6);
      if constexpr (kColumnTiles == 2) TOKCOMP_TILE_PRODUCT(3, 5, 7);
    }
  }
  _tile_stored(0, to, to_bytes);
  if constexpr (kColumnTiles == 2) _tile_stored(1, to + kRows, to_bytes);
  if constexpr (kRowTiles == 2) _tile_stored(2, to + kRows * to_stride, to_bytes);
  if constexpr (kRowTiles == 2 && kColumnTiles == 2) _tile_stored(3, to + kRows * to_stride + kRows, to_bytes);
}

#undef TOKCOMP_TILE_PRODUCT

// multiply() over `column_tiles` columns of tiles, for one or two tiles of rows.
template <bool kBytes = false>
inline void multiply_all(const at::BFloat16* left, int64_t left_stride, int64_t row_tiles, const at::BFloat16* right,
                         int64_t right_stride, int64_t column_tiles, int64_t steps, float* to, int64_t to_stride,
                         bool adds = false) {
  const auto run = [&](auto rows) {
    int64_t column = 0;
    for (; column + 2 <= column_tiles; column += 2) {
      multiply<rows, 2, kBytes>(left, left_stride, right + column * right_stride, right_stride, steps,
                                to + column * kRows, to_stride, adds);
    }
    if (column < column_tiles) {
      multiply<rows, 1, kBytes>(left, left_stride, right + column * right_stride, right_stride, steps,
                                to + column * kRows, to_stride, adds);
    }
  };
  row_tiles == 2 ? run(std::integral_constant<int, 2>()) : run(std::integral_constant<int, 1>());
}

// Left operand: `count` rows from `first` on, rows `stride` elements apart, zero beyond `width`.
inline void pack_left(const Rows<at::BFloat16>& rows, int64_t first, int64_t count, int64_t width, int64_t stride,
                      at::BFloat16* to) {
  for (int64_t row = 0; row < count; ++row, to += stride) {
    std::memcpy(to, rows[first + row], width * sizeof(at::BFloat16));
    std::fill(to + width, to + stride, at::BFloat16(0));
  }
}

// Right operand whose columns are the rows given: column tiles of round_up(width, 32) / 32 tiles each, zero beyond
// `count` columns and `width`.
inline void pack_right_transposed(const Rows<at::BFloat16>& rows, int64_t count, int64_t width, at::BFloat16* to) {
  const int64_t depth_tiles = (width + kDepth - 1) / kDepth;
  alignas(64) at::BFloat16 edge[kElements];
  for (int64_t top = 0; top < count; top += kRows) {
    const int64_t filled = std::min(kRows, count - top);
    for (int64_t d = 0; d < depth_tiles; ++d, to += kElements) {
      const int64_t valid = std::min(kDepth, width - d * kDepth);
      const at::BFloat16* from = rows[top] + d * kDepth;
      int64_t stride = rows.stride;
      if (filled < kRows || valid < kDepth || stride % 2 != 0) {
        std::memset(edge, 0, sizeof(edge));
        for (int64_t row = 0; row < filled; ++row) {
          std::memcpy(edge + row * kDepth, from + row * stride, valid * sizeof(at::BFloat16));
        }
        from = edge;
        stride = kDepth;
      }
      at::vec::transpose_mxn<float>(reinterpret_cast<const float*>(from), stride / 2, reinterpret_cast<float*>(to),
                                    kRows, kRows, kRows);
    }
  }
}

// Right operand whose depth runs over the rows given: column tiles of round_up(count, 32) / 32 tiles each, zero beyond.
inline void pack_right(const Rows<at::BFloat16>& rows, int64_t count, int64_t width, at::BFloat16* to) {
  const int64_t steps = (count + kDepth - 1) / kDepth, column_stride = steps * kElements;
  alignas(64) static constexpr auto kInterleave = [] {
    std::array<uint16_t, 64> lanes{};
    for (int i = 0; i < 64; ++i) lanes[i] = static_cast<uint16_t>(i / 2 + i % 2 * 32);
    return lanes;
  }();
  const __m512i low = _mm512_loadu_si512(kInterleave.data()), high = _mm512_loadu_si512(kInterleave.data() + 32);
  for (int64_t row = 0; row < steps * kDepth; row += 2) {
    at::BFloat16* line = to + row / kDepth * kElements + row % kDepth * kRows;
    for (int64_t c = 0; c < width; c += kDepth) {
      const int64_t valid = std::min(kDepth, width - c);
      const __mmask32 mask = valid == kDepth ? ~__mmask32(0) : (__mmask32(1) << valid) - 1;
      const __m512i even = _mm512_maskz_loadu_epi16(row < count ? mask : 0, rows[std::min(row, count - 1)] + c);
      const __m512i odd = _mm512_maskz_loadu_epi16(row + 1 < count ? mask : 0, rows[std::min(row + 1, count - 1)] + c);
      at::BFloat16* column = line + c / kRows * column_stride;
      _mm512_storeu_si512(column, _mm512_permutex2var_epi16(even, low, odd));
      if (valid > kRows) {
        _mm512_storeu_si512(column + column_stride, _mm512_permutex2var_epi16(even, high, odd));
      }
    }
  }
}

}  // namespace tokcomp::tiles

#endif
