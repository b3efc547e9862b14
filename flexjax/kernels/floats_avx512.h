// Sixteen floats in a register of AVX-512.

#pragma once

#include <immintrin.h>

#include "lanes.h"

namespace flexjax {

using Floats = __m512;  // with operators of its own
using Words = __m512i;  // as many of 32 bits

inline Floats Same(float x) { return _mm512_set1_ps(x); }
inline Floats Load(const float* at) { return _mm512_loadu_ps(at); }
inline void Store(Floats x, float* at) { _mm512_storeu_ps(at, x); }

// `x * y + z`, rounded once.
inline Floats MultiplyAdd(Floats x, Floats y, Floats z) {
  return _mm512_fmadd_ps(x, y, z);
}

// The second where either is NaN.
inline Floats Max(Floats x, Floats y) { return _mm512_max_ps(x, y); }

inline float First(Floats x) { return _mm512_cvtss_f32(x); }
inline float Sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline float Largest(Floats x) { return _mm512_reduce_max_ps(x); }
inline Floats ToNearest(Floats x) { return _mm512_roundscale_ps(x, 0); }

// `x * 2^power`, of powers that are whole.
inline Floats Scaled(Floats x, Floats power) { return _mm512_scalef_ps(x, power); }

// The sum of each of 16, in one.
inline Floats SumEach(const Floats (&rows)[kLanes]) {
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

inline Floats LoadFloat16(const uint8_t* at) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

inline void StoreFloat16(Floats x, uint8_t* at) {
  const __m256i halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), halves);
}

// A bfloat16 is the upper half of a float.
inline Floats Wide(__m256i halves) {
  return (__m512)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
}

inline Floats LoadBfloat16(const uint8_t* at) {
  return Wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
}

inline void StoreBfloat16(Floats x, uint8_t* at) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), (__m256i)_mm512_cvtneps_pbh(x));
}

inline Floats RoundedToBfloat16(Floats x) {
  return Wide((__m256i)_mm512_cvtneps_pbh(x));
}

// One bfloat16, 16 times.
inline Floats SameBfloat16(const uint8_t* at) {
  return (__m512)_mm512_set1_epi32(LoadHalf(at) << 16);
}

inline Words LoadBytes(const uint8_t* at) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
}

inline Floats AsFloats(Words codes) { return _mm512_cvtepi32_ps(codes); }
inline Words UpperNibbles(Words bytes) { return _mm512_srli_epi32(bytes, 4); }

// The values that the lower 4 bits of codes stand for.
inline Floats LookUp(Floats values, Words codes) {
  return _mm512_permutexvar_ps(codes, values);
}

}  // namespace flexjax
