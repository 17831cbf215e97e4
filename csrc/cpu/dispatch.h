// Picks one instruction set's table of loops at run time. A table `x` is declared in the namespaces
// scalar, avx2 and avx512 and defined by the operator's *_loops.cpp, which is compiled once for
// each of those that the compiler can make.
#pragma once

#include "isa.h"

#if defined(REWARDPROP_HAS_AVX2)
#define REWARDPROP_AVX2(table) &avx2::table
#else
#define REWARDPROP_AVX2(table) nullptr
#endif
#if defined(REWARDPROP_HAS_AVX512)
#define REWARDPROP_AVX512(table) &avx512::table
#else
#define REWARDPROP_AVX512(table) nullptr
#endif

// To be used inside namespace rewardprop::cpu.
#define REWARDPROP_SELECT(table) \
    select(&scalar::table, REWARDPROP_AVX2(table), REWARDPROP_AVX512(table))

namespace rewardprop::cpu {

template <typename Table>
const Table& select(const Table* scalar, const Table* avx2, const Table* avx512) {
    switch (selected()) {  // one of those that are compiled in
        case Isa::Avx512:
            return *avx512;
        case Isa::Avx2:
            return *avx2;
        default:
            return *scalar;
    }
}

}  // namespace rewardprop::cpu
