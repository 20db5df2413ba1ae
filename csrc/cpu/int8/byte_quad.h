// Products of four unsigned bytes with four signed ones, added up in 32 bits: a unit of gemm.h.
#pragma once

#include "../gemm.h"

#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
#define TOKCOMP_BYTE_QUADS 1
#endif
#if (defined(CPU_CAPABILITY_AVX512) && defined(__AVX512VNNI__)) || \
    (defined(CPU_CAPABILITY_AVX2) && defined(__AVXVNNI__))
#define TOKCOMP_BYTE_QUADS_IN_ONE 1  // instruction, where others take three
#endif

namespace tokcomp {

struct ByteQuad {
  uint8_t of[4];
};

// The greatest magnitude that activations may have about their zero, which is one more; 0: there are no such products.
// In three instructions two products are added up in 16 bits, which 2 * 127 * 127 just fits.
#if defined(TOKCOMP_BYTE_QUADS_IN_ONE)
constexpr int64_t kByteLevels = 127;
#elif defined(TOKCOMP_BYTE_QUADS)
constexpr int64_t kByteLevels = 63;
#else
constexpr int64_t kByteLevels = 0;
#endif

#ifdef TOKCOMP_BYTE_QUADS

#if defined(CPU_CAPABILITY_AVX2) && !defined(TOKCOMP_BYTE_QUADS_IN_ONE)
template <>
inline constexpr int64_t kRowsOf<ByteQuad> = 4;  // sums of 16 bits, and ones, take two of sixteen registers
#endif

template <>
struct UnitTraits<ByteQuad> {
  using acc_t = int32_t;
  using reg_t = Vec<int32_t>;
  static constexpr int64_t kElements = 4;
  static TOKCOMP_INLINE reg_t load(const ByteQuad* from) { return reg_t::loadu(from); }
  static TOKCOMP_INLINE reg_t broadcast(const ByteQuad* from) {
    int32_t bits;
    std::memcpy(&bits, from, sizeof(bits));
    return reg_t(bits);
  }
  static TOKCOMP_INLINE reg_t multiply_add(const reg_t& a, const reg_t& b, const reg_t& sum) {
#if defined(CPU_CAPABILITY_AVX512) && defined(TOKCOMP_BYTE_QUADS_IN_ONE)
    return _mm512_dpbusd_epi32(sum, a, b);
#elif defined(CPU_CAPABILITY_AVX512)
    return _mm512_add_epi32(sum, _mm512_madd_epi16(_mm512_maddubs_epi16(a, b), _mm512_set1_epi16(1)));
#elif defined(TOKCOMP_BYTE_QUADS_IN_ONE)
    return _mm256_dpbusd_avx_epi32(sum, a, b);
#else
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), _mm256_set1_epi16(1)));
#endif
  }
};

#endif

}  // namespace tokcomp
