// prune_merge of one image on CPU, and of x + branch with a LayerNorm after it: what both operators share.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "cosine.h"
#include "layer_norm.h"
#include "rank.h"
#include "rows.h"

namespace tokcomp::prune_merging {

struct Counts {
  int64_t tokens, prefix, num_alive, num_kept, width;
  bool weighted_size;

  bool merges() const { return num_kept < num_alive; }
  int64_t sources() const { return num_alive - num_kept; }
  int64_t destinations() const { return num_kept - prefix; }
};

// What one thread reuses from image to image. Rows are kept in rank order, prefix tokens first.
template <typename T, typename A = acc_type<T>>
class Workspace {
 public:
  Workspace(const Counts& counts, bool adds)
      : order(counts.tokens),
        token(counts.num_alive),
        row(counts.merges() ? counts.num_alive : 0),
        inverse_norm(row.size()),
        similarity(counts.sources()),
        match(counts.sources()),
        sum_(adds ? counts.sources() * counts.width : 0),
        wide_(std::is_same_v<T, A> ? 0 : row.size() * counts.width),
        width_(counts.width) {}

  // Where the s-th source's x + branch is put.
  T* sum(int64_t s) { return sum_.data() + s * width_; }
  // Where row `rank` is widened to; nullptr where the input's rows already are of the accumulate type.
  A* wide(int64_t rank) { return wide_.empty() ? nullptr : wide_.data() + rank * width_; }

  std::vector<int64_t> order;
  std::vector<const T*> token;  // the tokens that pruning leaves, as they are before merging
  std::vector<const A*> row;    // the same, widened
  std::vector<A> inverse_norm, similarity;
  std::vector<int64_t> match;
  std::vector<const T*> members;
  rows::Groups groups;

 private:
  std::vector<T> sum_;
  std::vector<A> wide_;
  int64_t width_;
};

template <typename T, typename A = acc_type<T>>
struct Image {
  const T* x;  // [N, C], token_stride apart
  int64_t token_stride;
  const T* branch;  // [N, C], branch_stride apart, or nullptr: nothing to add
  int64_t branch_stride;
  const A* size;  // [N] or nullptr: ones
  T* x_out;       // [M, C]
  A* size_out;    // [M]
  int64_t* source;

  A size_of(int64_t token) const { return size ? effective_size(size[token]) : A(1); }
};

// Fills work.token; kept tokens lie in x_out afterwards where something is added, and where nothing merges.
template <typename T>
void read_tokens(const Image<T>& image, const Counts& counts, Workspace<T>& work) {
  const int64_t num_kept = counts.num_kept, width = counts.width;
  for (int64_t r = 0; r < counts.num_alive; ++r) {
    const int64_t token = work.order[r];
    const T* row = image.x + token * image.token_stride;
    T* out = image.x_out + r * width;
    if (image.branch) {
      if (r >= num_kept) out = work.sum(r - num_kept);
      rows::add(row, image.branch + token * image.branch_stride, out, width);
      work.token[r] = out;
    } else {
      work.token[r] = row;
      // Where tokens merge, the pass that measures a destination also copies it.
      if (r < (counts.merges() ? counts.prefix : num_kept)) rows::copy(row, out, width);
    }
  }
}

template <typename T, typename A = acc_type<T>>
void merge(const Image<T>& image, const Counts& counts, Workspace<T>& work) {
  const int64_t first = counts.prefix, num_kept = counts.num_kept, width = counts.width;
  for (int64_t r = first; r < counts.num_alive; ++r) {
    T* out = r < num_kept && !image.branch ? image.x_out + r * width : nullptr;
    work.inverse_norm[r] = cosine::inverse_norm(rows::square_sum(work.token[r], width, out, work.wide(r)));
    if constexpr (std::is_same_v<T, A>) {
      work.row[r] = work.token[r];
    } else {
      work.row[r] = work.wide(r);
    }
  }
  const cosine::Rows<A> sources{work.row.data() + num_kept, work.inverse_norm.data() + num_kept, counts.sources()};
  const cosine::Rows<A> destinations{work.row.data() + first, work.inverse_norm.data() + first, counts.destinations()};
  cosine::best_matches(sources, destinations, width, work.similarity.data(), work.match.data());

  for (int64_t s = 0; s < counts.sources(); ++s) {
    work.match[s] += first;
    image.source[work.order[num_kept + s]] = work.match[s];
  }
  work.groups.build(work.match.data(), counts.sources(), num_kept);
  for (int64_t slot = first; slot < num_kept; ++slot) {
    const int64_t count = work.groups.count(slot);
    if (count == 0) continue;
    A total = image.size_out[slot];
    work.members.assign(1, work.token[slot]);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t s = work.groups.items(slot)[i];
      work.members.push_back(work.token[num_kept + s]);
      total += image.size_of(work.order[num_kept + s]) * (counts.weighted_size ? work.similarity[s] : A(1));
    }
    image.size_out[slot] = effective_size(total);
    // The destination itself may be the row that is written: each column is read before it is.
    rows::combine<T>(work.members.data(), nullptr, count + 1, A(count + 1), width, image.x_out + slot * width);
  }
}

