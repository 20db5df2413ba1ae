// GELU of vectors of float where what follows rounds to fewer digits than float has.
#pragma once

#include <cmath>

#include "vector.h"

#if defined(CPU_CAPABILITY_AVX512)
#define TOKCOMP_GELU_TABLE 1

namespace tokcomp {

// x Phi(x) = max(x, 0) - |x| Q(|x|), Q the normal distribution's upper tail, from its Taylor polynomials of degree 3
// about 32 points: within 2e-6 |x|. An infinity's lower side is 0.
class TableGelu {
 public:
  TableGelu() {
    const Table& table = shared();
    for (int power = 0; power < 4; ++power) {
      low_[power] = _mm512_loadu_ps(table.of[power]);
      high_[power] = _mm512_loadu_ps(table.of[power] + 16);
    }
  }

  TOKCOMP_INLINE __m512 operator()(__m512 x) const {
    // Where an operand is NaN, min and max give the second one.
    const __m512 t = _mm512_min_ps(_mm512_set1_ps(float(kWidth) * 31), _mm512_abs_ps(x));
    // Added to 1.5 * 2^23 a number is rounded to a whole one, which the lowest bits then hold.
    const __m512 shifted = _mm512_fmadd_ps(t, _mm512_set1_ps(float(1 / kWidth)), _mm512_set1_ps(12582912.f));
    const __m512i point = _mm512_castps_si512(shifted);
    const __m512 rest =
        _mm512_fmsub_ps(t, _mm512_set1_ps(float(1 / kWidth)), _mm512_sub_ps(shifted, _mm512_set1_ps(12582912.f)));
    __m512 tail = _mm512_permutex2var_ps(low_[3], point, high_[3]);
    tail = _mm512_fmadd_ps(tail, rest, _mm512_permutex2var_ps(low_[2], point, high_[2]));
    tail = _mm512_fmadd_ps(tail, rest, _mm512_permutex2var_ps(low_[1], point, high_[1]));
    tail = _mm512_fmadd_ps(tail, rest, _mm512_permutex2var_ps(low_[0], point, high_[0]));
    return _mm512_fnmadd_ps(t, tail, _mm512_max_ps(_mm512_setzero_ps(), x));
  }

 private:
  // Between points. The last one is at 31/6: beyond it |x| Q(|x|) is below 7e-7.
  static constexpr double kWidth = 1. / 6;

  struct Table {
    float of[4][32];
    Table() {
      for (int i = 0; i < 32; ++i) {
        const double t = i * kWidth, density = std::exp(-t * t / 2) / std::sqrt(2 * M_PI);
        of[0][i] = static_cast<float>(std::erfc(t * M_SQRT1_2) / 2);
        of[1][i] = static_cast<float>(-density * kWidth);
        of[2][i] = static_cast<float>(t * density * kWidth * kWidth / 2);
        of[3][i] = static_cast<float>((1 - t * t) * density * kWidth * kWidth * kWidth / 6);
      }
    }
  };

  static const Table& shared() {
    static const Table table;
    return table;
  }

  __m512 low_[4], high_[4];
};

}  // namespace tokcomp

#endif
