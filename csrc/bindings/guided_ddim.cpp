// The guided DDIM step for Python (rewardprop_fast/ops/guided_ddim_step/native.py).
#include "../cpu/guided_ddim.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <optional>
#include <string>

#include "arrays.h"
#include "operators.h"

namespace py = pybind11;

namespace rewardprop::bindings {

namespace {

math::DDIMCoefficients load_coefficients(const Array& array) {
    const float* values = array.as<const float>();
    return {values[0], values[1], values[2]};
}

template <typename Model>
void forward(const Array& model_output, const Array& latents, const Array* noise,
             const Array& coefficients, std::optional<double> guidance_scale, const Array& out) {
    cpu::GuidedDDIM<Model> step{};
    step.uncond = model_output.as<const Model>();
    step.cond = guidance_scale ? step.uncond + latents.count : nullptr;
    step.latents = latents.as<const float>();
    step.noise = noise ? noise->as<const float>() : nullptr;
    step.out = out.as<float>();
    step.guidance_scale = static_cast<float>(guidance_scale.value_or(1.0));
    step.coefficients = load_coefficients(coefficients);
    py::gil_scoped_release release;
    cpu::run(step, latents.count);
}

template <typename Model>
void backward(const Array& grad, const Array& coefficients, std::optional<double> guidance_scale,
              const Array& out) {
    const double scale = guidance_scale.value_or(1.0);
    cpu::GuidedDDIMBackward<Model> step{};
    step.grad = grad.as<const float>();
    step.grad_uncond = out.as<Model>();
    step.grad_cond = guidance_scale ? step.grad_uncond + grad.count : nullptr;
    // The difference is taken in double and rounded once, as PyTorch does with a Python number.
    step.uncond_share = static_cast<float>(1.0 - scale);
    step.cond_share = static_cast<float>(scale);
    step.coefficients = load_coefficients(coefficients);
    py::gil_scoped_release release;
    cpu::run(step, grad.count);
}

void guided_ddim_step(std::uintptr_t model_output_address, std::int64_t model_output_count,
                      const std::string& model_dtype, std::uintptr_t latents_address,
                      std::optional<std::uintptr_t> noise_address,
                      std::uintptr_t coefficients_address, std::optional<double> guidance_scale,
                      std::uintptr_t out_address, std::int64_t count) {
    const Array model_output{"model_output", model_output_address, model_output_count,
                             item_size("model_dtype", model_dtype)};
    const Array latents{"latents", latents_address, count, sizeof(float)};
    const Array noise{"noise", noise_address.value_or(0), noise_address ? count : 0, sizeof(float)};
    const Array coefficients{"coefficients", coefficients_address, 3, sizeof(float)};
    const Array out{"out", out_address, count, sizeof(float)};
    for (const Array* array : {&latents, &model_output, &noise, &coefficients, &out}) check(*array);
    check_count(model_output, guidance_scale ? 2 * count : count);
    for (const Array* array : {&latents, &model_output, &noise, &coefficients})
        check_apart(out, *array);

    const auto run = model_dtype == "float32" ? forward<float> : forward<math::BFloat16>;
    run(model_output, latents, noise_address ? &noise : nullptr, coefficients, guidance_scale, out);
}

void guided_ddim_step_backward(std::uintptr_t grad_address, std::int64_t count,
                               std::uintptr_t coefficients_address,
                               std::optional<double> guidance_scale, const std::string& model_dtype,
                               std::uintptr_t out_address, std::int64_t out_count) {
    const Array grad{"grad", grad_address, count, sizeof(float)};
    const Array coefficients{"coefficients", coefficients_address, 3, sizeof(float)};
    const Array out{"out", out_address, out_count, item_size("model_dtype", model_dtype)};
    for (const Array* array : {&grad, &coefficients, &out}) check(*array);
    check_count(out, guidance_scale ? 2 * count : count);
    for (const Array* array : {&grad, &coefficients}) check_apart(out, *array);

    const auto run = model_dtype == "float32" ? backward<float> : backward<math::BFloat16>;
    run(grad, coefficients, guidance_scale, out);
}

}  // namespace

void bind_guided_ddim_step(py::module_& module) {
    // By position too: small tensors notice what a call costs.
    module.def(
        "guided_ddim_step", &guided_ddim_step, py::arg("model_output"),
        py::arg("model_output_count"), py::arg("model_dtype"), py::arg("latents"), py::arg("noise"),
        py::arg("coefficients"), py::arg("guidance_scale"), py::arg("out"), py::arg("count"),
        "Writes x_prev to out. Addresses are of dense arrays; count is in elements of latents.");
    module.def("guided_ddim_step_backward", &guided_ddim_step_backward, py::arg("grad"),
               py::arg("count"), py::arg("coefficients"), py::arg("guidance_scale"),
               py::arg("model_dtype"), py::arg("out"), py::arg("out_count"),
               "Writes the gradient of model_output to out.");
}

}  // namespace rewardprop::bindings
