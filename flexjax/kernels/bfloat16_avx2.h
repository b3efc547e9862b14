// Products with inputs of bfloat16, and weights that are made so, as floats: AVX2 has no
// others.

#pragma once

#include "weights.h"
#include "words.h"

namespace flexjax {

template <int kBits>
class Bfloat16 : public Weights<kBits> {
 public:
  static constexpr int64_t kInputBytes = 2, kWordInputs = 1;
  static constexpr bool kHasFactors = false;
  static constexpr int kStripVectors = 1, kTileSums = 6;

  using Weights<kBits>::Weights;

  // A word is a float.
  static Words WordsOf(const char* x, int64_t) {
    const Floats wide = LoadBfloat16(reinterpret_cast<const uint8_t*>(x));
    return {(__m256i)wide.low, (__m256i)wide.high};
  }

  // Makes `count` positions from `first` on of one output bfloat16.
  void Unpack(int64_t output, int64_t first, int64_t count, const Panel& into) const {
    const int64_t group_size = this->work_.group_size, num_groups = this->num_groups_;
    const uint8_t* codes = this->Codes(output, first);
    const uint8_t* scale = this->Scale(output, first, 0);
    const int64_t other_half = this->Scale(output, first, 1) - scale;
    float* wide = reinterpret_cast<float*>(into.words);
    for (int64_t at = 0; at < count; at += group_size, scale += 2) {
      const WideGroup low(scale, num_groups);
      if constexpr (kBits == 8) {
        for (int64_t i = at; i < at + group_size; i += kLanes) {
          Store(RoundedToBfloat16(low.Wide(LoadBytes(codes + i))), wide + i);
        }
      } else {
        const WideGroup high(scale + other_half, num_groups);
        WidenNibbles(codes + at, low, high, wide + at, wide + count + at);
      }
    }
  }

  // Adds to `sums`, `[outputs, rows]`, the products of a panel's first outputs, of
  // `num_words` each, and 16 rows. As a part of a larger function GCC would keep sums
  // in memory.
  template <int kVectors, int kOutputs>
  [[gnu::noinline]] void Tile(const Strip& rows, const Panel& panel,
                              int64_t num_words, float* sums, int64_t stride) const {
    const float* x = reinterpret_cast<const float*>(rows.words);
    const float* weights = reinterpret_cast<const float*>(panel.words);
    Floats sum[kOutputs];
#pragma GCC unroll 16
    for (int n = 0; n < kOutputs; ++n) sum[n] = Load(sums + n * stride);
    for (int64_t word = 0; word < num_words; ++word) {
      const Floats inputs = Load(x + kLanes * word);
#pragma GCC unroll 16
      for (int n = 0; n < kOutputs; ++n) {
        sum[n] = MultiplyAdd(inputs, Same(weights[n * num_words + word]), sum[n]);
      }
    }
#pragma GCC unroll 16
    for (int n = 0; n < kOutputs; ++n) Store(sum[n], sums + n * stride);
  }

 private:
  // A group has 16 values: they are computed once, and looked up by their codes.
  void WidenNibbles(const uint8_t* codes, const WideGroup& low, const WideGroup& high,
                    float* into_low, float* into_high) const {
    const Floats low_values = RoundedToBfloat16(low.WideNibbles());
    const Floats high_values = RoundedToBfloat16(high.WideNibbles());
    for (int64_t i = 0; i < this->work_.group_size; i += kLanes) {
      const Words both = LoadBytes(codes + i);
      Store(LookUp(low_values, both), into_low + i);
      Store(LookUp(high_values, UpperNibbles(both)), into_high + i);
    }
  }
};

}  // namespace flexjax
