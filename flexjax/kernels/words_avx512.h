// Sixteen words in a register of AVX-512.

#pragma once

#include "floats_avx512.h"

namespace flexjax {

inline __mmask16 FirstLanes(int64_t count) { return (1u << count) - 1; }

// `count` words, up to 16; the others are zero.
inline Words LoadWords(const char* at, int64_t count) {
  return _mm512_maskz_loadu_epi32(FirstLanes(count), at);
}

inline void StoreWords(Words words, int64_t count, void* at) {
  _mm512_mask_storeu_epi32(at, FirstLanes(count), words);
}

// Swaps the axes of 16 x 16 words.
inline void Transpose(Words (&rows)[kLanes]) {
  __m512i part[kLanes];
  for (int i = 0; i < 16; i += 2) {
    part[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    part[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(part[i + j], part[i + j + 2]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(part[i + j], part[i + j + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    part[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    part[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    part[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    part[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(part[i], part[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(part[i], part[i + 8], 0xdd);
  }
}

inline Words NoWords() { return _mm512_setzero_si512(); }
inline Words Add(Words x, Words y) { return _mm512_add_epi32(x, y); }
inline int32_t Sum(Words x) { return _mm512_reduce_add_epi32(x); }

// As integers floats without their signs are in the same order, and NaN is the largest.
inline Words Magnitudes(Floats x) {
  return _mm512_and_si512((__m512i)x, _mm512_set1_epi32(0x7fffffff));
}

inline Words Max(Words x, Words y) { return _mm512_max_epu32(x, y); }
inline uint32_t Largest(Words x) { return _mm512_reduce_max_epu32(x); }

// To the nearest integer, ties to even.
inline Words Rounded(Floats x) { return _mm512_cvtps_epi32(x); }

// Bytes, of integers that may be too large or too small for them.
inline void StoreBytes(Words x, int8_t* at) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at), _mm512_cvtsepi32_epi8(x));
}

}  // namespace flexjax
