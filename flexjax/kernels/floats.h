// Functions of registers of floats.

#pragma once

#include <immintrin.h>

#include "lanes.h"

namespace flexjax {

// e^x of numbers up to 0, within 2 units in the last place; 0 where a float is too small.
inline __m512 Exp(__m512 x) {
  const __m512 least = _mm512_set1_ps(-104.0f);  // e^-104 is 0; NaN stays
  x = _mm512_max_ps(least, x);
  const __m512 log2_e = _mm512_set1_ps(1.44269504f);
  const __m512 power = _mm512_roundscale_ps(_mm512_mul_ps(x, log2_e), 0);
  // ln 2 in two parts, the first with few bits, so that its multiples are exact.
  __m512 rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(0.693359375f), x);
  rest = _mm512_fnmadd_ps(power, _mm512_set1_ps(-2.12194440e-4f), rest);
  // The Taylor series, of at most ln 2 / 2: what is left out is below 6e-9.
  constexpr float kFactors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6,
                                1.0f / 2,   1.0f,       1.0f};
  __m512 sum = _mm512_set1_ps(1.0f / 5040);
  for (const float factor : kFactors) {
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
  }
  return _mm512_scalef_ps(sum, power);
}

// The sum of each of 16 registers, in one.
inline __m512 SumEach(const __m512 (&rows)[kLanes]) {
  __m512 pair[8], four[4];
  for (int i = 0; i < 8; ++i) {
    pair[i] = _mm512_add_ps(_mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]),
                            _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]));
  }
  for (int i = 0; i < 4; ++i) {
    const __m512d low = _mm512_castps_pd(pair[2 * i]);
    const __m512d high = _mm512_castps_pd(pair[2 * i + 1]);
    four[i] = _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(low, high)),
                            _mm512_castpd_ps(_mm512_unpackhi_pd(low, high)));
  }
  // Each has in every quarter the sums there of 4 rows.
  const __m512 first = _mm512_add_ps(_mm512_shuffle_f32x4(four[0], four[1], 0x88),
                                     _mm512_shuffle_f32x4(four[0], four[1], 0xdd));
  const __m512 last = _mm512_add_ps(_mm512_shuffle_f32x4(four[2], four[3], 0x88),
                                    _mm512_shuffle_f32x4(four[2], four[3], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(first, last, 0x88),
                       _mm512_shuffle_f32x4(first, last, 0xdd));
}

}  // namespace flexjax
