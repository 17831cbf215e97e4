// Picks one instruction set's table of loops at run time. A table `x` is declared in a namespace
// for each of them (isa.h) and defined by the operator's *_loops.cpp, which is compiled once for
// each of those that the compiler can make.
#pragma once

#include "isa.h"

#if defined(REWARDPROP_HAS_AVX2)
#define REWARDPROP_AVX2(table) &avx2::table
#else
#define REWARDPROP_AVX2(table) static_cast<decltype(&scalar::table)>(nullptr)
#endif
#if defined(REWARDPROP_HAS_AVX512)
#define REWARDPROP_AVX512(table) &avx512::table
#else
#define REWARDPROP_AVX512(table) static_cast<decltype(&scalar::table)>(nullptr)
#endif
#if defined(REWARDPROP_HAS_AVX512_BF16)
#define REWARDPROP_AVX512_BF16(table) &avx512_bf16::table
#else
#define REWARDPROP_AVX512_BF16(table) static_cast<decltype(&scalar::table)>(nullptr)
#endif

#if defined(REWARDPROP_HAS_AMX)
#define REWARDPROP_AMX(table) &amx::table
#else
#define REWARDPROP_AMX(table) static_cast<decltype(&scalar::table)>(nullptr)
#endif

// To be used inside namespace rewardprop::cpu.
#define REWARDPROP_SELECT(table)                                             \
    select(&scalar::table, REWARDPROP_AVX2(table), REWARDPROP_AVX512(table), \
           REWARDPROP_AVX512_BF16(table), REWARDPROP_AMX(table))

namespace rewardprop::cpu {

template <typename Table>
const Table& select(const Table* scalar, const Table* avx2, const Table* avx512,
                    const Table* avx512_bf16, const Table* amx) {
    switch (selected()) {  // one of those that are compiled in
        case Isa::Amx:
            return *amx;
        case Isa::Avx512Bf16:
            return *avx512_bf16;
        case Isa::Avx512:
            return *avx512;
        case Isa::Avx2:
            return *avx2;
        default:
            return *scalar;
    }
}

}  // namespace rewardprop::cpu
