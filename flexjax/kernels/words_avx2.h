// Sixteen words in two registers of AVX2.

#pragma once

#include "floats_avx2.h"

namespace flexjax {

// `count` words, 8 or 16; the others are zero.
inline Words LoadWords(const char* at, int64_t count) {
  const __m256i* from = reinterpret_cast<const __m256i*>(at);
  return {_mm256_loadu_si256(from),
          count > 8 ? _mm256_loadu_si256(from + 1) : _mm256_setzero_si256()};
}

// The first `count` of them, any number.
inline void StoreWords(Words words, int64_t count, void* at) {
  __m256i all[] = {words.low, words.high};
  std::memcpy(at, all, count * sizeof(int32_t));
}

// Swaps the axes of 8 x 8 words.
inline void Transpose(__m256i (&rows)[8]) {
  __m256i part[8];
  for (int i = 0; i < 8; i += 2) {
    part[i] = _mm256_unpacklo_epi32(rows[i], rows[i + 1]);
    part[i + 1] = _mm256_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm256_unpacklo_epi64(part[i + j], part[i + j + 2]);
      rows[i + 2 * j + 1] = _mm256_unpackhi_epi64(part[i + j], part[i + j + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    part[i] = _mm256_permute2x128_si256(rows[i], rows[i + 4], 0x20);
    part[i + 4] = _mm256_permute2x128_si256(rows[i], rows[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) rows[i] = part[i];
}

// Swaps the axes of 16 x 16 words.
inline void Transpose(Words (&rows)[kLanes]) {
  __m256i quarters[2][2][8];
  for (int i = 0; i < kLanes; ++i) {
    quarters[0][i / 8][i % 8] = rows[i].low;
    quarters[1][i / 8][i % 8] = rows[i].high;
  }
  for (auto& half : quarters) {
    for (auto& quarter : half) Transpose(quarter);
  }
  for (int i = 0; i < kLanes; ++i) {
    rows[i] = {quarters[i / 8][0][i % 8], quarters[i / 8][1][i % 8]};
  }
}

inline Words NoWords() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }

inline Words Add(Words x, Words y) {
  return {_mm256_add_epi32(x.low, y.low), _mm256_add_epi32(x.high, y.high)};
}

inline int32_t Sum(Words x) {
  uint32_t all[8], sum = 0;  // of what is not finite they may wrap
  const __m256i both = _mm256_add_epi32(x.low, x.high);
  std::memcpy(all, &both, sizeof all);
  for (const uint32_t one : all) sum += one;
  return sum;
}

// As integers floats without their signs are in the same order, and NaN is the largest.
inline Words Magnitudes(Floats x) {
  const __m256i most = _mm256_set1_epi32(0x7fffffff);
  return {_mm256_and_si256((__m256i)x.low, most),
          _mm256_and_si256((__m256i)x.high, most)};
}

inline Words Max(Words x, Words y) {
  return {_mm256_max_epu32(x.low, y.low), _mm256_max_epu32(x.high, y.high)};
}

inline uint32_t Largest(Words x) {
  uint32_t all[8], most = 0;
  const __m256i both = _mm256_max_epu32(x.low, x.high);
  std::memcpy(all, &both, sizeof all);
  for (const uint32_t one : all) most = one > most ? one : most;
  return most;
}

// To the nearest integer, ties to even.
inline Words Rounded(Floats x) {
  return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)};
}

// Bytes, of integers that may be too large or too small for them.
inline void StoreBytes(Words x, int8_t* at) {
  const __m256i mixed = _mm256_packs_epi32(x.low, x.high);
  const __m256i halves = _mm256_permute4x64_epi64(mixed, 0xd8);
  const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(halves),
                                        _mm256_extracti128_si256(halves, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(at), bytes);
}

}  // namespace flexjax
