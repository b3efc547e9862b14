// Sixteen floats in two registers of AVX2.

#pragma once

#include <immintrin.h>

#include "lanes.h"

namespace flexjax {

struct Floats {
  __m256 low, high;
};

struct Words {
  __m256i low, high;  // 8 of 32 bits each
};

inline Floats operator+(Floats x, Floats y) { return {x.low + y.low, x.high + y.high}; }
inline Floats operator-(Floats x, Floats y) { return {x.low - y.low, x.high - y.high}; }
inline Floats operator*(Floats x, Floats y) { return {x.low * y.low, x.high * y.high}; }
inline Floats operator/(Floats x, Floats y) { return {x.low / y.low, x.high / y.high}; }

inline Floats Same(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }

inline Floats Load(const float* at) {
  return {_mm256_loadu_ps(at), _mm256_loadu_ps(at + 8)};
}

inline void Store(Floats x, float* at) {
  _mm256_storeu_ps(at, x.low);
  _mm256_storeu_ps(at + 8, x.high);
}

// `x * y + z`, rounded once.
inline Floats MultiplyAdd(Floats x, Floats y, Floats z) {
  return {_mm256_fmadd_ps(x.low, y.low, z.low),
          _mm256_fmadd_ps(x.high, y.high, z.high)};
}

// The second where either is NaN.
inline Floats Max(Floats x, Floats y) {
  return {_mm256_max_ps(x.low, y.low), _mm256_max_ps(x.high, y.high)};
}

// The sums of each of 8 registers, in one.
inline __m256 SumEight(const __m256 (&rows)[8]) {
  __m256 four[2];
  for (int i = 0; i < 2; ++i) {
    four[i] = _mm256_hadd_ps(_mm256_hadd_ps(rows[4 * i], rows[4 * i + 1]),
                             _mm256_hadd_ps(rows[4 * i + 2], rows[4 * i + 3]));
  }
  // Each has in either half the sums there of 4 rows.
  return _mm256_permute2f128_ps(four[0], four[1], 0x20) +
         _mm256_permute2f128_ps(four[0], four[1], 0x31);
}

// The sum of each of 16, in one.
inline Floats SumEach(const Floats (&rows)[kLanes]) {
  __m256 halves[2][8];
  for (int i = 0; i < kLanes; ++i) halves[i / 8][i % 8] = rows[i].low + rows[i].high;
  return {SumEight(halves[0]), SumEight(halves[1])};
}

inline float First(Floats x) { return _mm256_cvtss_f32(x.low); }

inline float Sum(Floats x) {
  const __m256 both = x.low + x.high;
  __m128 sum = _mm256_castps256_ps128(both) + _mm256_extractf128_ps(both, 1);
  sum = _mm_hadd_ps(sum, sum);
  return _mm_cvtss_f32(_mm_hadd_ps(sum, sum));
}

inline float Largest(Floats x) {
  const __m256 both = _mm256_max_ps(x.low, x.high);
  const __m128 low = _mm256_castps256_ps128(both);
  __m128 most = _mm_max_ps(low, _mm256_extractf128_ps(both, 1));
  most = _mm_max_ps(most, _mm_movehl_ps(most, most));
  return _mm_cvtss_f32(_mm_max_ss(most, _mm_movehdup_ps(most)));
}

inline Floats ToNearest(Floats x) {
  return {_mm256_round_ps(x.low, 0), _mm256_round_ps(x.high, 0)};
}

inline __m256 PowerOf2(__m256i exponent) {
  const __m256i biased = _mm256_add_epi32(exponent, _mm256_set1_epi32(127));
  return (__m256)_mm256_slli_epi32(biased, 23);
}

// `x * 2^power`, of whole powers from -252 to 254. In two steps, since 2^-127 and less
// are no normal floats: the first is exact, so only the second rounds.
inline __m256 Scaled(__m256 x, __m256 power) {
  const __m256i whole = _mm256_cvtps_epi32(power);
  const __m256i half = _mm256_srai_epi32(whole, 1);
  return x * PowerOf2(half) * PowerOf2(_mm256_sub_epi32(whole, half));
}

inline Floats Scaled(Floats x, Floats power) {
  return {Scaled(x.low, power.low), Scaled(x.high, power.high)};
}

inline __m128i LoadEight(const uint8_t* at) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
}

inline Floats LoadFloat16(const uint8_t* at) {
  return {_mm256_cvtph_ps(LoadEight(at)), _mm256_cvtph_ps(LoadEight(at + 16))};
}

inline void StoreFloat16(Floats x, uint8_t* at) {
  __m128i* into = reinterpret_cast<__m128i*>(at);
  _mm_storeu_si128(into, _mm256_cvtps_ph(x.low, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(into + 1, _mm256_cvtps_ph(x.high, _MM_FROUND_TO_NEAREST_INT));
}

// A bfloat16 is the upper half of a float.
inline __m256 Wide(__m128i halves) {
  return (__m256)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16);
}

inline Floats LoadBfloat16(const uint8_t* at) {
  return {Wide(LoadEight(at)), Wide(LoadEight(at + 16))};
}

// To the nearest bfloat16, ties to even. A NaN must have a lower half of zero, or may
// become another number: those that come of bfloat16, or of numbers, have one. Numbers
// too small for a normal float stay, where AVX-512 makes them 0.
inline __m256 RoundedToBfloat16(__m256 x) {
  const __m256i bits = (__m256i)x;
  const __m256i last = _mm256_srli_epi32(bits, 16);
  const __m256i odd = _mm256_and_si256(last, _mm256_set1_epi32(1));
  const __m256i half = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
  const __m256i upper = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return (__m256)_mm256_and_si256(_mm256_add_epi32(bits, half), upper);
}

inline Floats RoundedToBfloat16(Floats x) {
  return {RoundedToBfloat16(x.low), RoundedToBfloat16(x.high)};
}

inline void StoreBfloat16(Floats x, uint8_t* at) {
  const Floats rounded = RoundedToBfloat16(x);
  const __m256i mixed =
      _mm256_packus_epi32(_mm256_srli_epi32((__m256i)rounded.low, 16),
                          _mm256_srli_epi32((__m256i)rounded.high, 16));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(at),
                      _mm256_permute4x64_epi64(mixed, 0xd8));
}

// One bfloat16, 16 times.
inline Floats SameBfloat16(const uint8_t* at) {
  const __m256 same = (__m256)_mm256_set1_epi32(LoadHalf(at) << 16);
  return {same, same};
}

inline Words LoadBytes(const uint8_t* at) {
  const __m128i bytes = LoadEight(at);
  return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
}

inline Floats AsFloats(Words codes) {
  return {_mm256_cvtepi32_ps(codes.low), _mm256_cvtepi32_ps(codes.high)};
}

inline Words UpperNibbles(Words bytes) {
  return {_mm256_srli_epi32(bytes.low, 4), _mm256_srli_epi32(bytes.high, 4)};
}

// The values that the lower 4 bits of codes stand for.
inline __m256 LookUp(Floats values, __m256i codes) {
  const __m256 of_8 = _mm256_permutevar8x32_ps(values.low, codes);
  const __m256 of_16 = _mm256_permutevar8x32_ps(values.high, codes);
  return _mm256_blendv_ps(of_8, of_16, (__m256)_mm256_slli_epi32(codes, 28));
}

inline Floats LookUp(Floats values, Words codes) {
  return {LookUp(values, codes.low), LookUp(values, codes.high)};
}

}  // namespace flexjax
