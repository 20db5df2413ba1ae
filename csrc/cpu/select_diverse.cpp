#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "../common/dispatch.h"
#include "../common/partition_checks.h"
#include "../common/registration.h"
#include "cosine.h"
#include "rows.h"

namespace tokcomp {
namespace {

// Greedy choices among one image's patch tokens [P, K].
template <typename T, typename A = acc_type<T>>
class DiverseChoice {
 public:
  DiverseChoice(int64_t num_patches, int64_t width, int64_t count)
      : patches_(num_patches),
        width_(width),
        count_(count),
        row_(num_patches),
        inverse_norm_(num_patches),
        similarity_(num_patches),
        score_(num_patches),
        taken_(num_patches),
        wide_(std::is_same_v<T, A> ? 0 : num_patches * width) {}

  void read(const T* features, int64_t token_stride) {
    for (int64_t i = 0; i < patches_; ++i) {
      const T* row = features + i * token_stride;
      A* wide = wide_.empty() ? nullptr : wide_.data() + i * width_;
      inverse_norm_[i] = cosine::inverse_norm(rows::square_sum<T>(row, width_, nullptr, wide));
      if constexpr (std::is_same_v<T, A>) {
        row_[i] = row;
      } else {
        row_[i] = wide;
      }
    }
    std::fill(taken_.begin(), taken_.end(), char(0));
  }

  // First the token whose most similar other is least similar, then what is farthest from the chosen.
  void farthest(int64_t* chosen) {
    if (count_ == 0) return;
    std::fill(score_.begin(), score_.end(), A(-1));
    if (patches_ * patches_ * int64_t(sizeof(A)) <= kStoredBytes) {
      store_pairs();
      for (int64_t i = 0; i < patches_; ++i) {
        const A* similarity = stored_.data() + i * patches_;
        for (int64_t j = 0; j < patches_; ++j) score_[i] = j == i ? score_[i] : std::max(score_[i], similarity[j]);
      }
    } else {
      for (int64_t i = 0; i < patches_; ++i) {
        compare(i, i + 1);
        for (int64_t j = i + 1; j < patches_; ++j) {
          score_[i] = std::max(score_[i], similarity_[j]);
          score_[j] = std::max(score_[j], similarity_[j]);
        }
      }
    }
    for (int64_t step = 0; step < count_; ++step) {
      const int64_t token = chosen[step] = take([this](int64_t a, int64_t b) { return score_[a] < score_[b]; });
      if (stored_.empty()) compare(token, 0);
      const A* similarity = stored_.empty() ? similarity_.data() : stored_.data() + token * patches_;
      for (int64_t i = 0; i < patches_; ++i) {
        score_[i] = step == 0 ? similarity[i] : std::max(score_[i], similarity[i]);
      }
    }
  }

  // The greedy maximum of det(L_S), L = diag(r) cos diag(r), by a Cholesky row for each token chosen.
  void dpp(const A* relevance, int64_t* chosen) {
    use(relevance);
    factor_.resize(count_ * patches_);
    square_.resize(patches_);
    for (int64_t i = 0; i < patches_; ++i) score_[i] = relevance_[i] * relevance_[i];
    for (int64_t step = 0; step < count_; ++step) {
      const int64_t token = chosen[step] = take([this](int64_t a, int64_t b) { return score_[a] > score_[b]; });
      compare(token, 0);
      A* own = factor_.data() + step * patches_;
      const A pivot = score_[token], weight = relevance_[token], root = std::sqrt(pivot);
      for (int64_t i = 0; i < patches_; ++i) own[i] = relevance_[i] * weight * similarity_[i];
      for (int64_t earlier = 0; earlier < step; ++earlier) {
        const A* row = factor_.data() + earlier * patches_;
        const A at_token = row[token];
        for (int64_t i = 0; i < patches_; ++i) own[i] -= row[i] * at_token;
      }
      for (int64_t i = 0; i < patches_; ++i) own[i] = pivot > A(0) ? own[i] / root : A(0);
      // Rounded before it is subtracted, so that a token equal to the chosen one is left with just 0.
      for (int64_t i = 0; i < patches_; ++i) square_[i] = own[i] * own[i];
      for (int64_t i = 0; i < patches_; ++i) score_[i] = std::max(score_[i] - square_[i], A(0));
    }
  }

 private:
  // similarity_ of the tokens from `first` on with one of them.
  void compare(int64_t token, int64_t first) {
    int64_t j = first;
    for (; j + kRows <= patches_; j += kRows) dots<kRows>(token, j);
    for (; j < patches_; ++j) dots<1>(token, j);
  }

  template <int R>
  void dots(int64_t token, int64_t first) {
    Vec<A> sum[1][R];
    cosine::dot_products<A, 1, R>(row_.data() + token, row_.data() + first, width_, sum);
    for (int k = 0; k < R; ++k) similarity_[first + k] = similarity(token, first + k, sum[0][k]);
  }

  // The same number for (a, b) and (b, a).
  A similarity(int64_t a, int64_t b, const Vec<A>& sum) const {
    const A found = reduce_add(sum) * inverse_norm_[std::min(a, b)] * inverse_norm_[std::max(a, b)];
    return std::isnan(found) ? A(0) : found;
  }

