// Groups of elements that share a scale and a minimum; see `flexjax.quant`.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "lanes.h"

namespace flexjax {

// A group's scale and minimum, in all lanes.
class WideGroup {
 public:
  WideGroup(const uint8_t* scale, int64_t num_groups)
      : scale_(Float(scale)), minimum_(Float(scale + 2 * num_groups)) {}

  __m512 Wide(__m512i codes) const {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), scale_, minimum_);
  }

  // What the 16 codes of 4 bits stand for.
  __m512 WideNibbles() const {
    return Wide(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0));
  }

  // The same as bfloat16, twice: so whatever is above the lower 4 bits of a code changes
  // nothing when it is looked up.
  __m512i Values() const {
    const __m512 values = WideNibbles();
    return (__m512i)_mm512_cvtne2ps_pbh(values, values);
  }

 private:
  // A bfloat16 is the upper half of a float.
  static __m512 Float(const uint8_t* at) {
    constexpr __mmask32 kUpper = 0xaaaaaaaa;
    const __m128i half = _mm_loadu_si16(at);
    return _mm512_castsi512_ps(_mm512_maskz_broadcastw_epi16(kUpper, half));
  }

  __m512 scale_, minimum_;
};

}  // namespace flexjax
