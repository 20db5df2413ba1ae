// Products of four unsigned bytes with four signed ones, added up in 32 bits: a unit of gemm.h.
#pragma once

#include "../gemm.h"

namespace tokcomp {

struct ByteQuad {
  uint8_t of[4];
};

// The greatest magnitude that activations may have about their zero, which is one more; 0: there are no such products.
// Without VNNI two products are added up in 16 bits, which 2 * 127 * 127 just fits.
#if defined(CPU_CAPABILITY_AVX512)
#define TOKCOMP_BYTE_QUADS 1
#ifdef __AVX512VNNI__
constexpr int64_t kByteLevels = 127;
#else
constexpr int64_t kByteLevels = 63;
#endif

template <>
struct UnitTraits<ByteQuad> {
  using acc_t = int32_t;
  using reg_t = __m512i;
  static constexpr int64_t kElements = 4;
  static TOKCOMP_INLINE reg_t load(const ByteQuad* from) { return _mm512_loadu_si512(from); }
  static TOKCOMP_INLINE reg_t broadcast(const ByteQuad* from) {
    int32_t bits;
    std::memcpy(&bits, from, sizeof(bits));
    return _mm512_set1_epi32(bits);
  }
  static TOKCOMP_INLINE Vec<int32_t> multiply_add(reg_t a, reg_t b, const Vec<int32_t>& sum) {
#ifdef __AVX512VNNI__
    return _mm512_dpbusd_epi32(sum, a, b);
#else
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)));
#endif
  }
};
#elif defined(CPU_CAPABILITY_AVX2)
#define TOKCOMP_BYTE_QUADS 1
#ifdef __AVXVNNI__
constexpr int64_t kByteLevels = 127;
#else
constexpr int64_t kByteLevels = 63;
template <>
inline constexpr int64_t kRowsOf<ByteQuad> = 4;  // with sums of 16 bits and ones beside them
#endif

template <>
struct UnitTraits<ByteQuad> {
  using acc_t = int32_t;
  using reg_t = __m256i;
  static constexpr int64_t kElements = 4;
  static TOKCOMP_INLINE reg_t load(const ByteQuad* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static TOKCOMP_INLINE reg_t broadcast(const ByteQuad* from) {
    int32_t bits;
    std::memcpy(&bits, from, sizeof(bits));
    return _mm256_set1_epi32(bits);
  }
  static TOKCOMP_INLINE Vec<int32_t> multiply_add(reg_t a, reg_t b, const Vec<int32_t>& sum) {
#ifdef __AVXVNNI__
    return _mm256_dpbusd_avx_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
#endif
  }
};
#else
constexpr int64_t kByteLevels = 0;
#endif

}  // namespace tokcomp