template <typename T>
void run_image(const Image<T>& image, const Counts& counts, Workspace<T>& work) {
  std::fill_n(image.source, counts.tokens, int64_t{-1});
  for (int64_t slot = 0; slot < counts.num_kept; ++slot) {
    image.source[work.order[slot]] = slot;
    image.size_out[slot] = image.size_of(work.order[slot]);
  }
  read_tokens(image, counts, work);
  if (counts.merges()) merge(image, counts, work);
}

struct Result {
  Tensor x, normalized, size, source;
};

// The LayerNorm that follows, and what is added to x before.
struct Fused {
  const Tensor& branch;
  const OptionalTensor &weight, &bias;
  double norm_eps;
};

inline Result run(const Tensor& x, const Tensor& importance, const Counts& counts, const OptionalTensor& size,
                  const Fused* fused = nullptr) {
  const int64_t batch = x.size(0), num_tokens = counts.tokens, num_kept = counts.num_kept, width = counts.width;
  const Tensor x_rows = rows::dense_rows(x);
  const Tensor branch_rows = fused ? rows::dense_rows(fused->branch) : Tensor();
  const Tensor weight = fused && fused->weight ? fused->weight->contiguous() : Tensor();
  const Tensor bias = fused && fused->bias ? fused->bias->contiguous() : Tensor();
  // float16 and bfloat16 widen exactly, so the order is that of the scores' own type.
  const Tensor score = per_token_acc(head_mean(importance), importance);
  const OptionalTensor size_in = per_token_acc(size, x);
  const auto acc_options = x.options().dtype(acc_scalar_type(x.scalar_type()));
  Result out{at::empty({batch, num_kept, width}, x.options()),
             fused ? at::empty({batch, num_kept, width}, x.options()) : Tensor(),
             at::empty({batch, num_kept}, acc_options), at::empty({batch, num_tokens}, x.options().dtype(at::kLong))};

  TOKCOMP_DISPATCH_CPU(x.scalar_type(), "prune_merge_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    const auto data = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<scalar_t>() : nullptr; };
    const LayerNorm<scalar_t> norm{data(weight), data(bias), static_cast<acc_t>(fused ? fused->norm_eps : 0), width};
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      Workspace<scalar_t> work(counts, fused != nullptr);
      for (int64_t b = begin; b < end; ++b) {
        if (score.scalar_type() == at::kDouble) {
          rank_tokens(score.const_data_ptr<double>() + b * num_tokens, num_tokens, counts.prefix, work.order.data(),
                      nullptr);
        } else {
          rank_tokens(score.const_data_ptr<float>() + b * num_tokens, num_tokens, counts.prefix, work.order.data(),
                      nullptr);
        }
        const Image<scalar_t> image{
            x_rows.const_data_ptr<scalar_t>() + b * x_rows.stride(0),
            x_rows.stride(1),
            fused ? branch_rows.const_data_ptr<scalar_t>() + b * branch_rows.stride(0) : nullptr,
            fused ? branch_rows.stride(1) : 0,
            size_in ? size_in->const_data_ptr<acc_t>() + b * num_tokens : nullptr,
            out.x.mutable_data_ptr<scalar_t>() + b * num_kept * width,
            out.size.mutable_data_ptr<acc_t>() + b * num_kept,
            out.source.mutable_data_ptr<int64_t>() + b * num_tokens};
        run_image(image, counts, work);
        if (!fused) continue;
        scalar_t* normalized = out.normalized.mutable_data_ptr<scalar_t>() + b * num_kept * width;
        for (int64_t slot = 0; slot < num_kept; ++slot) norm(image.x_out + slot * width, normalized + slot * width);
      }
    });
  });
  return out;
}

inline Counts counts_of(const Tensor& x, int64_t num_prune_kept, int64_t num_merge_kept, int64_t num_prefix_tokens,
                        bool similarity_weighted_size) {
  const int64_t num_alive = std::min(x.size(1), num_prune_kept);
  return {x.size(1), num_prefix_tokens,       num_alive, std::min(num_alive, num_merge_kept),
          x.size(2), similarity_weighted_size};
}

}  // namespace tokcomp::prune_merging
