#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "../common/checks.h"
#include "../common/cpu_cosine.h"
#include "../common/cpu_rows.h"
#include "../common/dispatch.h"
#include "../common/rank.h"
#include "../common/registration.h"

namespace tokcomp {
namespace {

struct Counts {
  int64_t tokens, prefix, pruned_to, kept, width;
  bool weighted_size;

  bool merges() const { return kept < pruned_to; }
  int64_t sources() const { return pruned_to - kept; }
  int64_t destinations() const { return kept - prefix; }
};

// What one thread reuses from image to image. Rows are kept in rank order, prefix tokens first.
template <typename T, typename A = acc_type<T>>
class Workspace {
 public:
  explicit Workspace(const Counts& counts)
      : order(counts.tokens),
        row(counts.merges() ? counts.pruned_to : 0),
        inverse_norm(row.size()),
        total_size(counts.merges() ? counts.kept : 0),
        similarity(counts.sources()),
        match(counts.sources()),
        wide_(std::is_same_v<T, A> ? 0 : row.size() * counts.width),
        width_(counts.width) {}

  // Where row `rank` is widened to; nullptr where the input's rows already are of the accumulate type.
  A* wide(int64_t rank) { return wide_.empty() ? nullptr : wide_.data() + rank * width_; }

  std::vector<int64_t> order;
  std::vector<const A*> row;
  std::vector<A> inverse_norm, total_size, similarity;
  std::vector<int64_t> match;
  std::vector<const T*> members;
  rows::Groups groups;

 private:
  std::vector<A> wide_;
  int64_t width_;
};

template <typename T, typename A = acc_type<T>>
struct Image {
  const T* x;  // [N, C], token_stride apart
  int64_t token_stride;
  const A* size;  // [N] or nullptr: ones
  T* x_out;       // [M, C]
  A* size_out;    // [M]
  int64_t* source;

  const T* row(int64_t token) const { return x + token * token_stride; }
  A size_of(int64_t token) const { return size ? effective_size(size[token]) : A(1); }
};

template <typename T, typename A = acc_type<T>>
void merge(const Image<T>& image, const Counts& counts, Workspace<T>& work) {
  const int64_t first = counts.prefix, kept = counts.kept, width = counts.width;
  for (int64_t r = first; r < counts.pruned_to; ++r) {
    const T* row = image.row(work.order[r]);
    T* out = r < kept ? image.x_out + r * width : nullptr;
    work.inverse_norm[r] = cosine::inverse_norm(rows::square_sum(row, width, out, work.wide(r)));
    if constexpr (std::is_same_v<T, A>) {
      work.row[r] = row;
    } else {
      work.row[r] = work.wide(r);
    }
  }
  const cosine::Rows<A> sources{work.row.data() + kept, work.inverse_norm.data() + kept, counts.sources()};
  const cosine::Rows<A> destinations{work.row.data() + first, work.inverse_norm.data() + first, counts.destinations()};
  cosine::best_matches(sources, destinations, width, work.similarity.data(), work.match.data());

  for (int64_t s = 0; s < counts.sources(); ++s) {
    work.match[s] += first;
    image.source[work.order[kept + s]] = work.match[s];
  }
  work.groups.build(work.match.data(), counts.sources(), kept);
  for (int64_t slot = first; slot < kept; ++slot) {
    const int64_t count = work.groups.count(slot);
    if (count == 0) continue;
    A total = image.size_out[slot];
    work.members.assign(1, image.row(work.order[slot]));
    for (int64_t i = 0; i < count; ++i) {
      const int64_t s = work.groups.items(slot)[i], token = work.order[kept + s];
      work.members.push_back(image.row(token));
      total += image.size_of(token) * (counts.weighted_size ? work.similarity[s] : A(1));
    }
    image.size_out[slot] = effective_size(total);
    rows::combine<T>(work.members.data(), nullptr, count + 1, A(count + 1), width, image.x_out + slot * width);
  }
}

template <typename T>
void prune_merge_image(const Image<T>& image, const Counts& counts, Workspace<T>& work) {
  std::fill_n(image.source, counts.tokens, int64_t{-1});
  for (int64_t slot = 0; slot < counts.kept; ++slot) {
    image.source[work.order[slot]] = slot;
    image.size_out[slot] = image.size_of(work.order[slot]);
  }
  // Where tokens merge, the pass that measures a destination also copies it.
  const int64_t copied = counts.merges() ? counts.prefix : counts.kept;
  for (int64_t slot = 0; slot < copied; ++slot) {
    rows::copy(image.row(work.order[slot]), image.x_out + slot * counts.width, counts.width);
  }
  if (counts.merges()) merge(image, counts, work);
}

std::tuple<Tensor, Tensor, Tensor> prune_merge_cpu(const Tensor& x, const Tensor& importance, int64_t num_prune_kept,
                                                   int64_t num_merge_kept, const OptionalTensor& size,
                                                   int64_t num_prefix_tokens, bool similarity_weighted_size) {
  check_prune_merge(x, importance, num_prune_kept, num_merge_kept, size, num_prefix_tokens);
  const int64_t batch = x.size(0), num_tokens = x.size(1), width = x.size(2);
  const int64_t pruned_to = std::min(num_tokens, num_prune_kept), kept = std::min(pruned_to, num_merge_kept);
  const Counts counts{num_tokens, num_prefix_tokens, pruned_to, kept, width, similarity_weighted_size};

  const Tensor x_rows = rows::dense_rows(x);
  // float16 and bfloat16 widen exactly, so the order is that of the scores' own type.
  const Tensor score = per_token_acc(importance, importance);
  const OptionalTensor size_in = per_token_acc(size, x);
  const auto acc_options = x.options().dtype(acc_scalar_type(x.scalar_type()));
  Tensor x_out = at::empty({batch, kept, width}, x.options());
  Tensor size_out = at::empty({batch, kept}, acc_options);
  Tensor source = at::empty({batch, num_tokens}, x.options().dtype(at::kLong));

  TOKCOMP_DISPATCH_CPU(x.scalar_type(), "prune_merge_cpu", [&] {
    using acc_t = acc_type<scalar_t>;
    at::parallel_for(0, batch, 1, [&](int64_t begin, int64_t end) {
      Workspace<scalar_t> work(counts);
      for (int64_t b = begin; b < end; ++b) {
        if (score.scalar_type() == at::kDouble) {
          rank_tokens(score.const_data_ptr<double>() + b * num_tokens, num_tokens, num_prefix_tokens, work.order.data(),
                      nullptr);
        } else {
          rank_tokens(score.const_data_ptr<float>() + b * num_tokens, num_tokens, num_prefix_tokens, work.order.data(),
                      nullptr);
        }
        const Image<scalar_t> image{x_rows.const_data_ptr<scalar_t>() + b * x_rows.stride(0),
                                    x_rows.stride(1),
                                    size_in ? size_in->const_data_ptr<acc_t>() + b * num_tokens : nullptr,
                                    x_out.mutable_data_ptr<scalar_t>() + b * kept * width,
                                    size_out.mutable_data_ptr<acc_t>() + b * kept,
                                    source.mutable_data_ptr<int64_t>() + b * num_tokens};
        prune_merge_image(image, counts, work);
      }
    });
  });
  return {x_out, size_out, source};
}

}  // namespace

TOKCOMP_REGISTER_CPU(prune_merge, prune_merge_cpu)

}  // namespace tokcomp
