// The forward pass of attention on tiles: bfloat16 on a CPU with AMX.
#pragma once

#include "attention.h"
#include "tiles.h"

#ifdef TOKCOMP_TILES

namespace tokcomp::tiles {

// 2^x for x <= 0 or little above it; 2^-126 below that. Relative error 3e-6, well below bfloat16's rounding.
TOKCOMP_INLINE __m512 exp2_for_bfloat16(__m512 x) {
  // Where an operand is NaN, max gives the second one.
  const __m512 clamped = _mm512_max_ps(_mm512_set1_ps(-126.f), x);
  // Added to 1.5 * 2^23 a number is rounded to a whole one, which the lowest bits then hold.
  const __m512 shifted = _mm512_add_ps(clamped, _mm512_set1_ps(12582912.f));
  const __m512 rest = _mm512_sub_ps(clamped, _mm512_sub_ps(shifted, _mm512_set1_ps(12582912.f)));
  // The polynomial of degree 4 with the least relative error on [-1/2, 1/2].
  __m512 power = _mm512_fmadd_ps(_mm512_set1_ps(9.57010190807e-3f), rest, _mm512_set1_ps(5.59178603193e-2f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(2.40247448279e-1f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(6.93121814737e-1f));
  power = _mm512_fmadd_ps(power, rest, _mm512_set1_ps(9.99999261446e-1f));
  const __m512i exponent = _mm512_slli_epi32(_mm512_castps_si512(shifted), 23);
  return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(power), exponent));
}

// exp(score * scale + bias - maximum) of one row's products, rounded, and their sum; scale and bias carry log2 e. Zero
// from `tokens` to `stride`.
inline float softmax_row(const float* products, float scale, const float* bias, int64_t tokens, int64_t stride,
                         at::BFloat16* probabilities) {
  constexpr int64_t lanes = kLanes<float>;
  const __m512 factor = _mm512_set1_ps(scale);
  __m512 maxima = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t i = 0; i < tokens; i += lanes) {
    // Bias is -inf beyond the last key. NaN is not kept.
    maxima = _mm512_max_ps(_mm512_fmadd_ps(_mm512_loadu_ps(products + i), factor, _mm512_loadu_ps(bias + i)), maxima);
  }
  const __m512 maximum = _mm512_set1_ps(reduce_max(Vec<float>(maxima)));
  __m512 sum = _mm512_setzero_ps();
  int64_t i = 0;
  const auto step = [&](__mmask16 inside) {
    const __m512 score = _mm512_fmadd_ps(_mm512_loadu_ps(products + i), factor, _mm512_loadu_ps(bias + i));
    const __m512 e = _mm512_maskz_mov_ps(inside, exp2_for_bfloat16(_mm512_sub_ps(score, maximum)));
    sum = _mm512_add_ps(sum, e);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(probabilities + i), (__m256i)_mm512_cvtneps_pbh(e));
  };
  for (; i + lanes <= tokens; i += lanes) step(~__mmask16(0));
  if (i < tokens) {
    step(static_cast<__mmask16>((1u << (tokens - i)) - 1));
    i += lanes;
  }
  std::fill(probabilities + i, probabilities + stride, at::BFloat16(0));
  return reduce_add(Vec<float>(sum));
}

