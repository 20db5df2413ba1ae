// Rows of float to bytes about a zero, with a scale for each row, which keeps an image's result apart from what else is
// in its batch.
#pragma once

#include <utility>

#include "../gelu.h"
#include "../vector.h"

namespace tokcomp::int8 {

using Floats = Vec<float>;

// Elements for which a thread is worth waking.
constexpr int64_t kGrain = 16384;

inline int64_t grain_of(int64_t width) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width)); }

// The activation between two layers, where what follows rounds it to bytes.
class Gelu {
 public:
  TOKCOMP_INLINE Floats operator()(const Floats& x) const {
#ifdef TOKCOMP_GELU_TABLE
    return table_(x);
#else
    return x * Floats(0.5f) * (Floats(1.f) + (x * Floats(static_cast<float>(M_SQRT1_2))).erf());
#endif
  }

 private:
#ifdef TOKCOMP_GELU_TABLE
  TableGelu table_;
#endif
};

// Calls body(first, count) for a row's vectors; the last one may not be whole.
template <typename Body>
TOKCOMP_INLINE void for_each_vector(int64_t width, Body&& body) {
  int64_t i = 0;
  for (; i + kLanes<float> <= width; i += kLanes<float>) body(i, std::integral_constant<int64_t, kLanes<float>>());
  if (i < width) body(i, width - i);
}

TOKCOMP_INLINE Floats load(const float* from, std::integral_constant<int64_t, kLanes<float>>) {
  return Floats::loadu(from);
}
TOKCOMP_INLINE Floats load(const float* from, int64_t count) { return Floats::loadu(from, static_cast<int>(count)); }

// The nearest whole numbers, ties to even, plus `zero`, as bytes.
TOKCOMP_INLINE void store_bytes(const Floats& values, int32_t zero, uint8_t* to) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m512i whole = _mm512_add_epi32(_mm512_cvtps_epi32(values), _mm512_set1_epi32(zero));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(whole));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m256i whole = _mm256_add_epi32(_mm256_cvtps_epi32(values), _mm256_set1_epi32(zero));
  const __m128i halves = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packus_epi16(halves, halves));
#else
  alignas(64) int32_t whole[kLanes<float>];
  at::vec::convert_to_int_of_same_size<float>(values.round()).store(whole);
  for (int64_t i = 0; i < kLanes<float>; ++i) to[i] = static_cast<uint8_t>(whole[i] + zero);
#endif
}

// out[i] = row[i] / scale to the nearest, ties to even, about `levels` + 1; returns the scale, most / levels, where
// `most` is the row's greatest magnitude, NaN if it holds one.
inline float quantize_row(const float* row, float most, uint8_t* out, int64_t width, int64_t levels) {
  const float scale = most / static_cast<float>(levels);
  // A row of zeros, or of what is too small to have an inverse, is zeros; NaN and infinity stay in the scale.
  const bool normal = std::isnormal(scale);
  const int32_t zero = static_cast<int32_t>(levels) + 1;
  if (!normal) {
    std::fill_n(out, width, static_cast<uint8_t>(zero));
    return std::isfinite(scale) ? 0.f : scale;
  }
  const Floats factor(1.f / scale);
  for_each_vector(width, [&](int64_t i, auto count) {
    if constexpr (std::is_same_v<decltype(count), int64_t>) {
      uint8_t bytes[kLanes<float>];
      store_bytes(load(row + i, count) * factor, zero, bytes);
      std::copy_n(bytes, count, out + i);
    } else {
      store_bytes(load(row + i, count) * factor, zero, out + i);
    }
  });
  return scale;
}

// The greatest magnitude of a row; NaN if it holds one.
inline float magnitude(const float* row, int64_t width) {
  Floats most(0.f);
  for_each_vector(width, [&](int64_t i, auto count) { most = at::vec::maximum(most, load(row + i, count).abs()); });
  return at::vec::vec_reduce_all<float>([](Floats& a, Floats& b) { return at::vec::maximum(a, b); }, most);
}

// row = gelu(row); returns its greatest magnitude.
inline float gelu_magnitude(float* row, int64_t width, const Gelu& gelu) {
  Floats most(0.f);
  for_each_vector(width, [&](int64_t i, auto count) {
    const Floats value = gelu(load(row + i, count));
    value.store(row + i, static_cast<int>(count));
    most = at::vec::maximum(most, value.abs());
  });
  return at::vec::vec_reduce_all<float>([](Floats& a, Floats& b) { return at::vec::maximum(a, b); }, most);
}

}  // namespace tokcomp::int8
