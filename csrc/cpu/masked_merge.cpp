#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include "../common/checks.h"
#include "../common/dispatch.h"
#include "../common/registration.h"
#include "cosine.h"
#include "rank.h"
#include "rows.h"

namespace tokcomp {
namespace {

struct Options {
  int64_t tokens, prefix, width;
  int64_t before, num_kept;  // num_before_merge and num_merge_kept, any values
  bool weighted_size;
  std::optional<double> min_weighted_size;

  // Tokens of rank below this can take part, whatever the mask.
  int64_t most_ranked() const { return std::min(tokens, before); }
  bool merges(int64_t ranked) const { return prefix < num_kept && num_kept < ranked; }
};

// NaN becomes the bound too.
template <typename A>
A bounded(A size, double bound) {
  const A least(bound);
  return size > least ? size : least;
}

// What one thread reuses from image to image. Rows, norms and matches are in rank order.
template <typename T, typename A = acc_type<T>>
class Workspace {
 public:
  explicit Workspace(const Options& options)
      : order(options.tokens),
        live(options.tokens),
        live_order(options.tokens),
        row(options.merges(options.most_ranked()) ? options.most_ranked() : 0),
        inverse_norm(row.size()),
        similarity(row.size()),
        weight(row.size()),
        match(row.size()),
        wide_(std::is_same_v<T, A> ? 0 : static_cast<int64_t>(row.size()) * options.width),
        width_(options.width) {}

  // Where the row of that rank is widened to; nullptr where the input's rows already are of the accumulate type.
  A* wide(int64_t rank) { return std::is_same_v<T, A> ? nullptr : wide_.get() + rank * width_; }

  std::vector<int64_t> order;
  std::vector<int64_t> live, live_order;
  std::vector<const A*> row;
  std::vector<A> inverse_norm, similarity, weight;  // weight: what a source adds to its destination's size
  std::vector<int64_t> match;
  std::vector<const T*> members;
  rows::Groups groups;

 private:
  Scratch<A> wide_;
  int64_t width_;
};

template <typename T, typename A = acc_type<T>>
struct Image {
  const T* x;  // [N, C], token_stride apart
  int64_t token_stride;
  const A* mask;  // [N]
  const A* size;  // [N] or nullptr: ones
  T* x_out;       // [N, C]
  A* size_out;    // [N]
  int64_t* rank;
  int64_t* destination;

