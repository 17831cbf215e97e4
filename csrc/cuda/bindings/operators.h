// One function for each operator's file in this folder; module.cpp calls them all.
#pragma once

#include <pybind11/pybind11.h>

namespace rewardprop::cuda::bindings {

void bind_geglu(pybind11::module_& module);
void bind_group_norm_silu(pybind11::module_& module);
void bind_guided_ddim_step(pybind11::module_& module);

}  // namespace rewardprop::cuda::bindings
