// Products with inputs of bfloat16, and weights that are made so, by the instruction that
// AVX-512 has for pairs of them.

#pragma once

#include "bfloat16.h"

namespace flexjax {

using bfloat16 = uint16_t;

struct Bfloat16Widener {
  using Element = bfloat16;

  static void Halves(const uint8_t* weights, int64_t count, bfloat16* into) {
    std::memcpy(into, weights, count * sizeof(bfloat16));
  }

  static void Bytes(const uint8_t* codes, int64_t size, const WideGroup& group,
                    bfloat16* into) {
    for (int64_t i = 0; i < size; i += 2 * kLanes) {
      const __m128i* from = reinterpret_cast<const __m128i*>(codes + i);
      const __m512i low = _mm512_cvtepu8_epi32(_mm_loadu_si128(from));
      const __m512i high = _mm512_cvtepu8_epi32(_mm_loadu_si128(from + 1));
      const __m512bh wide = _mm512_cvtne2ps_pbh(group.Wide(high), group.Wide(low));
      _mm512_store_si512(into + i, (__m512i)wide);
    }
  }

  // A group has 16 values: they are computed once, and looked up by their codes.
  static void Nibbles(const uint8_t* codes, int64_t size, const WideGroup& low,
                      const WideGroup& high, bfloat16* into_low, bfloat16* into_high) {
    const __m512i low_values = Values(low), high_values = Values(high);
    for (int64_t i = 0; i < size; i += 2 * kLanes) {
      const __m256i* from = reinterpret_cast<const __m256i*>(codes + i);
      const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256(from));
      const __m512i second = _mm512_srli_epi16(both, 4);
      _mm512_store_si512(into_low + i, _mm512_permutexvar_epi16(both, low_values));
      _mm512_store_si512(into_high + i, _mm512_permutexvar_epi16(second, high_values));
    }
  }

  // What the 16 codes of 4 bits stand for, twice: so whatever is above the lower 4 bits
  // of a code changes nothing when it is looked up.
  static __m512i Values(const WideGroup& group) {
    const __m512 values = group.WideNibbles();
    return (__m512i)_mm512_cvtne2ps_pbh(values, values);
  }
};

template <int kBits>
class Bfloat16 : public WidenedProducts<kBits, Bfloat16Widener> {
 public:
  static constexpr int64_t kWordInputs = 2;
  static constexpr int kStripVectors = 4, kTileSums = 24;

  using WidenedProducts<kBits, Bfloat16Widener>::WidenedProducts;

  static Words WordsOf(const char* x, int64_t count) { return LoadWords(x, count); }

  // Adds to `sums`, `[outputs, rows]`, the products of a panel's first outputs, of
  // `num_words` each, and `kVectors` times 16 rows.
  template <int kVectors, int kOutputs>
  void Tile(const Strip& rows, const Panel& panel, int64_t num_words, float* sums,
            int64_t stride) const {
    __m512 sum[kOutputs][kVectors];
    for (int n = 0; n < kOutputs; ++n) {
      for (int v = 0; v < kVectors; ++v) {
        sum[n][v] = _mm512_load_ps(sums + n * stride + v * kLanes);
      }
    }
    for (int64_t word = 0; word < num_words; ++word) {
      __m512bh x[kVectors];
      for (int v = 0; v < kVectors; ++v) {
        x[v] = (__m512bh)_mm512_load_si512(rows.words + kLanes * (word * kVectors + v));
      }
      for (int n = 0; n < kOutputs; ++n) {
        const int32_t both = panel.words[n * num_words + word];
        const __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
        for (int v = 0; v < kVectors; ++v) {
          sum[n][v] = _mm512_dpbf16_ps(sum[n][v], x[v], weight);
        }
      }
    }
    for (int n = 0; n < kOutputs; ++n) {
      for (int v = 0; v < kVectors; ++v) {
        _mm512_store_ps(sums + n * stride + v * kLanes, sum[n][v]);
      }
    }
  }
};

}  // namespace flexjax
