#include "select_diverse.cuh"

#include <algorithm>

#include "../common/partition_checks.h"
#include "launch.cuh"

namespace tokcomp::cuda {
namespace {

// Cosines that are held at a time: images take turns where a batch has more.
constexpr int64_t kMaxCosines = int64_t{1} << 28;

Tensor select_diverse_cuda(const Tensor& features, int64_t num_kept, const OptionalTensor& relevance,
                           int64_t num_prefix_tokens, c10::string_view rule) {
  constexpr const char* op = "select_diverse";
  check_select_diverse(features, num_kept, relevance, num_prefix_tokens, rule);
  check_dtype(op, "features", features);
  const int64_t batch = features.size(0), width = features.size(2);
  const int64_t num_patches = features.size(1) - num_prefix_tokens, num_chosen = num_kept - num_prefix_tokens;
  Tensor out = empty_like_with(features, {batch, num_kept}, at::kLong);
  if (out.numel() == 0) return out;

  const Launcher launch(features);
  const Tensor rows = with_rows(features);
  const OptionalTensor wanted = per_token_acc(relevance, features);  // [B, N]
  const int64_t images = std::clamp<int64_t>(kMaxCosines / std::max<int64_t>(num_patches * num_patches, 1), 1, batch);
  const auto scratch = [&](int64_t each) { return empty_like_with(features, {images, each}, at::kFloat); };
  SelectDiverseParams choice{};
  choice.num_patches = to_int(op, "the number of tokens", num_patches);
  choice.num_prefix_tokens = to_int(op, "the number of prefix tokens", num_prefix_tokens);
  choice.num_chosen = to_int(op, "the number of kept tokens", num_chosen);
  const Tensor inverse_norm = scratch(num_patches), cosine = scratch(num_chosen > 0 ? num_patches * num_patches : 0);
  Tensor factor, scores;
  if (rule == "dpp") {
    factor = scratch(num_chosen * num_patches);
    choice.factor = output<float>(factor);
  }
  if (num_patches > kSharedScores) {
    scores = scratch(2 * num_patches);
    choice.scores = output<float>(scores);
  }
  choice.cosine = input<float>(cosine);
  choice.inverse_norm = input<float>(inverse_norm);

  TOKCOMP_DISPATCH_CUDA(features.scalar_type(), op, [&] {
    using T = typename DeviceType<scalar_t>::type;
    CosineParams<T> p{};
    p.inverse_norm = output<float>(inverse_norm);
    p.cosine = output<float>(cosine);
    p.stride_b = rows.stride(0);
    p.stride_n = rows.stride(1);
    p.num_patches = choice.num_patches;
    p.width = to_int(op, "the number of channels", width);
    p.aligned = rows_aligned({rows});
    for (int64_t first = 0; first < batch; first += images) {
      p.batch = std::min(images, batch - first);
      p.features = input<T>(rows) + first * p.stride_b + num_prefix_tokens * p.stride_n;
      choice.relevance = wanted ? input<float>(wanted) + first * features.size(1) : nullptr;
      choice.chosen = output<int64_t>(out) + first * num_kept;
      if (num_chosen > 0) launch_cosines(p, launch);
      launch_select_diverse(choice, p.batch, launch);
    }
  });
  return out;
}

}  // namespace

TOKCOMP_REGISTER_CUDA(select_diverse, select_diverse_cuda)

}  // namespace tokcomp::cuda
