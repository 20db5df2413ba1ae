// The compiled CUDA operators, launchers and all, for CPU tensors: torch.ops.tokcomp_shim.<op>.
#include <ATen/core/Tensor.h>

#include "../../cuda/device.cuh"

namespace tokcomp::cuda {

class Launcher {
 public:
  explicit Launcher(const at::Tensor&) {}

  DeviceLimits limits() const;

  template <typename Params>
  void operator()(void (*kernel)(Params), int64_t blocks, int64_t shared_bytes, const Params& params, int cluster = 1,
                  int threads = kThreads) const;
};

}  // namespace tokcomp::cuda

#include "../../cuda/launch.cuh"

namespace shim {

extern int64_t schedule;
extern int64_t shared_limit;
bool clusters = true;
int64_t launches = 0;

}  // namespace shim

tokcomp::cuda::DeviceLimits tokcomp::cuda::Launcher::limits() const { return {shim::shared_limit, shim::clusters}; }

template <typename Params>
void tokcomp::cuda::Launcher::operator()(void (*kernel)(Params), int64_t blocks, int64_t shared_bytes,
                                         const Params& params, int cluster, int threads) const {
  if (cluster > 1 && !shim::clusters) throw std::runtime_error("shim: a device without clusters");
  ++shim::launches;
  shim::launch(kernel, blocks, threads, shared_bytes, cluster, params);
}

#undef TOKCOMP_OFFER_CUDA
#define TOKCOMP_OFFER_CUDA(op, function) TOKCOMP_REGISTER_CUDA(op, function)
#undef TOKCOMP_REGISTER_CUDA
#define TOKCOMP_REGISTER_CUDA(op, function) \
  TORCH_LIBRARY_IMPL(tokcomp_shim, CPU, m) { m.impl(#op, function); }

#include "../../cuda/add_layer_norm.cu"
#include "../../cuda/attention.cu"
#include "../../cuda/attention_received.cu"
#include "../../cuda/bipartite_merge.cu"
#include "../../cuda/class_attention_sort.cu"
#include "../../cuda/masked_softmax.cu"
#include "../../cuda/merge_backward.cu"
#include "../../cuda/prune_merge.cu"
#include "../../cuda/prune_merge_norm.cu"
#include "../../cuda/select_diverse.cu"

// The order of a block's threads from now on: 0 ascending, 1 descending, above 1 the seed of random ones.
extern "C" void shim_set_schedule(int64_t schedule) { shim::schedule = schedule; }

// Kernels launched so far.
extern "C" int64_t shim_launches() { return shim::launches; }

// The numbered barriers that are left out from now on, by their bits.
extern "C" void shim_set_without(uint64_t sites) { shim::without = sites; }

// The device from now on: shared memory that a block can have, and whether there are clusters.
extern "C" void shim_set_device(int64_t shared_bytes, int clusters) {
  shim::shared_limit = shared_bytes;
  shim::clusters = clusters != 0;
}

// How prune_merge divides a shape on a device: slices, width, lanes, resident, targets, shared bytes.
extern "C" void shim_merge_plan(int64_t width, int num_tokens, int num_prefix_tokens, int num_alive, int num_kept,
                                int bytes_each, int64_t shared_bytes, int clusters, int64_t* fields) {
  using namespace tokcomp::cuda;
  const MergeShape shape{width, num_tokens, num_prefix_tokens, num_alive, num_kept};
  const DeviceLimits device{shared_bytes, clusters != 0};
  const MergePlan plan =
      bytes_each == 4 ? make_merge_plan<float>(shape, device) : make_merge_plan<__half>(shape, device);
  const int64_t all[] = {plan.slices, plan.width, plan.lanes, plan.resident, plan.targets, plan.shared_bytes};
  std::copy(std::begin(all), std::end(all), fields);
}
