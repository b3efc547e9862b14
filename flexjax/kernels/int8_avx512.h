// Products of integers by the instruction that AVX-512 has for them, VNNI: four of codes
// with inputs, which it adds up in 32 bits.

#pragma once

#include "int8.h"

namespace flexjax {

// What sums are declared as: of `__m512i`, which stands for 64-bit integers, GCC would
// keep copies in memory; as it would if loops over them were not unrolled.
using Int32s [[gnu::vector_size(64)]] = int32_t;

template <int kBits>
class Int8 : public RoundedProducts<kBits> {
 public:
  static constexpr int64_t kWordInputs = 4;
  static constexpr int kStripVectors = 4, kTileSums = 24;

  using RoundedProducts<kBits>::RoundedProducts;

  static Words WordsOf(const char* x, int64_t count) { return LoadWords(x, count); }

  // Gives each code of one output a byte, for `count` positions from `first` on.
  void Unpack(int64_t output, int64_t first, int64_t count, const Panel& into) const {
    const uint8_t* codes = this->Codes(output, first);
    uint8_t* bytes = reinterpret_cast<uint8_t*>(into.words);
    if constexpr (kBits == 8) {
      std::memcpy(bytes, codes, count);
    } else {
      this->UnpackNibbles(codes, count, bytes);
    }
    this->UnpackFactors(output, first, count, into.factors);
  }

  // See `Bfloat16::Tile`.
  template <int kVectors, int kOutputs>
  void Tile(const Strip& rows, const Panel& panel, int64_t num_words, float* sums,
            int64_t stride) const {
    const int64_t group_words = this->work_.group_size / kWordInputs;
    const int64_t num_groups = num_words / group_words;
    for (int64_t group = 0; group < num_groups; ++group) {
      Int32s sum[kOutputs][kVectors];
#pragma GCC unroll 16
      for (int n = 0; n < kOutputs; ++n) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sum[n][v] = Int32s{};
      }
      const int64_t begin = group * group_words;
      for (int64_t word = begin; word < begin + group_words; ++word) {
        __m512i x[kVectors];
        for (int v = 0; v < kVectors; ++v) {
          x[v] = _mm512_load_si512(rows.words + kLanes * (word * kVectors + v));
        }
        for (int n = 0; n < kOutputs; ++n) {
          const __m512i codes = _mm512_set1_epi32(panel.words[n * num_words + word]);
          for (int v = 0; v < kVectors; ++v) {
            sum[n][v] =
                (Int32s)_mm512_dpbusd_epi32((__m512i)sum[n][v], codes, x[v]);
          }
        }
      }
      const float* steps = rows.factors + 2 * kLanes * kVectors * group;
      const float* totals = steps + kLanes * kVectors;
#pragma GCC unroll 16
      for (int n = 0; n < kOutputs; ++n) {
        const float* factors = panel.factors + 2 * (n * num_groups + group);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const int64_t lane = v * kLanes;
          this->AddGroup((__m512i)sum[n][v], factors, steps + lane, totals + lane,
                         sums + n * stride + lane);
        }
      }
    }
  }
};

}  // namespace flexjax
