#include "python_keys.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/GradMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include <memory>
#include <utility>

namespace tokcomp {
namespace {

using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::OperatorHandle;
using torch::jit::Stack;

OperatorHandle find(const std::string& name_space, const std::string& name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow((name_space + "::" + name).c_str(), "");
}

// An argument by its place in the schema; the stack may hold more below them.
c10::IValue& argument(const OperatorHandle& op, Stack* stack, int64_t position) {
  return (*stack)[stack->size() - op.schema().arguments().size() + position];
}

class Autograd final : public c10::OperatorKernel {
 public:
  Autograd(const OperatorHandle& python, std::vector<int64_t> watched)
      : python_(python), watched_(std::move(watched)) {}

  void operator()(const OperatorHandle& op, DispatchKeySet keys, Stack* stack) {
    if (takes_python(op, stack)) {
      return python_.redispatchBoxed(keys & (c10::autograd_dispatch_keyset | c10::after_autograd_keyset), stack);
    }
    const at::AutoDispatchBelowAutograd below;
    op.redispatchBoxed(keys & c10::after_autograd_keyset, stack);
  }

 private:
  bool takes_python(const OperatorHandle& op, Stack* stack) const {
    const bool grad_mode = c10::GradMode::is_enabled();
    for (const int64_t position : watched_) {
      const c10::IValue& value = argument(op, stack, position);
      if (!value.isTensor()) continue;
      const at::Tensor& tensor = value.toTensor();
      if (tensor.defined() && ((grad_mode && tensor.requires_grad()) || tensor._fw_grad(/*level=*/0).defined())) {
        return true;
      }
    }
    const int64_t count = op.schema().arguments().size();
    for (int64_t position = 0; position < count; ++position) {
      const c10::IValue& value = argument(op, stack, position);
      // A jagged tensor is a class of its own, which no dispatch key below tells.
      if (value.isTensor() && value.toTensor().defined() && value.toTensor().is_nested()) return true;
    }
    return false;
  }

  OperatorHandle python_;
  std::vector<int64_t> watched_;
};

class Autocast final : public c10::OperatorKernel {
 public:
  Autocast(DispatchKey key, at::DeviceType device, std::vector<int64_t> positions, bool to_float32)
      : key_(key), device_(device), positions_(std::move(positions)), to_float32_(to_float32) {}

  void operator()(const OperatorHandle& op, DispatchKeySet, Stack* stack) {
    const at::ScalarType target = to_float32_ ? at::kFloat : at::autocast::get_autocast_dtype(device_);
    for (const int64_t position : positions_) {
      c10::IValue& value = argument(op, stack, position);
      if (value.isTensor() && casts(value.toTensor())) value = value.toTensor().to(target);
    }
    const c10::impl::ExcludeDispatchKeyGuard below(key_);
    op.callBoxed(stack);
  }

 private:
  bool casts(const at::Tensor& tensor) const {
    return tensor.defined() && tensor.device().type() == device_ && tensor.is_floating_point() &&
           tensor.scalar_type() != at::kDouble;
  }

  DispatchKey key_;
  at::DeviceType device_;
  std::vector<int64_t> positions_;
  bool to_float32_;
};

class Backend final : public c10::OperatorKernel {
 public:
  Backend(const OperatorHandle& kernel, const OperatorHandle& python, DispatchKey key, int64_t half_width)
      : kernel_(kernel), python_(python), key_(key), half_width_(half_width) {}

  void operator()(const OperatorHandle& op, DispatchKeySet, Stack* stack) {
    const c10::IValue& first = argument(op, stack, 0);
    const bool compiled = first.isTensor() && first.toTensor().defined() && takes(first.toTensor());
    (compiled ? kernel_ : python_).redispatchBoxed(key_, stack);
  }

 private:
  bool takes(const at::Tensor& tensor) const {
    const at::ScalarType type = tensor.scalar_type();
    if (half_width_ == 0) return type != at::kDouble;
    // What is ill-shaped goes to the kernel, which refuses it in the operator's own words.
    return (type == at::kHalf || type == at::kBFloat16) && (tensor.dim() == 0 || tensor.size(-1) <= half_width_);
  }

  OperatorHandle kernel_, python_;
  DispatchKeySet key_;
  int64_t half_width_;
};

// Registrations last as long as their Library, and these for good: at exit they would be taken back after the
// dispatcher they stand in.
template <class Kernel>
void own(const std::string& name, DispatchKey key, std::unique_ptr<Kernel> kernel) {
  auto* library = new torch::Library(torch::Library::IMPL, "tokcomp", key, __FILE__, __LINE__);
  library->impl(name.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::move(kernel)));
}

}  // namespace

void own_autograd(const std::string& name, std::vector<int64_t> watched) {
  own(name, DispatchKey::Autograd, std::make_unique<Autograd>(find("tokcomp_python", name), std::move(watched)));
}

void own_autocast(const std::string& name, const std::string& device, std::vector<int64_t> positions, bool to_float32) {
  const at::DeviceType type = c10::Device(device).type();
  const DispatchKey key = type == at::kCUDA ? DispatchKey::AutocastCUDA : DispatchKey::AutocastCPU;
  own(name, key, std::make_unique<Autocast>(key, type, std::move(positions), to_float32));
}

void own_backend(const std::string& name, const std::string& key, const std::string& kernels, int64_t half_width) {
  const DispatchKey backend = c10::parseDispatchKey(key);
  own(name, backend, std::make_unique<Backend>(find(kernels, name), find("tokcomp_python", name), backend, half_width));
}

}  // namespace tokcomp
