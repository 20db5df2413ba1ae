#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <limits>
#include <optional>

#include "../common/dispatch.h"
#include "../common/partition_checks.h"
#include "../common/registration.h"
#include "cosine.h"
#include "rank.h"
#include "rows.h"

namespace tokcomp {
namespace {

// Fills source [N] of one image, whose tokens are sources (1), destinations (2) or neither.
template <typename T, typename A = acc_type<T>>
class PartitionMatcher {
 public:
  // Of the r most similar sources those above `threshold` merge.
  PartitionMatcher(int64_t num_tokens, int64_t width, int64_t r, std::optional<double> threshold)
      : num_tokens_(num_tokens),
        width_(width),
        r_(r),
        num_kept_(threshold ? num_tokens : num_tokens - r),
        threshold_(static_cast<A>(threshold.value_or(-std::numeric_limits<double>::infinity()))),
        similarity_(num_tokens),
        match_(num_tokens),
        order_(num_tokens),
        leads_to_(num_tokens),
        slot_(num_tokens) {}

  void run(const T* metric, int64_t token_stride, const int64_t* role, int64_t* source) {
    std::fill(leads_to_.begin(), leads_to_.end(), int64_t{-1});
    if (r_ > 0) {
      gather(metric, token_stride, role, 1, leaving_);
      gather(metric, token_stride, role, 2, receiving_);
      if (receiving_.size() > 0) {
        cosine::best_matches(leaving_.rows(), receiving_.rows(), width_, similarity_.data(), match_.data());
        rank_tokens(similarity_.data(), leaving_.size(), 0, order_.data(), nullptr);
        for (int64_t i = 0; i < std::min(r_, leaving_.size()) && similarity_[order_[i]] > threshold_; ++i) {
          leads_to_[leaving_.token[order_[i]]] = receiving_.token[match_[order_[i]]];
        }
      }
    }
    int64_t slots = 0;
    for (int64_t n = 0; n < num_tokens_; ++n) slot_[n] = leads_to_[n] < 0 ? slots++ : -1;
    for (int64_t n = 0; n < num_tokens_; ++n) {
      const int64_t slot = slot_[leads_to_[n] < 0 ? n : leads_to_[n]];
      source[n] = slot < num_kept_ ? slot : -1;  // fewer sources than r: the last tokens find no slot
    }
  }

 private:
  struct Set {
    int64_t size() const { return static_cast<int64_t>(token.size()); }
    cosine::Rows<A> rows() const { return {row.data(), inverse_norm.data(), size()}; }

    std::vector<int64_t> token;
    std::vector<const A*> row;
    std::vector<A> inverse_norm, wide;
  };

  void gather(const T* metric, int64_t token_stride, const int64_t* role, int64_t wanted, Set& set) {
    set.token.clear();
    for (int64_t n = 0; n < num_tokens_; ++n) {
      if (role[n] == wanted) set.token.push_back(n);
    }
    set.row.resize(set.token.size());
    set.inverse_norm.resize(set.token.size());
    if constexpr (!std::is_same_v<T, A>) set.wide.resize(set.token.size() * width_);
    for (int64_t i = 0; i < set.size(); ++i) {
      const T* row = metric + set.token[i] * token_stride;
      A* wide = std::is_same_v<T, A> ? nullptr : set.wide.data() + i * width_;
      set.inverse_norm[i] = cosine::inverse_norm(rows::square_sum<T>(row, width_, nullptr, wide));
      if constexpr (std::is_same_v<T, A>) {
        set.row[i] = row;
      } else {
        set.row[i] = wide;
      }
    }
  }

  int64_t num_tokens_, width_, r_, num_kept_;
  A threshold_;
  Set leaving_, receiving_;
  std::vector<A> similarity_;
  std::vector<int64_t> match_, order_, leads_to_, slot_;
};

// One image's tokens into its slots, by source [N].
template <typename T, typename A = acc_type<T>>
void join_groups(const T* x, int64_t token_stride, const A* size, const int64_t* source, int64_t num_tokens,
                 int64_t num_kept, int64_t width, c10::string_view average, T* x_out, A* size_out) {
  rows::Groups groups;
  groups.build(source, num_tokens, num_kept);
  std::vector<const T*> members;
  std::vector<A> weights;
  for (int64_t slot = 0; slot < num_kept; ++slot) {
    const int64_t count = groups.count(slot);
    if (count == 0) {  // padding
      std::fill_n(x_out + slot * width, width, T(0));
      size_out[slot] = 0;
      continue;
    }
    members.clear();
    weights.clear();
    A total = 0;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t token = groups.items(slot)[i];
      members.push_back(x + token * token_stride);
      weights.push_back(size ? effective_size(size[token]) : A(1));
      total += weights.back();
    }
    if (count == 1) {
      rows::copy(members[0], x_out + slot * width, width);
    } else {
      const bool by_size = average == "size";
      const A divisor = by_size ? total : average == "mean" ? A(count) : A(1);
      rows::combine<T>(members.data(), by_size ? weights.data() : nullptr, count, divisor, width, x_out + slot * width);
    }
    size_out[slot] = total;
  }
}

std::tuple<Tensor, Tensor, Tensor> bipartite_merge_cpu(const Tensor& x, const Tensor& metric, const Tensor& role,
                                                       int64_t r, const OptionalTensor& size, c10::string_view average,
                                                       std::optional<double> threshold) {
  check_bipartite_merge(x, metric, role, r, size, average, threshold);
  const int64_t batch = x.size(0), num_tokens = x.size(1), width = x.size(2);
  const int64_t num_kept = threshold ? num_tokens : num_tokens - r;

  const Tensor x_rows = rows::dense_rows(x), metric_rows = rows::dense_rows(metric), roles = role.contiguous();
  const OptionalTensor size_in = per_token_acc(size, x);
  Tensor x_out = at::empty({batch, num_kept, width}, x.options());
  Tensor size_out = at::empty({batch, num_kept}, x.options().dtype(acc_scalar_type(x.scalar_type())));
  Tensor source = at::empty({batch, num_tokens}, x.options().dtype(at::kLong));

  TOKCOMP_DISPATCH_CPU(metric.scalar_type(), "bipartite_merge_cpu", [&] {
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      PartitionMatcher<scalar_t> matcher(num_tokens, metric.size(2), r, threshold);
      for (int64_t b = begin; b < end; ++b) {
        matcher.run(metric_rows.const_data_ptr<scalar_t>() + b * metric_rows.stride(0), metric_rows.stride(1),
                    roles.const_data_ptr<int64_t>() + b * num_tokens,
                    source.mutable_data_ptr<int64_t>() + b * num_tokens);
      }
    });
  });
  TOKCOMP_DISPATCH_CPU(x.scalar_type(), "bipartite_merge_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        join_groups<scalar_t>(x_rows.const_data_ptr<scalar_t>() + b * x_rows.stride(0), x_rows.stride(1),
                              size_in ? size_in->const_data_ptr<acc_t>() + b * num_tokens : nullptr,
                              source.const_data_ptr<int64_t>() + b * num_tokens, num_tokens, num_kept, width, average,
                              x_out.mutable_data_ptr<scalar_t>() + b * num_kept * width,
                              size_out.mutable_data_ptr<acc_t>() + b * num_kept);
      }
    });
  });
  return {x_out, size_out, source};
}

}  // namespace

TOKCOMP_REGISTER_CPU(bipartite_merge, bipartite_merge_cpu)

}  // namespace tokcomp
