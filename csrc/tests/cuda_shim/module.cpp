// The compiled CUDA operators, launchers and all, for CPU tensors: torch.ops.tokcomp_shim.<op>.
#include <ATen/core/Tensor.h>

#include "shim.h"

namespace tokcomp::cuda {

class Launcher {
 public:
  explicit Launcher(const at::Tensor&) {}

  template <typename Params>
  void operator()(void (*kernel)(Params), int64_t blocks, int64_t shared_bytes, const Params& params) const;
};

}  // namespace tokcomp::cuda

#include "../../cuda/launch.cuh"

template <typename Params>
void tokcomp::cuda::Launcher::operator()(void (*kernel)(Params), int64_t blocks, int64_t shared_bytes,
                                         const Params& params) const {
  shim::launch(kernel, blocks, kThreads, shared_bytes, params);
}

#undef TOKCOMP_REGISTER_CUDA
#define TOKCOMP_REGISTER_CUDA(op, function) \
  TORCH_LIBRARY_IMPL(tokcomp_shim, CPU, m) { m.impl(#op, function); }

#include "../../cuda/class_attention_sort.cu"
#include "../../cuda/masked_softmax.cu"
#include "../../cuda/merge_backward.cu"
#include "../../cuda/prune_merge.cu"

namespace shim {
extern bool descending;
}

// The order of a block's threads from now on: ascending, or descending.
extern "C" void shim_set_descending(int descending) { shim::descending = descending != 0; }