// What attention_forward_heads computes without a mask. first_rows: [B, H, N]; out: [B, N, H, D].
inline void attention_heads(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const KeyBias<float>& bias,
                            double scale, at::BFloat16* out, float* first_rows) {
  constexpr int64_t kBlock = 2 * kRows;
  const AttentionShape shape(q);
  const int64_t tokens = shape.tokens, width = shape.width, heads = shape.heads;
  const int64_t padded_tokens = round_up(tokens, kDepth), padded_width = round_up(width, kDepth);
  const int64_t score_columns = (tokens + kRows - 1) / kRows, out_columns = (width + kRows - 1) / kRows;
  const int64_t key_stride = padded_width * kRows, value_stride = padded_tokens * kRows;

  at::parallel_for(0, shape.batch * heads, 1, [&](int64_t begin, int64_t end) {
    const Session session;
    const Scratch<at::BFloat16> keys(score_columns * key_stride), values(out_columns * value_stride);
    const Scratch<at::BFloat16> queries(kBlock * padded_width), probabilities(kBlock * padded_tokens);
    const Scratch<float> scores(kBlock * padded_tokens), products(kBlock * padded_width), bias_log2(padded_tokens);
    const RowMask<float> no_mask(0);
    std::fill(queries.get(), queries.get() + kBlock * padded_width, at::BFloat16(0));
    std::fill(probabilities.get(), probabilities.get() + kBlock * padded_tokens, at::BFloat16(0));

    for (int64_t task = begin; task < end; ++task) {
      const int64_t image = task / heads, head = task % heads;
      pack_right_transposed(head_rows<at::BFloat16>(k, image, head), tokens, width, keys.get());
      pack_right(head_rows<at::BFloat16>(v, image, head), tokens, width, values.get());
      const Rows<at::BFloat16> query_rows = head_rows<at::BFloat16>(q, image, head);
      const float* key_bias = bias[image];
      for (int64_t i = 0; i < score_columns * kRows; ++i) bias_log2.get()[i] = key_bias[i] * float(kLog2E);

      for (int64_t first = 0; first < tokens; first += kBlock) {
        const int64_t rows = std::min(kBlock, tokens - first), row_tiles = rows > kRows ? 2 : 1;
        pack_left(query_rows, first, rows, width, padded_width, queries.get());
        multiply_all(queries.get(), padded_width, row_tiles, keys.get(), key_stride, score_columns,
                     padded_width / kDepth, scores.get(), padded_tokens);
        float sums[kBlock];
        for (int64_t row = 0; row < rows; ++row) {
          sums[row] = softmax_row(scores.get() + row * padded_tokens, float(scale * kLog2E), bias_log2.get(), tokens,
                                  padded_tokens, probabilities.get() + row * padded_tokens);
        }
        if (first == 0) {  // in full: importance is not rounded to bfloat16
          float* row = scores.get();
          Vec<float> maxima(-std::numeric_limits<float>::infinity());
          for (int64_t i = 0; i < score_columns * kRows; i += kLanes<float>) {
            const Vec<float> score =
                at::vec::fmadd(Vec<float>::loadu(row + i), Vec<float>(float(scale)), Vec<float>::loadu(key_bias + i));
            score.store(row + i);
            maxima = max_ignoring_nan(score, maxima);
          }
          const float sum = tokcomp::softmax_row<false>(row, reduce_max(maxima), tokens, no_mask, 0.f, row);
          store_row(row, 1.f / sum, first_rows + task * tokens, tokens);
        }
        multiply_all(probabilities.get(), padded_tokens, row_tiles, values.get(), value_stride, out_columns,
                     padded_tokens / kDepth, products.get(), padded_width);
        for (int64_t row = 0; row < rows; ++row) {
          store_row(products.get() + row * padded_width, 1.f / sums[row],
                    out + ((image * tokens + first + row) * heads + head) * width, width);
        }
      }
    }
  });
}

}  // namespace tokcomp::tiles

#endif

namespace tokcomp {

// Whether attention without a mask was computed on tiles, which multiply bfloat16 alone. first_rows: [B, H, N]; out:
// [B, N, H, D].
template <typename scalar_t, typename acc_t>
inline bool attention_on_tiles([[maybe_unused]] const at::Tensor& q, [[maybe_unused]] const at::Tensor& k,
                               [[maybe_unused]] const at::Tensor& v, [[maybe_unused]] const KeyBias<acc_t>& bias,
                               [[maybe_unused]] double scale, [[maybe_unused]] scalar_t* out,
                               [[maybe_unused]] acc_t* first_rows) {
#ifdef TOKCOMP_TILES
  if constexpr (std::is_same_v<scalar_t, at::BFloat16>) {
    if (tiles::usable()) {
      tiles::attention_heads(q, k, v, bias, scale, out, first_rows);
      return true;
    }
  }
#endif
  return false;
}

}  // namespace tokcomp
