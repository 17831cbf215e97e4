#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(REWARDPROP_HAS_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace rewardprop::cpu {

namespace {

// The builtin also asks the operating system whether it saves the wide registers.
[[maybe_unused]] bool machine_has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

#if defined(REWARDPROP_HAS_AMX)
// Linux gives a process the tiles' registers when it asks for them.
bool machine_has_amx() {
#if defined(__linux__)
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
    return false;
#endif
}
#endif

bool machine_has(Isa isa) {
    switch (isa) {
#if defined(REWARDPROP_HAS_AVX2)
        case Isa::Avx2:
            return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
#if defined(REWARDPROP_HAS_AVX512)
        case Isa::Avx512:
            return machine_has_avx512();
#endif
#if defined(REWARDPROP_HAS_AVX512_BF16)
        case Isa::Avx512Bf16:
            return machine_has_avx512() && __builtin_cpu_supports("avx512bf16");
#endif
#if defined(REWARDPROP_HAS_AMX)
        case Isa::Amx:
            return machine_has(Isa::Avx512Bf16) && machine_has_amx();
#endif
        default:
            return isa == Isa::Scalar;
    }
}

std::string names(const std::vector<Isa>& isas) {
    std::string text;
    for (Isa isa : isas) text += (text.empty() ? "" : ", ") + std::string(name(isa));
    return text;
}

Isa choose() {
    const std::vector<Isa> usable = supported();
    const char* forced = std::getenv("REWARDPROP_ISA");
    if (forced == nullptr || *forced == '\0') return usable.back();
    for (Isa isa : usable) {
        if (name(isa) == std::string(forced)) return isa;
    }
    throw std::invalid_argument("REWARDPROP_ISA is '" + std::string(forced) +
                                "'; on this machine it can be " + names(usable) +
                                " (this build holds " + names(compiled()) +
                                "). Unset it to take the best.");
}

}  // namespace

const char* name(Isa isa) {
    switch (isa) {
        case Isa::Avx2:
            return "avx2";
        case Isa::Avx512:
            return "avx512";
        case Isa::Avx512Bf16:
            return "avx512_bf16";
        case Isa::Amx:
            return "amx";
        default:
            return "scalar";
    }
}

std::vector<Isa> compiled() {
    return {
        Isa::Scalar,
#if defined(REWARDPROP_HAS_AVX2)
        Isa::Avx2,
#endif
#if defined(REWARDPROP_HAS_AVX512)
        Isa::Avx512,
#endif
#if defined(REWARDPROP_HAS_AVX512_BF16)
        Isa::Avx512Bf16,
#endif
#if defined(REWARDPROP_HAS_AMX)
        Isa::Amx,
#endif
    };
}

std::vector<Isa> supported() {
    std::vector<Isa> result;
    for (Isa isa : compiled()) {
        if (machine_has(isa)) result.push_back(isa);
    }
    return result;
}

Isa selected() {
    static const Isa isa = choose();
    return isa;
}

}  // namespace rewardprop::cpu
