// Vector arithmetic that at::vec lacks or does more slowly than a softmax can afford, and rows in and out of the
// accumulate type.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <c10/core/impl/alloc_cpu.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>

#include "../common/dispatch.h"

#define TOKCOMP_INLINE inline __attribute__((always_inline))

#if defined(CPU_CAPABILITY_AVX512) && defined(__AVX512BF16__)
#define TOKCOMP_BFLOAT16_PAIRS 1
#endif

namespace tokcomp {

template <typename T>
using Vec = at::vec::Vectorized<T>;

template <typename T>
constexpr int64_t kLanes = Vec<T>::size();

constexpr int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Aligned memory of one thread's own, uninitialised.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(static_cast<T*>(c10::alloc_cpu(count * sizeof(T)))) {}
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* data) const { c10::free_cpu(data); }
  };
  std::unique_ptr<T, Free> data_;
};

// 2^x for x <= 0 or little above it (and NaN). Relative error about 1e-7 in float; what is below float's normal
// numbers, as 2^-inf is, may be 0.
template <typename T>
TOKCOMP_INLINE Vec<T> exp2_nonpositive(const Vec<T>& x) {
#if defined(CPU_CAPABILITY_AVX512) || defined(CPU_CAPABILITY_AVX2)
  if constexpr (std::is_same_v<T, float>) {
    // A lane whose result would not be a normal number is left out: some CPUs take hundreds of cycles for it, and there
    // is one in most rows, beyond the last key. Where an operand is NaN, max gives the second one.
    constexpr float kLeast = -125.f;
#if defined(CPU_CAPABILITY_AVX512)
    const __mmask16 normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(kLeast), _CMP_NLT_UQ);
    const Vec<float> clamped = _mm512_max_ps(_mm512_set1_ps(kLeast), x);
#else
    const __m256 normal = _mm256_cmp_ps(x, _mm256_set1_ps(kLeast), _CMP_NLT_UQ);
    const Vec<float> clamped = _mm256_max_ps(_mm256_set1_ps(kLeast), x);
#endif
    const Vec<float> whole = clamped.round(), rest = clamped - whole;
    // The polynomial of degree 6 with the least relative error on [-1/2, 1/2], 1.9e-9 before rounding.
    Vec<float> power(1.53458121613e-4f);
    power = at::vec::fmadd(power, rest, Vec<float>(1.33999311772e-3f));
    power = at::vec::fmadd(power, rest, Vec<float>(9.61848895633e-3f));
    power = at::vec::fmadd(power, rest, Vec<float>(5.55032877711e-2f));
    power = at::vec::fmadd(power, rest, Vec<float>(2.40226468906e-1f));
    power = at::vec::fmadd(power, rest, Vec<float>(6.93147205737e-1f));
    power = at::vec::fmadd(power, rest, Vec<float>(1.f));
#if defined(CPU_CAPABILITY_AVX512)
    return _mm512_maskz_scalef_ps(normal, power, whole);
#else
    const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(whole), 23);
    return _mm256_and_ps(normal, _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(power), exponent)));
#endif
  }
#endif
  return x.exp2();
}

// Lane by lane the greater of the two, `kept` where the candidate is NaN.
template <typename T>
TOKCOMP_INLINE Vec<T> max_ignoring_nan(const Vec<T>& candidate, const Vec<T>& kept) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, float>) return _mm512_max_ps(candidate, kept);
  if constexpr (std::is_same_v<T, double>) return _mm512_max_pd(candidate, kept);
#endif
  return Vec<T>::blendv(kept, candidate, candidate > kept);
}

template <typename T>
TOKCOMP_INLINE T reduce_max(const Vec<T>& values) {
  return at::vec::vec_reduce_all<T>([](Vec<T>& a, Vec<T>& b) { return max_ignoring_nan(a, b); }, values);
}

template <typename T>
TOKCOMP_INLINE T reduce_add(const Vec<T>& values) {
  return at::vec::vec_reduce_all<T>([](Vec<T>& a, Vec<T>& b) { return a + b; }, values);
}

// All bits set in the first `count` lanes.
template <typename T>
Vec<T> first_lanes(int64_t count) {
  return Vec<T>::arange(T(0), T(1)) < Vec<T>(T(count));
}

// Two vectors rounded to one of a 16-bit type. Where the CPU rounds to bfloat16 itself, it takes what is below float's
// normal numbers for zero; at::vec, which does not, would take some twenty instructions for it.
template <typename scalar_t>
TOKCOMP_INLINE Vec<scalar_t> from_float(const Vec<float>& low, const Vec<float>& high) {
#ifdef TOKCOMP_BFLOAT16_PAIRS
  if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
    return Vec<scalar_t>((__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
#endif
  return at::vec::convert_from_float<scalar_t>(low, high);
}

template <typename scalar_t, typename acc_t>
inline void load_row(const scalar_t* from, acc_t* to, int64_t count) {
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    std::copy_n(from, count, to);
  } else {
    constexpr int64_t kStep = kLanes<scalar_t>, kHalf = kLanes<float>;
    int64_t i = 0;
    for (; i + kStep <= count; i += kStep) {
      const auto [low, high] = at::vec::convert_to_float<scalar_t>(Vec<scalar_t>::loadu(from + i));
      low.store(to + i);
      high.store(to + i + kHalf);
    }
    for (; i < count; ++i) to[i] = static_cast<acc_t>(from[i]);
  }
}

// to[i] = from[i] * factor
template <typename acc_t, typename scalar_t>
inline void store_row(const acc_t* from, acc_t factor, scalar_t* to, int64_t count) {
  const Vec<acc_t> scale(factor);
  int64_t i = 0;
  if constexpr (std::is_same_v<scalar_t, acc_t>) {
    constexpr int64_t kStep = kLanes<acc_t>;
    for (; i + kStep <= count; i += kStep) (Vec<acc_t>::loadu(from + i) * scale).store(to + i);
  } else {
    constexpr int64_t kStep = kLanes<scalar_t>, kHalf = kLanes<float>;
    for (; i + kStep <= count; i += kStep) {
      const Vec<float> low = Vec<float>::loadu(from + i) * scale, high = Vec<float>::loadu(from + i + kHalf) * scale;
      from_float<scalar_t>(low, high).store(to + i);
    }
  }
  for (; i < count; ++i) to[i] = static_cast<scalar_t>(from[i] * factor);
}

}  // namespace tokcomp
