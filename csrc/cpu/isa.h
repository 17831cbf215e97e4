// The instruction sets this binary holds code for, and the one in use.
#pragma once

#include <string>
#include <vector>

namespace rewardprop::cpu {

// In rising order of preference. Scalar is the compiler's baseline for the target: no extension is
// asked for.
enum class Isa { Scalar, Avx2, Avx512, Avx512Bf16, Amx };

const char* name(Isa isa);

// What this binary was built with; depends on the compiler and its target, never on the machine
// that built it.
std::vector<Isa> compiled();

// What of it this machine can run.
std::vector<Isa> supported();

// The best supported one, or what the environment variable REWARDPROP_ISA names (scalar, avx2,
// avx512, avx512_bf16, amx). Decided once per process. Throws std::invalid_argument if the name is
// unknown or this machine or binary lacks it.
Isa selected();

}  // namespace rewardprop::cpu
