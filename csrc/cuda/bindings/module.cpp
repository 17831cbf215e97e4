// rewardprop_fast._cuda: the CUDA C++ kernels. Raw pointers and a stream in, exceptions out, as in
// _native; a module of its own, so that a problem with CUDA never takes the CPU's kernels away.
#include <pybind11/pybind11.h>

#include "operators.h"

PYBIND11_MODULE(REWARDPROP_MODULE, module) {
    using namespace rewardprop::cuda;
    module.doc() = "CUDA kernels of rewardprop_fast.";
    module.def(
        "version", [] { return REWARDPROP_VERSION; }, "The package version this was built from.");
    module.def(
        "sources", [] { return REWARDPROP_SOURCES; },
        "What it was built from (rewardprop_fast/ops/sources.py).");
    bindings::bind_geglu(module);
    bindings::bind_group_norm_silu(module);
    bindings::bind_guided_ddim_step(module);
}
