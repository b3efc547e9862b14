// What all kernels are made of.

#pragma once

#include <cstdint>
#include <cstring>

namespace flexjax {

constexpr int64_t kLanes = 16;  // of a register: floats, or words

// Asks for a line of memory. As assembly, since GCC takes a function that does nothing
// but prefetch for one without effect, and leaves its calls out.
inline void Prefetch(const uint8_t* at) { asm volatile("prefetcht0 %0" : : "m"(*at)); }

// Not an intrinsic: that of GCC 11.1 and 11.2 puts it where no lane has it (bug 99754).
inline uint32_t LoadHalf(const uint8_t* at) {
  uint16_t half;
  std::memcpy(&half, at, sizeof half);
  return half;
}

}  // namespace flexjax