  const T* row(int64_t token) const { return x + token * token_stride; }
  A size_of(int64_t token) const { return size ? effective_size(size[token]) : A(1); }
};

// Fills rank and its inverse; returns how many tokens are alive, which are those of the lowest ranks.
template <typename S, typename T>
int64_t rank_live_tokens(const S* score, const Image<T>& image, const Options& options, std::vector<S>& live_score,
                         Workspace<T>& work) {
  const int64_t prefix = options.prefix;
  std::iota(work.order.begin(), work.order.begin() + prefix, int64_t{0});
  int64_t count = 0;
  for (int64_t n = prefix; n < options.tokens; ++n) {
    if (!(image.mask[n] > 0)) continue;
    work.live[count] = n;
    live_score[count++] = score[n];
  }
  rank_tokens(live_score.data(), count, 0, work.live_order.data(), nullptr);
  for (int64_t r = 0; r < count; ++r) work.order[prefix + r] = work.live[work.live_order[r]];
  int64_t next = prefix + count;
  for (int64_t n = prefix; n < options.tokens; ++n) {
    if (!(image.mask[n] > 0)) work.order[next++] = n;
  }
  for (int64_t r = 0; r < options.tokens; ++r) image.rank[work.order[r]] = r;
  return prefix + count;
}

// Copies every row; those that take part are measured, and widened, in the same pass.
template <typename T, typename A = acc_type<T>>
void copy_and_measure(const Image<T>& image, const Options& options, int64_t ranked, Workspace<T>& work) {
  const int64_t width = options.width;
  for (int64_t n = 0; n < options.tokens; ++n) {
    const int64_t r = image.rank[n];
    const T* row = image.row(n);
    T* out = image.x_out + n * width;
    if (r < options.prefix || r >= ranked) {
      rows::copy(row, out, width);
      continue;
    }
    work.inverse_norm[r] = cosine::inverse_norm(rows::square_sum(row, width, out, work.wide(r)));
    if constexpr (std::is_same_v<T, A>) {
      work.row[r] = row;
    } else {
      work.row[r] = work.wide(r);
    }
  }
}

template <typename T, typename A = acc_type<T>>
void merge(const Image<T>& image, const Options& options, int64_t ranked, Workspace<T>& work) {
  const int64_t first = options.prefix, num_kept = options.num_kept, width = options.width,
                num_sources = ranked - num_kept;
  copy_and_measure(image, options, ranked, work);
  const cosine::Rows<A> sources{work.row.data() + num_kept, work.inverse_norm.data() + num_kept, num_sources};
  const cosine::Rows<A> destinations{work.row.data() + first, work.inverse_norm.data() + first, num_kept - first};
  cosine::best_matches(sources, destinations, width, work.similarity.data(), work.match.data());

  for (int64_t s = 0; s < num_sources; ++s) {
    const int64_t source = work.order[num_kept + s];
    image.destination[source] = work.order[first + work.match[s]];
    work.weight[s] = image.size_of(source) * (options.weighted_size ? work.similarity[s] : A(1));
    if (options.min_weighted_size) {
      work.weight[s] = bounded(work.weight[s], *options.min_weighted_size);
      image.size_out[source] = effective_size(work.weight[s]);
    }
  }
  if (options.min_weighted_size) {
    for (int64_t r = 0; r < num_kept; ++r) {
      A& size = image.size_out[work.order[r]];
      size = bounded(size, *options.min_weighted_size);
    }
  }
  work.groups.build(work.match.data(), num_sources, num_kept - first);
  for (int64_t m = 0; m < num_kept - first; ++m) {
    const int64_t count = work.groups.count(m), token = work.order[first + m];
    if (count == 0) continue;
    A total = image.size_out[token];
    work.members.assign(1, image.row(token));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t s = work.groups.items(m)[i];
      work.members.push_back(image.row(work.order[num_kept + s]));
      total += work.weight[s];
    }
    image.size_out[token] = effective_size(total);
    rows::combine<T>(work.members.data(), nullptr, count + 1, A(count + 1), width, image.x_out + token * width);
  }
}

template <typename T>
void masked_merge_image(const Image<T>& image, const Options& options, int64_t num_live, Workspace<T>& work) {
  for (int64_t n = 0; n < options.tokens; ++n) {
    image.destination[n] = n;
    image.size_out[n] = image.size_of(n);
  }
  const int64_t ranked = std::min(num_live, options.before);
  if (options.merges(ranked)) {
    merge(image, options, ranked, work);
  } else if (image.token_stride == options.width) {
    rows::copy(image.x, image.x_out, options.tokens * options.width);
  } else {
    for (int64_t n = 0; n < options.tokens; ++n) {
      rows::copy(image.row(n), image.x_out + n * options.width, options.width);
    }
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> masked_merge_cpu(const Tensor& x, const Tensor& importance,
                                                            const Tensor& token_mask, const Tensor& counts,
                                                            const OptionalTensor& size, int64_t num_prefix_tokens,
                                                            bool similarity_weighted_size,
                                                            std::optional<double> min_weighted_size) {
  check_masked_merge(x, importance, token_mask, counts, size, num_prefix_tokens, min_weighted_size);
  const int64_t batch = x.size(0), num_tokens = x.size(1), width = x.size(2);
  const Tensor bounds = counts.contiguous();
  const Options options{num_tokens,
                        num_prefix_tokens,
                        width,
                        bounds.const_data_ptr<int64_t>()[0],
                        bounds.const_data_ptr<int64_t>()[1],
                        similarity_weighted_size,
                        min_weighted_size};

  const Tensor x_rows = rows::dense_rows(x);
  // float16 and bfloat16 widen exactly, so the order is that of the scores' own type.
  const Tensor score = per_token_acc(importance, importance);
  const Tensor mask = per_token_acc(token_mask, x);
  const OptionalTensor size_in = per_token_acc(size, x);
  Tensor x_out = at::empty({batch, num_tokens, width}, x.options());
  Tensor size_out = at::empty({batch, num_tokens}, x.options().dtype(acc_scalar_type(x.scalar_type())));
  Tensor rank = at::empty({batch, num_tokens}, x.options().dtype(at::kLong));
  Tensor destination = at::empty_like(rank);

  TOKCOMP_DISPATCH_CPU(x.scalar_type(), "masked_merge_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      Workspace<scalar_t> work(options);
      std::vector<float> live_float(score.scalar_type() == at::kFloat ? num_tokens : 0);
      std::vector<double> live_double(score.scalar_type() == at::kDouble ? num_tokens : 0);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t at = b * num_tokens;
        const Image<scalar_t> image{x_rows.const_data_ptr<scalar_t>() + b * x_rows.stride(0),
                                    x_rows.stride(1),
                                    mask.const_data_ptr<acc_t>() + at,
                                    size_in ? size_in->const_data_ptr<acc_t>() + at : nullptr,
                                    x_out.mutable_data_ptr<scalar_t>() + at * width,
                                    size_out.mutable_data_ptr<acc_t>() + at,
                                    rank.mutable_data_ptr<int64_t>() + at,
                                    destination.mutable_data_ptr<int64_t>() + at};
        const int64_t num_live =
            score.scalar_type() == at::kDouble
                ? rank_live_tokens(score.const_data_ptr<double>() + at, image, options, live_double, work)
                : rank_live_tokens(score.const_data_ptr<float>() + at, image, options, live_float, work);
        masked_merge_image(image, options, num_live, work);
      }
    });
  });
  return {x_out, size_out, rank, destination};
}

}  // namespace

TOKCOMP_REGISTER_CPU(masked_merge, masked_merge_cpu)

}  // namespace tokcomp
