// rewardprop_fast._native: raw pointers in, exceptions out. The Python side
// (rewardprop_fast/ops/*/native.py) turns tensors into addresses and counts.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/parallel.h"
#include "operators.h"

namespace py = pybind11;

namespace rewardprop::bindings {

namespace {

std::vector<std::string> names(const std::vector<cpu::Isa>& isas) {
    std::vector<std::string> result;
    for (cpu::Isa isa : isas) result.emplace_back(cpu::name(isa));
    return result;
}

py::dict isa_report() {
    py::dict report;
    report["compiled"] = names(cpu::compiled());
    report["supported"] = names(cpu::supported());
    report["selected"] = cpu::name(cpu::selected());
    return report;
}

}  // namespace

}  // namespace rewardprop::bindings

PYBIND11_MODULE(_native, module) {
    using namespace rewardprop;
    module.doc() =
        "CPU kernels of rewardprop_fast. Import torch first: its OpenMP pool is the one to share.";
    module.def(
        "version", [] { return REWARDPROP_VERSION; }, "The package version this was built from.");
    module.def(
        "sources", [] { return REWARDPROP_SOURCES; },
        "What it was built from (rewardprop_fast/ops/sources.py).");
    module.def("isa_report", &bindings::isa_report,
               "Instruction sets: compiled in, supported by this machine, selected. Raises "
               "ValueError where REWARDPROP_ISA names one that cannot be used.");
    module.def("max_threads", &cpu::max_threads,
               "Threads a loop may use; follows torch.set_num_threads.");
    bindings::bind_geglu(module);
    bindings::bind_group_norm_silu(module);
    bindings::bind_attention(module);
    bindings::bind_guided_ddim_step(module);
}