  // stored_ [P, P], every pair multiplied once: by tiles of rows, each with the columns from its own on, from both ends
  // in turn, so that threads get as much.
  void store_pairs() {
    stored_.resize(patches_ * patches_);
    const int64_t tiles = (patches_ + kTile - 1) / kTile;
    at::parallel_for(0, tiles, 1, [&](int64_t begin, int64_t end) {
      for (int64_t turn = begin; turn < end; ++turn) {
        const int64_t first = kTile * (turn % 2 == 0 ? turn / 2 : tiles - 1 - turn / 2);
        const int64_t last = std::min(first + kTile, patches_);
        for (int64_t j = first; j < patches_; j += kColumns) {
          for (int64_t i = first; i < std::min(last, j + kColumns); i += kRows) store_block(i, j);
        }
      }
    });
  }

  // Rows beyond the last token repeat it.
  void store_block(int64_t first, int64_t first_column) {
    const A *left[kRows], *right[kColumns];
    for (int k = 0; k < kRows; ++k) left[k] = row_[std::min(first + k, patches_ - 1)];
    for (int k = 0; k < kColumns; ++k) right[k] = row_[std::min(first_column + k, patches_ - 1)];
    Vec<A> sum[kRows][kColumns];
    cosine::dot_products<A, kRows, kColumns>(left, right, width_, sum);
    for (int64_t i = first; i < std::min(first + kRows, patches_); ++i) {
      for (int64_t j = std::max(i, first_column); j < std::min(first_column + kColumns, patches_); ++j) {
        stored_[i * patches_ + j] = stored_[j * patches_ + i] = similarity(i, j, sum[i - first][j - first_column]);
      }
    }
  }

  // The largest relevance becomes 1, which changes no choice; what is not above 0 and finite becomes 0, as zero
  // vectors.
  void use(const A* relevance) {
    relevance_.resize(patches_);
    A largest = 0;
    for (int64_t i = 0; i < patches_; ++i) {
      const A given = relevance ? relevance[i] : A(1);
      relevance_[i] = given > A(0) && std::isfinite(given) && inverse_norm_[i] > A(0) ? given : A(0);
      largest = std::max(largest, relevance_[i]);
    }
    for (int64_t i = 0; i < patches_ && largest > A(0); ++i) relevance_[i] /= largest;
  }

  // The best of the tokens that are left, the first where several are.
  template <typename Better>
  int64_t take(Better better) {
    int64_t token = 0;
    while (taken_[token]) ++token;
    for (int64_t i = token + 1; i < patches_; ++i) {
      if (!taken_[i] && better(i, token)) token = i;
    }
    taken_[token] = 1;
    return token;
  }

  static constexpr int kRows = cosine::kBlockSources, kColumns = cosine::kBlockDestinations<A>;
  static constexpr int64_t kTile = cosine::kTileSources;
  // More similarities than this are computed again for each token chosen, rather than stored.
  static constexpr int64_t kStoredBytes = int64_t(64) << 20;

  int64_t patches_, width_, count_;
  std::vector<const A*> row_;
  std::vector<A> inverse_norm_, similarity_, score_, relevance_, factor_, square_;
  std::vector<char> taken_;
  std::vector<A> wide_, stored_;
};

Tensor select_diverse_cpu(const Tensor& features, int64_t num_kept, const OptionalTensor& relevance,
                          int64_t num_prefix_tokens, c10::string_view rule) {
  check_select_diverse(features, num_kept, relevance, num_prefix_tokens, rule);
  const int64_t batch = features.size(0), num_tokens = features.size(1), width = features.size(2);
  const Tensor feature_rows = rows::dense_rows(features);
  const OptionalTensor wanted = per_token_acc(relevance, features);
  const bool by_distance = rule == "farthest";
  Tensor out = at::empty({batch, num_kept}, features.options().dtype(at::kLong));

  TOKCOMP_DISPATCH_CPU(features.scalar_type(), "select_diverse_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    const auto choose = [&](int64_t begin, int64_t end) {
      DiverseChoice<scalar_t> choice(num_tokens - num_prefix_tokens, width, num_kept - num_prefix_tokens);
      for (int64_t b = begin; b < end; ++b) {
        int64_t* order = out.mutable_data_ptr<int64_t>() + b * num_kept;
        for (int64_t n = 0; n < num_prefix_tokens; ++n) order[n] = n;
        choice.read(feature_rows.const_data_ptr<scalar_t>() + b * feature_rows.stride(0) +
                        num_prefix_tokens * feature_rows.stride(1),
                    feature_rows.stride(1));
        if (by_distance) {
          choice.farthest(order + num_prefix_tokens);
        } else {
          choice.dpp(wanted ? wanted->const_data_ptr<acc_t>() + b * num_tokens + num_prefix_tokens : nullptr,
                     order + num_prefix_tokens);
        }
        for (int64_t n = num_prefix_tokens; n < num_kept; ++n) order[n] += num_prefix_tokens;
      }
    };
    if (by_distance && batch < at::get_num_threads()) {
      choose(0, batch);  // one image after the other, the pairs of each on all threads
    } else {
      at::parallel_for(0, batch, 1, choose);
    }
  });
  return out;
}

}  // namespace

TOKCOMP_REGISTER_CPU(select_diverse, select_diverse_cpu)

}  // namespace tokcomp
