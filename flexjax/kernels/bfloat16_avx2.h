// Products with inputs of bfloat16, and weights that are made so, as floats: AVX2 has no
// others.

#pragma once

#include "bfloat16.h"

namespace flexjax {

struct FloatWidener {
  using Element = float;

  static void Halves(const uint8_t* weights, int64_t count, float* into) {
    for (int64_t i = 0; i < count; i += kLanes) {
      Store(LoadBfloat16(weights + 2 * i), into + i);
    }
  }

  static void Bytes(const uint8_t* codes, int64_t size, const WideGroup& group,
                    float* into) {
    for (int64_t i = 0; i < size; i += kLanes) {
      Store(RoundedToBfloat16(group.Wide(LoadBytes(codes + i))), into + i);
    }
  }

  // A group has 16 values: they are computed once, and looked up by their codes.
  static void Nibbles(const uint8_t* codes, int64_t size, const WideGroup& low,
                      const WideGroup& high, float* into_low, float* into_high) {
    const Floats low_values = RoundedToBfloat16(low.WideNibbles());
    const Floats high_values = RoundedToBfloat16(high.WideNibbles());
    for (int64_t i = 0; i < size; i += kLanes) {
      const Words both = LoadBytes(codes + i);
      Store(LookUp(low_values, both), into_low + i);
      Store(LookUp(high_values, UpperNibbles(both)), into_high + i);
    }
  }
};

template <int kBits>
class Bfloat16 : public WidenedProducts<kBits, FloatWidener> {
 public:
  static constexpr int64_t kWordInputs = 1;
  static constexpr int kStripVectors = 1, kTileSums = 6;

  using WidenedProducts<kBits, FloatWidener>::WidenedProducts;

  // A word is a float. There are always 16, as groups are multiples of 32 inputs.
  static Words WordsOf(const char* x, int64_t) {
    const Floats wide = LoadBfloat16(reinterpret_cast<const uint8_t*>(x));
    return {(__m256i)wide.low, (__m256i)wide.high};
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
};

}  // namespace flexjax
