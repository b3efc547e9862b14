// Rows of bfloat16 rounded to 8 bits: see `flexjax.kernels.products.round_rows`.

#pragma once

#include <immintrin.h>

#include <cfloat>
#include <cstdint>

namespace flexjax {

// `[rows, inputs]` and what becomes of them.
struct Rounding {
  const uint16_t* x;
  int8_t* codes;
  float* factors;  // [groups, 2, rows]: by group the steps, then the sums of inputs
  int64_t rows, inputs, group_size;
};

// 16 bfloat16, which are the upper halves of floats.
inline __m512 Floats(const uint16_t* from) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}

inline void RoundRow(const Rounding& work, int64_t row) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  const int64_t size = work.group_size;
  const uint16_t* x = work.x + row * work.inputs;
  int8_t* codes = work.codes + row * work.inputs;
  float* factors = work.factors + row;
  for (int64_t at = 0; at < work.inputs; at += size, factors += 2 * work.rows) {
    // As integers floats above 0 are in the same order, and NaN is the largest.
    __m512i most = _mm512_setzero_si512();
    for (int64_t i = at; i < at + size; i += 16) {
      most = _mm512_max_epu32(most, _mm512_and_si512((__m512i)Floats(x + i), magnitude));
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
      const __m512i code = _mm512_cvtps_epi32(_mm512_div_ps(Floats(x + i), divisor));
      sum = _mm512_add_epi32(sum, code);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i),
                       _mm512_cvtsepi32_epi8(code));
    }
    factors[0] = step;
    factors[work.rows] = step * static_cast<float>(_mm512_reduce_add_epi32(sum));
  }
}

}  // namespace flexjax
