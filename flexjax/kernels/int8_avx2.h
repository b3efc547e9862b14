// Products of integers by instructions of AVX2, which add them up in pairs: those with
// codes of 4 bits in 16 bits, those with codes of 8 bits, made 16, in 32.

#pragma once

#include <type_traits>

#include "int8.h"

namespace flexjax {

using Int16s [[gnu::vector_size(32)]] = int16_t;
using Int32s [[gnu::vector_size(32)]] = int32_t;

template <int kBits>
class Int8 : public RoundedProducts<kBits> {
 public:
  static constexpr int64_t kWordInputs = kBits == 4 ? 4 : 2;
  static constexpr int kStripVectors = 1, kTileSums = 6;

  using RoundedProducts<kBits>::RoundedProducts;

  // Of 8 bits there are always 16, as groups are multiples of 32 inputs.
  static Words WordsOf(const char* x, int64_t count) {
    if constexpr (kBits == 4) return LoadWords(x, count);
    const __m256i inputs = LoadWords(x, 8).low;
    return {_mm256_cvtepi8_epi16(_mm256_castsi256_si128(inputs)),
            _mm256_cvtepi8_epi16(_mm256_extracti128_si256(inputs, 1))};
  }

  // Makes a code of one output what it is multiplied as, a byte or two, for `count`
  // positions from `first` on.
  void Unpack(int64_t output, int64_t first, int64_t count, const Panel& into) const {
    const uint8_t* codes = this->Codes(output, first);
    if constexpr (kBits == 4) {
      this->UnpackNibbles(codes, count, reinterpret_cast<uint8_t*>(into.words));
    } else {
      for (int64_t i = 0; i < count; i += kLanes) {
        __m256i* wide = reinterpret_cast<__m256i*>(into.words + i / kWordInputs);
        _mm256_storeu_si256(wide, _mm256_cvtepu8_epi16(LoadEight(codes + i)));
      }
    }
    this->UnpackFactors(output, first, count, into.factors);
  }

  // See `Bfloat16::Tile`. As a part of a larger function GCC would keep sums in memory.
  template <int kVectors, int kOutputs>
  [[gnu::noinline]] void Tile(const Strip& rows, const Panel& panel,
                              int64_t num_words, float* sums, int64_t stride) const {
    const int64_t group_words = this->work_.group_size / kWordInputs;
    const int64_t num_groups = num_words / group_words;
    for (int64_t group = 0; group < num_groups; ++group) {
      Int32s sum[kOutputs][2] = {};
      const int64_t begin = group * group_words;
      for (int64_t word = begin; word < begin + group_words; word += kStepWords) {
        AddProducts(rows.words + kLanes * word, panel.words + word, num_words, sum);
      }
      const float* steps = rows.factors + 2 * kLanes * group;
#pragma GCC unroll 8
      for (int n = 0; n < kOutputs; ++n) {
        const float* factors = panel.factors + 2 * (n * num_groups + group);
        const Words products{(__m256i)sum[n][0], (__m256i)sum[n][1]};
        this->AddGroup(products, factors, steps, steps + kLanes, sums + n * stride);
      }
    }
  }

 private:
  // After so many words, of 2 products each for a number of 16 bits, these must be made
  // 32: 8 * 2 * 15 * 127 is below 2^15.
  static constexpr int kStepWords = kBits == 4 ? 8 : 1;
  using Part = std::conditional_t<kBits == 4, Int16s, Int32s>;

  // Adds to each output's `sum` the products of its words and those of the rows.
  template <int kOutputs>
  static void AddProducts(const int32_t* x, const int32_t* codes, int64_t num_words,
                          Int32s (&sum)[kOutputs][2]) {
    Part part[kOutputs][2];
#pragma GCC unroll 8
    for (int n = 0; n < kOutputs; ++n) {
      part[n][0] = kBits == 4 ? Part{} : (Part)sum[n][0];
      part[n][1] = kBits == 4 ? Part{} : (Part)sum[n][1];
    }
    // Unrolled, GCC would add products to each other first, and keep them in memory.
#pragma GCC unroll 1
    for (int word = 0; word < kStepWords; ++word) {
      const __m256i* inputs = reinterpret_cast<const __m256i*>(x + kLanes * word);
      const __m256i low = _mm256_load_si256(inputs);
      const __m256i high = _mm256_load_si256(inputs + 1);
#pragma GCC unroll 8
      for (int n = 0; n < kOutputs; ++n) {
        const __m256i same = _mm256_set1_epi32(codes[n * num_words + word]);
        part[n][0] += Pairs(same, low);
        part[n][1] += Pairs(same, high);
      }
    }
    const __m256i ones = _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (int n = 0; n < kOutputs; ++n) {
      for (int v = 0; v < 2; ++v) {
        if constexpr (kBits == 4) {
          sum[n][v] += (Int32s)_mm256_madd_epi16((__m256i)part[n][v], ones);
        } else {
          sum[n][v] = part[n][v];
        }
      }
    }
  }

  static Part Pairs(__m256i codes, __m256i x) {
    if constexpr (kBits == 4) return (Part)_mm256_maddubs_epi16(codes, x);
    return (Part)_mm256_madd_epi16(codes, x);
  }
};

}  // namespace flexjax
