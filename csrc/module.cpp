// The module fastlm._C: importing it registers the operators; it tells build facts and the ISA in use.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/dispatch.h"

namespace py = pybind11;

namespace {

std::vector<std::string> isas(bool all) {
  int count;
  const fastlm::Kernels* table = fastlm::all_kernels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i)
    if (all || table[i].runs_here()) names.push_back(table[i].isa);
  return names;
}

void set_isa(const std::string& name) {
  int count;
  const fastlm::Kernels* table = fastlm::all_kernels(&count);
  for (int i = 0; i < count; ++i)
    if (name == table[i].isa && table[i].runs_here()) return fastlm::use_kernels(table[i]);
  throw py::value_error("fastlm._C.set_isa: '" + name + "' is not built in or does not run on this CPU");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Operators of fastlm (registered on import), build facts and the CPU's instruction set.";
  m.def("isa", [] { return std::string(fastlm::kernels().isa); }, "Instruction set in use.");
  m.def("isas", [] { return isas(false); }, "Instruction sets that are built in and run on this CPU.");
  m.def("built_isas", [] { return isas(true); }, "Instruction sets that are built in.");
  m.def("set_isa", &set_isa, py::arg("name"), "Use another instruction set from now on.");
  m.attr("compiler") = FASTLM_COMPILER;
  m.attr("torch_version") = FASTLM_TORCH_VERSION;  // that it was compiled against
  m.attr("cuda") = false;
  fastlm::kernels();  // an unusable FASTLM_ISA is an error here, not at the first call
}
