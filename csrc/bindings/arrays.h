// What Python lends: addresses and counts, checked before memory is touched. Torch is not asked: no
// torch header is included, so that one binary works with every torch version.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace rewardprop::bindings {

// An array the caller lends: its address and how many elements it holds.
struct Array {
    const char* name;
    std::uintptr_t address;
    std::int64_t count;
    std::int64_t item_size;

    std::uintptr_t end() const { return address + static_cast<std::uintptr_t>(count * item_size); }

    template <typename T>
    T* as() const {
        return reinterpret_cast<T*>(address);
    }
};

inline void check(const Array& array) {
    if (array.count < 0) {
        throw std::invalid_argument(std::string(array.name) +
                                    " has a negative count: " + std::to_string(array.count));
    }
    if (array.count > 0 && array.address == 0)
        throw std::invalid_argument(std::string(array.name) + " is null");
    if (array.address % static_cast<std::uintptr_t>(array.item_size) != 0) {
        throw std::invalid_argument(std::string(array.name) +
                                    " is not aligned to its element size");
    }
}

inline void check_count(const Array& array, std::int64_t expected) {
    if (array.count != expected) {
        throw std::invalid_argument(std::string(array.name) + " has " +
                                    std::to_string(array.count) + " elements; expected " +
                                    std::to_string(expected));
    }
}

// The loops promise the compiler that what they write is not what they read.
inline void check_apart(const Array& written, const Array& read) {
    if (written.count > 0 && read.count > 0 && written.address < read.end() &&
        read.address < written.end()) {
        throw std::invalid_argument(std::string(written.name) + " overlaps " + read.name);
    }
}

// rows * width, where arrays of twice that many elements of at most 8 bytes can be addressed.
inline std::int64_t count_of(std::int64_t rows, std::int64_t width) {
    std::int64_t count = 0;
    if (rows < 0 || width < 0 || __builtin_mul_overflow(rows, width, &count) ||
        count > INT64_MAX / 16) {
        throw std::invalid_argument("rows " + std::to_string(rows) + " and width " +
                                    std::to_string(width) + " are not the sizes of an array");
    }
    return count;
}

// The size in bytes of an element of a tensor that may be float32 or bfloat16.
inline std::int64_t item_size(const char* argument, const std::string& dtype) {
    if (dtype == "float32") return 4;
    if (dtype == "bfloat16") return 2;
    throw std::invalid_argument(std::string(argument) + " is '" + dtype +
                                "'; allowed are float32 and bfloat16");
}

}  // namespace rewardprop::bindings
