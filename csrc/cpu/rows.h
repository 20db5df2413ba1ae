// Rows of a [B, N, C] tensor on CPU: read as the accumulate type, combined in a fixed order, written once.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <vector>

#include "../common/dispatch.h"
#include "vector.h"

namespace tokcomp {

namespace rows {

// Columns that one step handles: two vectors of the accumulate type, which is one vector of a 16-bit type.
template <typename A>
constexpr int64_t kStep = 2 * Vec<A>::size();

template <typename T, typename A = acc_type<T>>
inline std::tuple<Vec<A>, Vec<A>> load_pair(const T* row) {
  if constexpr (std::is_same_v<T, A>) {
    return {Vec<A>::loadu(row), Vec<A>::loadu(row + Vec<A>::size())};
  } else {
    return at::vec::convert_to_float<T>(Vec<T>::loadu(row));
  }
}

// The first `count` < kStep columns; the rest read as zero.
template <typename T, typename A = acc_type<T>>
inline std::tuple<Vec<A>, Vec<A>> load_pair(const T* row, int64_t count) {
  if constexpr (std::is_same_v<T, A>) {
    constexpr int64_t half = Vec<A>::size();
    if (count <= half) return {Vec<A>::loadu(row, count), Vec<A>(A(0))};
    return {Vec<A>::loadu(row), Vec<A>::loadu(row + half, count - half)};
  } else {
    return at::vec::convert_to_float<T>(Vec<T>::loadu(row, count));
  }
}

template <typename T, typename A = acc_type<T>>
inline void store_pair(T* row, const Vec<A>& low, const Vec<A>& high, int64_t count = kStep<A>) {
  if constexpr (std::is_same_v<T, A>) {
    constexpr int64_t half = Vec<A>::size();
    if (count == kStep<A>) {
      low.store(row);
      high.store(row + half);
    } else if (count <= half) {
      low.store(row, static_cast<int>(count));
    } else {
      low.store(row);
      high.store(row + half, static_cast<int>(count - half));
    }
  } else {
    from_float<T>(low, high).store(row, static_cast<int>(count));
  }
}

template <typename T>
inline void copy(const T* row, T* out, int64_t width) {
  if (width > 0) std::memcpy(out, row, width * sizeof(T));
}

// out = a + b, rounded to T.
template <typename T>
inline void add(const T* a, const T* b, T* out, int64_t width) {
  using A = acc_type<T>;
  int64_t c = 0;
  for (; c + kStep<A> <= width; c += kStep<A>) {
    const auto [a_low, a_high] = load_pair(a + c);
    const auto [b_low, b_high] = load_pair(b + c);
    store_pair<T>(out + c, a_low + b_low, a_high + b_high);
  }
  if (c < width) {
    const auto [a_low, a_high] = load_pair(a + c, width - c);
    const auto [b_low, b_high] = load_pair(b + c, width - c);
    store_pair<T>(out + c, a_low + b_low, a_high + b_high, width - c);
  }
}

// Sum of squares of one row in a single pass that also copies it to `out` and, widened, to `wide` where these are
// given.
template <typename T>
inline acc_type<T> square_sum(const T* row, int64_t width, T* out, acc_type<T>* wide) {
  using A = acc_type<T>;
  Vec<A> sum_low(A(0)), sum_high(A(0));
  int64_t c = 0;
  for (; c + kStep<A> <= width; c += kStep<A>) {
    const auto [low, high] = load_pair(row + c);
    sum_low = at::vec::fmadd(low, low, sum_low);
    sum_high = at::vec::fmadd(high, high, sum_high);
    if (wide) store_pair<A>(wide + c, low, high);
    if (out) Vec<T>::loadu(row + c).store(out + c);
    if constexpr (std::is_same_v<T, A>) {
      if (out) high.store(out + c + Vec<A>::size());
    }
  }
  if (c < width) {
    const auto [low, high] = load_pair(row + c, width - c);
    sum_low = at::vec::fmadd(low, low, sum_low);
    sum_high = at::vec::fmadd(high, high, sum_high);
    if (wide) store_pair<A>(wide + c, low, high, width - c);
    if (out) copy(row + c, out + c, width - c);
  }
  return reduce_add(sum_low + sum_high);
}

// out = sum_i weights[i] * rows[i] / divisor, added in the order given; without weights (nullptr) each counts 1.
template <typename T>
inline void combine(const T* const* rows, const acc_type<T>* weights, int64_t count, acc_type<T> divisor, int64_t width,
                    T* out) {
  using A = acc_type<T>;
  const Vec<A> quotient(divisor);
  const auto columns = [&](int64_t c, auto read, int64_t valid) {
    Vec<A> sum_low(A(0)), sum_high(A(0));
    for (int64_t i = 0; i < count; ++i) {
      const auto [low, high] = read(rows[i] + c);
      if (weights) {
        const Vec<A> weight(weights[i]);
        sum_low = at::vec::fmadd(weight, low, sum_low);
        sum_high = at::vec::fmadd(weight, high, sum_high);
      } else {
        sum_low = sum_low + low;
        sum_high = sum_high + high;
      }
    }
    store_pair<T>(out + c, sum_low / quotient, sum_high / quotient, valid);
  };
  int64_t c = 0;
  for (; c + kStep<A> <= width; c += kStep<A>) {
    columns(c, [](const T* row) { return load_pair(row); }, kStep<A>);
  }
  if (c < width) {
    const int64_t valid = width - c;
    columns(c, [valid](const T* row) { return load_pair(row, valid); }, valid);
  }
}

// Which items each slot holds, in the items' own order: slot m holds items(m)[0 .. count(m)-1].
class Groups {
 public:
  void build(const int64_t* slot_of, int64_t num_items, int64_t num_slots) {
    start_.assign(num_slots + 1, 0);
    items_.resize(num_items);
    for (int64_t i = 0; i < num_items; ++i) {
      if (inside(slot_of[i], num_slots)) ++start_[slot_of[i] + 1];
    }
    for (int64_t m = 0; m < num_slots; ++m) start_[m + 1] += start_[m];
    next_.assign(start_.begin(), start_.end());
    for (int64_t i = 0; i < num_items; ++i) {
      if (inside(slot_of[i], num_slots)) items_[next_[slot_of[i]]++] = i;
    }
  }
  int64_t count(int64_t slot) const { return start_[slot + 1] - start_[slot]; }
  const int64_t* items(int64_t slot) const { return items_.data() + start_[slot]; }

 private:
  static bool inside(int64_t slot, int64_t num_slots) { return slot >= 0 && slot < num_slots; }

  std::vector<int64_t> start_, next_, items_;
};

// A [B, N, C] tensor whose rows are dense; batch and token strides stay as they are.
inline at::Tensor dense_rows(const at::Tensor& tensor) {
  return tensor.size(-1) <= 1 || tensor.stride(-1) == 1 ? tensor : tensor.contiguous();
}

}  // namespace rows
}  // namespace tokcomp
