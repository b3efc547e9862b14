// Vectors of one head as tensors and caches keep them, read as floats.

#pragma once

#include <immintrin.h>

#include <cstdint>

#include "groups.h"

namespace flexjax {

struct Float32 {
  static constexpr int64_t kBytes = 4;
  static __m512 Read(const uint8_t* at) { return _mm512_loadu_ps(at); }
  static void Write(__m512 values, uint8_t* at) { _mm512_storeu_ps(at, values); }
};

struct Float16 {
  static constexpr int64_t kBytes = 2;
  static __m512 Read(const uint8_t* at) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  }
  static void Write(__m512 values, uint8_t* at) {
    const __m256i halves = _mm512_cvtps_ph(values, _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), halves);
  }
};

// A bfloat16 is the upper half of a float.
struct Bfloat16Element {
  static constexpr int64_t kBytes = 2;
  static __m512 Read(const uint8_t* at) {
    return Wide(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)));
  }
  static void Write(__m512 values, uint8_t* at) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), Narrow(values));
  }
  static __m512 Rounded(__m512 values) { return Wide(Narrow(values)); }

 private:
  static __m512 Wide(__m256i halves) {
    const __m512i words = _mm512_cvtepu16_epi32(halves);
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  }
  static __m256i Narrow(__m512 values) { return (__m256i)_mm512_cvtneps_pbh(values); }
};

// What is kept in the type that it has.
template <typename Element>
class Plain {
 public:
  Plain(int64_t, int64_t) {}

  static constexpr bool IsFor(int) { return true; }

  static int64_t RowBytes(int64_t head_dim, int64_t) {
    return head_dim * Element::kBytes;
  }

  template <int kVectors>
  void Read(const uint8_t* row, __m512 (&into)[kVectors]) const {
    for (int v = 0; v < kVectors; ++v) {
      into[v] = Element::Read(row + v * kLanes * Element::kBytes);
    }
  }
};

// What is quantized from bfloat16, in groups of whole registers.
template <int kBits>
class Quantized {
 public:
  Quantized(int64_t head_dim, int64_t group_size)
      : head_dim_(head_dim), num_groups_(head_dim / group_size) {
    for (int64_t at = 0; at < head_dim; at += group_size) begins_ |= 1 << at / kLanes;
    high_group_ = head_dim / 2 / group_size;
  }

  // Halves of 4-bit codes are whole registers.
  static constexpr bool IsFor(int vectors) { return kBits == 8 || vectors % 2 == 0; }

  static int64_t RowBytes(int64_t head_dim, int64_t group_size) {
    return head_dim * kBits / 8 + head_dim / group_size * 4;
  }

  template <int kVectors>
  void Read(const uint8_t* row, __m512 (&into)[kVectors]) const {
    const uint8_t* scales = row + head_dim_ * kBits / 8;
    if constexpr (kBits == 8) {
      WideGroup group(scales, num_groups_);
      for (int v = 0; v < kVectors; ++v) {
        if (v > 0 && BeginsAt(v)) group = WideGroup(scales += 2, num_groups_);
        into[v] = Bfloat16Element::Rounded(group.Wide(Codes(row, v)));
      }
    } else {
      // The 16 values of a group are computed once, and looked up by their codes.
      constexpr int kHalf = kVectors / 2;
      const uint8_t* high_scales = scales + 2 * high_group_;
      __m512 low = Values(scales), high = high_group_ ? Values(high_scales) : low;
      for (int v = 0; v < kHalf; ++v) {
        if (v > 0 && BeginsAt(v)) low = Values(scales += 2);
        if (v > 0 && BeginsAt(kHalf + v)) high = Values(high_scales += 2);
        const __m512i codes = Codes(row, v);  // the lookup minds their lower 4 bits
        into[v] = _mm512_permutexvar_ps(codes, low);
        into[kHalf + v] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), high);
      }
    }
  }

 private:
  bool BeginsAt(int vector) const { return begins_ >> vector & 1; }

  static __m512i Codes(const uint8_t* row, int vector) {
    const uint8_t* at = row + vector * kLanes;
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)));
  }

  __m512 Values(const uint8_t* scale) const {
    return Bfloat16Element::Rounded(WideGroup(scale, num_groups_).WideNibbles());
  }

  const int64_t head_dim_, num_groups_;
  int64_t high_group_;    // with which the second half of a head begins
  uint32_t begins_ = 0;   // a bit for each register of a head with which a group begins
};

}  // namespace flexjax
