// The order of tokens by a score: prefix tokens as they stand, the others by descending score, ties by lower index, NaN
// last. Every backend shares this order (algorithms.md section 1), so it is exact: scores are compared as integers.
#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

namespace tokcomp {

// Counting comparisons beats a sort up to about here, and has no branch that depends on the scores.
constexpr int64_t kMaxCountedTokens = 1024;

template <typename T>
using rank_key = std::conditional_t<std::is_same_v<T, double>, int64_t, int32_t>;

// An integer that orders as the score does: NaN below -inf, -0.0 equal to 0.0. float16 and bfloat16 widen exactly.
template <typename T>
inline rank_key<T> make_rank_key(T score) {
  using key_t = rank_key<T>;
  using float_t = std::conditional_t<std::is_same_v<T, double>, double, float>;
  constexpr key_t kMagnitude = std::numeric_limits<key_t>::max();
  const float_t value = static_cast<float_t>(score);
  const float_t infinity = std::numeric_limits<float_t>::infinity();
  key_t bits, infinity_bits;
  std::memcpy(&bits, &value, sizeof(bits));
  std::memcpy(&infinity_bits, &infinity, sizeof(infinity_bits));
  const key_t magnitude = bits & kMagnitude;
  if (magnitude > infinity_bits) return std::numeric_limits<key_t>::min();
  return bits < 0 ? -magnitude : magnitude;
}

// order[r] is the token of rank r, rank[i] the rank of token i; `rank` may be null. scores: num_tokens contiguous
// values.
template <typename T>
void rank_tokens(const T* scores, int64_t num_tokens, int64_t num_prefix_tokens, int64_t* order, int64_t* rank) {
  using key_t = rank_key<T>;
  using Vec = at::vec::Vectorized<key_t>;
  constexpr int64_t kLanes = Vec::size();
  std::iota(order, order + num_prefix_tokens, int64_t{0});
  if (rank) std::iota(rank, rank + num_prefix_tokens, int64_t{0});
  const int64_t count = num_tokens - num_prefix_tokens;

  if (count > kMaxCountedTokens) {
    std::vector<key_t> keys(count);
    for (int64_t i = 0; i < count; ++i) keys[i] = make_rank_key(scores[num_prefix_tokens + i]);
    std::iota(order + num_prefix_tokens, order + num_tokens, num_prefix_tokens);
    std::stable_sort(order + num_prefix_tokens, order + num_tokens,
                     [&](int64_t a, int64_t b) { return keys[a - num_prefix_tokens] > keys[b - num_prefix_tokens]; });
    if (rank) {
      for (int64_t r = num_prefix_tokens; r < num_tokens; ++r) rank[order[r]] = r;
    }
    return;
  }

  key_t keys[kMaxCountedTokens + kLanes] = {};
  for (int64_t i = 0; i < count; ++i) keys[i] = make_rank_key(scores[num_prefix_tokens + i]);
  for (int64_t first = 0; first < count; first += kLanes) {
    const int64_t last = std::min(first + kLanes, count);
    const Vec own = Vec::loadu(keys + first);
    const Vec position = Vec::arange(key_t(first), key_t(1));
    // A comparison gives -1 in each lane where it holds.
    Vec before(key_t(0));
    for (int64_t j = 0; j < first; ++j) before = before - (Vec(keys[j]) >= own);
    for (int64_t j = first; j < last; ++j) {
      const Vec other(keys[j]);
      before = before - ((other > own) | ((other == own) & (Vec(key_t(j)) < position)));
    }
    for (int64_t j = last; j < count; ++j) before = before - (Vec(keys[j]) > own);
    key_t counts[kLanes];
    before.store(counts);
    for (int64_t i = first; i < last; ++i) {
      const int64_t r = num_prefix_tokens + counts[i - first];
      order[r] = num_prefix_tokens + i;
      if (rank) rank[num_prefix_tokens + i] = r;
    }
  }
}

}  // namespace tokcomp
