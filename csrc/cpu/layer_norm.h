// LayerNorm of one row on CPU: statistics in the accumulate type in two passes, one rounding at the end.
#pragma once

#include <cmath>
#include <cstdint>

#include "rows.h"

namespace tokcomp {

template <typename T, typename A = acc_type<T>>
struct LayerNorm {
  const T* weight;  // [C] or nullptr: ones
  const T* bias;    // [C] or nullptr: zeros
  A eps;
  int64_t width;

  void operator()(const T* row, T* out) const {
    if constexpr (!std::is_same_v<T, A>) {
      if (width <= kMostWide) {  // widened once, not in each of the three passes
        alignas(64) A wide[kMostWide];
        load_row(row, wide, width);
        return normalize(wide, out);
      }
    }
    normalize(row, out);
  }

 private:
  static constexpr int64_t kStep = rows::kStep<A>;
  static constexpr int64_t kMostWide = 1024;

  template <typename S>
  void normalize(const S* row, T* out) const {
    using V = Vec<A>;
    const auto sum_of = [&](auto term) {
      V sum_low(A(0)), sum_high(A(0));
      int64_t c = 0;
      for (; c + kStep <= width; c += kStep) {
        const auto [low, high] = rows::load_pair(row + c);
        sum_low = sum_low + term(low);
        sum_high = sum_high + term(high);
      }
      A rest = 0;
      for (; c < width; ++c) rest += term(static_cast<A>(row[c]));
      return reduce_add(sum_low + sum_high) + rest;
    };
    const A mean = sum_of([](auto value) { return value; }) / static_cast<A>(width);
    const A variance = sum_of([mean](auto value) {
                         const auto centred = value - decltype(value)(mean);
                         return centred * centred;
                       }) /
                       static_cast<A>(width);
    const A rstd = A(1) / std::sqrt(variance + eps);
    const auto columns = [&](int64_t c, int64_t valid) {
      const auto [low, high] = load(row + c, valid);
      auto out_low = (low - V(mean)) * V(rstd), out_high = (high - V(mean)) * V(rstd);
      if (weight) {
        const auto [weight_low, weight_high] = load(weight + c, valid);
        out_low = out_low * weight_low;
        out_high = out_high * weight_high;
      }
      if (bias) {
        const auto [bias_low, bias_high] = load(bias + c, valid);
        out_low = out_low + bias_low;
        out_high = out_high + bias_high;
      }
      rows::store_pair<T>(out + c, out_low, out_high, valid);
    };
    int64_t c = 0;
    for (; c + kStep <= width; c += kStep) columns(c, kStep);
    if (c < width) columns(c, width - c);
  }

  template <typename S>
  static auto load(const S* row, int64_t valid) {
    return valid == kStep ? rows::load_pair(row) : rows::load_pair(row, valid);
  }
};

}  // namespace tokcomp
