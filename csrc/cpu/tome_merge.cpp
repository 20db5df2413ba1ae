#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "../common/registration.h"
#include "cosine.h"
#include "rank.h"
#include "rows.h"

namespace tokcomp {
namespace {

// Positions alternate between the even set, whose tokens may leave, and the odd set, which receives them; the prefix
// takes no part. Slots: the prefix, the even tokens that stay, the odd tokens.
struct Sets {
  Sets(int64_t num_tokens, int64_t num_prefix_tokens, int64_t merged)
      : tokens(num_tokens),
        prefix(num_prefix_tokens),
        merged(merged),
        first_even(num_prefix_tokens + num_prefix_tokens % 2),
        first_odd(num_prefix_tokens + (num_prefix_tokens + 1) % 2),
        num_even(std::max<int64_t>(0, (num_tokens - first_even + 1) / 2)),
        num_odd(std::max<int64_t>(0, (num_tokens - first_odd + 1) / 2)),
        first_odd_slot(num_prefix_tokens + num_even - merged) {}

  int64_t even(int64_t i) const { return first_even + 2 * i; }
  int64_t odd(int64_t i) const { return first_odd + 2 * i; }

  int64_t tokens, prefix, merged, first_even, first_odd, num_even, num_odd, first_odd_slot;
};

// Fills source [N] of one image from its metric [N, K].
template <typename T, typename A = acc_type<T>>
class Matcher {
 public:
  Matcher(const Sets& sets, int64_t width)
      : sets_(sets),
        width_(width),
        row_(sets.num_even + sets.num_odd),
        inverse_norm_(row_.size()),
        similarity_(sets.num_even),
        match_(sets.num_even),
        order_(sets.num_even),
        rank_(sets.num_even),
        wide_(std::is_same_v<T, A> ? 0 : row_.size() * width) {}

  void run(const T* metric, int64_t token_stride, int64_t* source) {
    for (int64_t i = 0; i < sets_.num_even; ++i) measure(metric + sets_.even(i) * token_stride, i);
    for (int64_t i = 0; i < sets_.num_odd; ++i) measure(metric + sets_.odd(i) * token_stride, sets_.num_even + i);
    const cosine::Rows<A> even{row_.data(), inverse_norm_.data(), sets_.num_even};
    const cosine::Rows<A> odd{row_.data() + sets_.num_even, inverse_norm_.data() + sets_.num_even, sets_.num_odd};
    cosine::best_matches(even, odd, width_, similarity_.data(), match_.data());
    rank_tokens(similarity_.data(), sets_.num_even, 0, order_.data(), rank_.data());

    for (int64_t n = 0; n < sets_.prefix; ++n) source[n] = n;
    int64_t slot = sets_.prefix;
    for (int64_t i = 0; i < sets_.num_even; ++i) {
      source[sets_.even(i)] = rank_[i] < sets_.merged ? sets_.first_odd_slot + match_[i] : slot++;
    }
    for (int64_t i = 0; i < sets_.num_odd; ++i) source[sets_.odd(i)] = sets_.first_odd_slot + i;
  }

 private:
  void measure(const T* row, int64_t i) {
    A* wide = wide_.empty() ? nullptr : wide_.data() + i * width_;
    inverse_norm_[i] = cosine::inverse_norm(rows::square_sum<T>(row, width_, nullptr, wide));
    if constexpr (std::is_same_v<T, A>) {
      row_[i] = row;
    } else {
      row_[i] = wide;
    }
  }

  const Sets& sets_;
  int64_t width_;
  std::vector<const A*> row_;
  std::vector<A> inverse_norm_, similarity_;
  std::vector<int64_t> match_, order_, rank_;
  std::vector<A> wide_;
};

void match(const Tensor& metric, const Sets& sets, const Tensor& source) {
  const Tensor metric_rows = rows::dense_rows(metric);
  const int64_t num_tokens = sets.tokens;
  TOKCOMP_DISPATCH_CPU(metric.scalar_type(), "tome_merge_cpu", [&] {
    at::parallel_for(0, metric.size(0), 1, [&](int64_t begin, int64_t end) {
      Matcher<scalar_t> matcher(sets, metric.size(2));
      for (int64_t b = begin; b < end; ++b) {
        matcher.run(metric_rows.const_data_ptr<scalar_t>() + b * metric_rows.stride(0), metric_rows.stride(1),
                    source.mutable_data_ptr<int64_t>() + b * num_tokens);
      }
    });
  });
}

// One image's tokens into its slots: a slot's own token first, then those merged into it by position.
template <typename T, typename A = acc_type<T>>
class Reducer {
 public:
  Reducer(const Sets& sets, int64_t width)
      : sets_(sets), width_(width), num_kept_(sets.tokens - sets.merged), own_(num_kept_), into_(sets.num_even) {}

