// What all kernels are made of.

#pragma once

#include <cstdint>

namespace flexjax {

constexpr int64_t kLanes = 16;  // of a register: floats, or words

// Asks for a line of memory. As assembly, since GCC takes a function that does nothing
// but prefetch for one without effect, and leaves its calls out.
inline void Prefetch(const uint8_t* at) { asm volatile("prefetcht0 %0" : : "m"(*at)); }

}  // namespace flexjax
