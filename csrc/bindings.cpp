// The module _C: says what was built and how many threads it uses. Loading it registers the kernels, which each file in
// csrc/cpu and csrc/cuda does for itself; where those for the CPU are modules of their own, load_cpu_kernels picks one.
// What runs above the kernels is registered by the functions of python_keys.h.
#include <ATen/Parallel.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "build_info.h"
#include "cpu_level.h"
#include "python_keys.h"

namespace py = pybind11;

namespace {

std::vector<std::string> kernels(const std::string& name_space, c10::DispatchKey key) {
  std::vector<std::string> names;
  for (const auto& op : c10::Dispatcher::singleton().getRegistrationsForDispatchKey(key)) {
    const std::string prefix = name_space + "::";
    if (op.name.rfind(prefix, 0) == 0) names.push_back(op.name.substr(prefix.size()));
  }
  std::sort(names.begin(), names.end());
  return names;
}

std::string cpu_capability;

std::string load_cpu_kernels() { return cpu_capability = tokcomp::load_cpu_kernels(); }

py::dict build_info() {
  py::dict info = py::module_::import("json").attr("loads")(kBuildInfo);
  const std::map<std::string, std::vector<std::string>> operators = {
      {"cpu", kernels("tokcomp_cpu", c10::DispatchKey::CPU)},
      {"cuda", kernels("tokcomp_cuda", c10::DispatchKey::CUDA)},
  };
  info["operators"] = operators;
  info["cpu_capability"] = cpu_capability;
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled kernels of tokcomp_kernels.";
  m.def("load_cpu_kernels", &load_cpu_kernels, "Load the CPU kernels of the best level there is, and return its name.");
  m.def("own_autograd", &tokcomp::own_autograd, "Take an operator's Autograd key; see csrc/python_keys.h.");
  m.def("own_autocast", &tokcomp::own_autocast, "Take an operator's Autocast key of a device.");
  m.def("own_backend", &tokcomp::own_backend, "Give an operator's key of a device to its compiled kernel.",
        py::arg("name"), py::arg("key"), py::arg("kernels"), py::arg("half_width") = 0);
  m.def("build_info", &build_info, "What was built and which level runs on the CPU; see tokcomp_kernels.build_info.");
  m.def("get_num_threads", &at::get_num_threads, "Threads the CPU kernels run on.");
  m.def("set_num_threads", &at::set_num_threads, py::arg("num_threads"),
        "Set the threads the CPU kernels, and torch, run on.");
}