  void run(const T* x, int64_t token_stride, const A* size, const int64_t* source, T* x_out, A* size_out) {
    const auto size_of = [size](int64_t n) { return size ? effective_size(size[n]) : A(1); };
    for (int64_t n = 0; n < sets_.prefix; ++n) own_[n] = n;
    for (int64_t i = 0; i < sets_.num_even; ++i) {
      const int64_t slot = source[sets_.even(i)];
      into_[i] = slot >= sets_.first_odd_slot ? slot : -1;
      if (into_[i] < 0) own_[slot] = sets_.even(i);
    }
    for (int64_t i = 0; i < sets_.num_odd; ++i) own_[sets_.first_odd_slot + i] = sets_.odd(i);

    groups_.build(into_.data(), sets_.num_even, num_kept_);
    for (int64_t slot = 0; slot < num_kept_; ++slot) {
      const int64_t count = groups_.count(slot);
      const T* row = x + own_[slot] * token_stride;
      A total = size_of(own_[slot]);
      if (count == 0) {
        rows::copy(row, x_out + slot * width_, width_);
      } else {
        members_.assign(1, row);
        weights_.assign(1, total);
        for (int64_t i = 0; i < count; ++i) {
          const int64_t token = sets_.even(groups_.items(slot)[i]);
          members_.push_back(x + token * token_stride);
          weights_.push_back(size_of(token));
          total += weights_.back();
        }
        rows::combine<T>(members_.data(), weights_.data(), count + 1, total, width_, x_out + slot * width_);
      }
      size_out[slot] = total;
    }
  }

 private:
  const Sets& sets_;
  int64_t width_, num_kept_;
  std::vector<int64_t> own_, into_;
  rows::Groups groups_;
  std::vector<const T*> members_;
  std::vector<A> weights_;
};

std::tuple<Tensor, Tensor, Tensor> tome_merge_cpu(const Tensor& x, const Tensor& metric, int64_t r,
                                                  const OptionalTensor& size, int64_t num_prefix_tokens) {
  check_tome_merge(x, metric, r, size, num_prefix_tokens);
  const int64_t batch = x.size(0), num_tokens = x.size(1), width = x.size(2);
  const int64_t merged = std::min(r, (num_tokens - num_prefix_tokens) / 2), num_kept = num_tokens - merged;

  const Tensor x_rows = rows::dense_rows(x);
  const OptionalTensor size_in = per_token_acc(size, x);
  Tensor x_out = at::empty({batch, num_kept, width}, x.options());
  Tensor size_out = at::empty({batch, num_kept}, x.options().dtype(acc_scalar_type(x.scalar_type())));
  Tensor source = at::empty({batch, num_tokens}, x.options().dtype(at::kLong));

  // Without a merge every token stays where it is: as if all were prefix tokens.
  const Sets sets(num_tokens, merged == 0 ? num_tokens : num_prefix_tokens, merged);
  match(metric, sets, source);
  TOKCOMP_DISPATCH_CPU(x.scalar_type(), "tome_merge_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      Reducer<scalar_t> reducer(sets, width);
      for (int64_t b = begin; b < end; ++b) {
        reducer.run(x_rows.const_data_ptr<scalar_t>() + b * x_rows.stride(0), x_rows.stride(1),
                    size_in ? size_in->const_data_ptr<acc_t>() + b * num_tokens : nullptr,
                    source.const_data_ptr<int64_t>() + b * num_tokens,
                    x_out.mutable_data_ptr<scalar_t>() + b * num_kept * width,
                    size_out.mutable_data_ptr<acc_t>() + b * num_kept);
      }
    });
  });
  return {x_out, size_out, source};
}

}  // namespace

TOKCOMP_REGISTER_CPU(tome_merge, tome_merge_cpu)

}  // namespace tokcomp
