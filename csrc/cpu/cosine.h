// The most cosine-similar destination of every source, without the [S, D] matrix: register blocks of dot products.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "rows.h"

namespace tokcomp::cosine {

// A set of rows to compare: one pointer and one inverse norm per row.
template <typename A>
struct Rows {
  const A* const* row;
  const A* inverse_norm;
  int64_t count;
};

template <typename A>
inline A inverse_norm(A square_sum) {
  const A norm = std::sqrt(square_sum);
  return norm > A(0) ? A(1) / norm : A(0);
}

// 4 x 4 dot products keep 16 sums in registers, which needs the 32 registers of AVX-512 (or NEON); 4 x 2 fit in 16.
template <typename A>
constexpr int kBlockDestinations = sizeof(Vec<A>) == 32 ? 2 : 4;
constexpr int kBlockSources = 4;
// Sources that stay in the cache while the destinations pass by, each loaded from further away once per tile.
constexpr int64_t kTileSources = 32;

// The dot products of S sources with D destinations. Each is summed in the same order wherever its pair falls in a
// block, and whichever of the two is the source, so equal rows give equal similarities.
template <typename A, int S, int D>
TOKCOMP_INLINE void dot_products(const A* const* source, const A* const* destination, int64_t width,
                                 Vec<A> (&sum)[S][D]) {
  using V = Vec<A>;
  for (int s = 0; s < S; ++s) {
    for (int d = 0; d < D; ++d) sum[s][d] = V(A(0));
  }
  const auto step = [&](auto read) {
    V right[D];
    for (int d = 0; d < D; ++d) right[d] = read(destination[d]);
    for (int s = 0; s < S; ++s) {
      const V left = read(source[s]);
      for (int d = 0; d < D; ++d) sum[s][d] = at::vec::fmadd(left, right[d], sum[s][d]);
    }
  };
  int64_t c = 0;
  for (; c + V::size() <= width; c += V::size()) {
    step([c](const A* row) { return V::loadu(row + c); });
  }
  if (c < width) {
    step([c, width](const A* row) { return V::loadu(row + c, width - c); });
  }
}

template <typename A, int S, int D>
inline void update_best(const A* const* source, const A* source_norm, const A* const* destination,
                        const A* destination_norm, int64_t first, int64_t width, A* best, int64_t* best_index) {
  Vec<A> sum[S][D];
  dot_products<A, S, D>(source, destination, width, sum);
  for (int s = 0; s < S; ++s) {
    for (int d = 0; d < D; ++d) {
      A similarity = reduce_add(sum[s][d]) * source_norm[s] * destination_norm[d];
      if (std::isnan(similarity)) similarity = A(0);
      if (similarity > best[s]) {
        best[s] = similarity;
        best_index[s] = first + d;
      }
    }
  }
}

// best[s] = max_d cosine(source s, destination d), best_index[s] the lowest d that reaches it. A cosine that is NaN
// counts as 0. Needs at least one destination.
template <typename A>
inline void best_matches(const Rows<A>& sources, const Rows<A>& destinations, int64_t width, A* best,
                         int64_t* best_index) {
  constexpr int S = kBlockSources, D = kBlockDestinations<A>;
  std::fill_n(best, sources.count, -std::numeric_limits<A>::infinity());
  std::fill_n(best_index, sources.count, int64_t{0});
  const auto block = [&](auto num_sources, auto num_destinations, int64_t s, int64_t d) {
    update_best<A, decltype(num_sources)::value, decltype(num_destinations)::value>(
        sources.row + s, sources.inverse_norm + s, destinations.row + d, destinations.inverse_norm + d, d, width,
        best + s, best_index + s);
  };
  const auto tile = [&](auto num_destinations, int64_t begin, int64_t end, int64_t d) {
    int64_t s = begin;
    for (; s + S <= end; s += S) block(std::integral_constant<int, S>{}, num_destinations, s, d);
    if (end - s == 3) block(std::integral_constant<int, 3>{}, num_destinations, s, d);
    if (end - s == 2) block(std::integral_constant<int, 2>{}, num_destinations, s, d);
    if (end - s == 1) block(std::integral_constant<int, 1>{}, num_destinations, s, d);
  };
  for (int64_t begin = 0; begin < sources.count; begin += kTileSources) {
    const int64_t end = std::min(begin + kTileSources, sources.count);
    int64_t d = 0;
    for (; d + D <= destinations.count; d += D) tile(std::integral_constant<int, D>{}, begin, end, d);
    for (; d < destinations.count; ++d) tile(std::integral_constant<int, 1>{}, begin, end, d);
  }
}

}  // namespace tokcomp::cosine
