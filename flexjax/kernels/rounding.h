// Rows of bfloat16 rounded to 8 bits: see `flexjax.kernels.products.round_rows`.

#pragma once

#include <immintrin.h>

#include <cfloat>
#include <cstdint>

#include "floats.h"

namespace flexjax {

// `[rows, inputs]` and what becomes of them.
struct Rounding {
  const uint8_t* x;
  int8_t* codes;
  float* factors;  // [groups, 2, rows]: by group the steps, then the sums of inputs
  int64_t rows, inputs, group_size;
};

inline void RoundRow(const Rounding& work, int64_t row) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const int64_t size = work.group_size;
  const uint8_t* x = work.x + 2 * row * work.inputs;
  int8_t* codes = work.codes + row * work.inputs;
  float* factors = work.factors + row;
  for (int64_t at = 0; at < work.inputs; at += size, factors += 2 * work.rows) {
    // As integers floats above 0 are in the same order, and NaN is the largest.
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = at; i < at + size; i += 16) {
      const __m512i bits = (__m512i)LoadBfloat16(x + 2 * i);
      most = _mm512_max_epu32(most, _mm512_and_si512(bits, magnitude));
    }
    const uint32_t bits = _mm512_reduce_max_epu32(most);
    float step;
    static_assert(sizeof step == sizeof bits);
    __builtin_memcpy(&step, &bits, sizeof step);
    step /= 127;
    if (step < FLT_MIN) step = 0;  // too small to divide by
    const __m512 divisor = _mm512_set1_ps(step == 0 ? FLT_MAX : step);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t i = at; i < at + size; i += 16) {
      const __m512i code = _mm512_cvtps_epi32(LoadBfloat16(x + 2 * i) / divisor);
      sum = _mm512_add_epi32(sum, code);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i),
                       _mm512_cvtsepi32_epi8(code));
    }
    factors[0] = step;
    factors[work.rows] = step * static_cast<float>(_mm512_reduce_add_epi32(sum));
  }
}

}  // namespace flexjax
