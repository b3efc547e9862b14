// Products of inputs rounded to 8 bits with the codes of weights, both as integers.
//
// With an input `step * code` and a weight `scale * code + minimum`, a group adds
// `step * scale * (sum of the codes' products) + minimum * (sum of the inputs)`.
// Integers are summed without error; `MOST_GROUP` in products.py keeps sums in 32 bits.

#pragma once

#include <cstring>

#include "weights.h"

namespace flexjax {

// What sums are declared as: of `__m512i`, which stands for 64-bit integers, GCC would
// keep copies in memory; as it would if loops over them were not unrolled.
using Int32s [[gnu::vector_size(64)]] = int32_t;

template <int kBits>
class Int8 : public Weights<kBits> {
 public:
  static constexpr int64_t kInputBytes = 1;
  static constexpr bool kHasFactors = true;

  using Weights<kBits>::Weights;

  // Gives each code of one output a byte, for `count` positions from `first` on.
  void Unpack(int64_t output, int64_t first, int64_t count, const Panel& into) const {
    const uint8_t* codes = this->Codes(output, first);
    uint8_t* bytes = reinterpret_cast<uint8_t*>(into.words);
    if constexpr (kBits == 8) {
      std::memcpy(bytes, codes, count);
    } else {
      const __m256i lower = _mm256_set1_epi8(15);
      for (int64_t i = 0; i < count; i += sizeof(__m256i)) {
        const __m256i both = Load(codes + i);
        Store(bytes + i, _mm256_and_si256(both, lower));
        Store(bytes + count + i,
              _mm256_and_si256(_mm256_srli_epi16(both, 4), lower));
      }
    }
    float* factors = into.factors;
    for (int64_t half = 0; half < this->kHalves; ++half) {
      const uint8_t* scale = this->Scale(output, first, half);
      for (int64_t at = 0; at < count; at += this->work_.group_size, scale += 2) {
        *factors++ = Float(scale);
        *factors++ = Float(scale + 2 * this->num_groups_);
      }
    }
  }

  // Writes by group the steps of `rows` rows, then the sums of their inputs.
  void PackFactors(int64_t row, int64_t rows, int64_t first, int64_t count,
                   int64_t stride, float* into) const {
    for (int64_t half = 0; half < this->kHalves; ++half) {
      for (int64_t at = 0; at < count; at += this->work_.group_size) {
        const int64_t group = this->Group(first + at, half);
        for (int i = 0; i < 2; ++i, into += stride) {
          const float* from = this->work_.factors + (2 * group + i) * this->work_.rows;
          std::memcpy(into, from + row, rows * sizeof(float));
        }
      }
    }
  }

  // See `Bfloat16::Tile`.
  template <int kVectors, int kOutputs>
  void Tile(const Strip& rows, const Panel& panel, int64_t num_words, float* sums,
            int64_t stride) const {
    const int64_t group_words = this->work_.group_size / kWordBytes;
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
        const __m512 scale = _mm512_set1_ps(factors[0]);
        const __m512 minimum = _mm512_set1_ps(factors[1]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          const int64_t lane = v * kLanes;
          float* at = sums + n * stride + lane;
          const __m512 products = _mm512_mul_ps(_mm512_cvtepi32_ps((__m512i)sum[n][v]),
                                                _mm512_load_ps(steps + lane));
          __m512 all = _mm512_load_ps(at);
          all = _mm512_fmadd_ps(minimum, _mm512_load_ps(totals + lane), all);
          _mm512_store_ps(at, _mm512_fmadd_ps(scale, products, all));
        }
      }
    }
  }

 private:
  static __m256i Load(const uint8_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }

  static void Store(uint8_t* into, __m256i bytes) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(into), bytes);
  }

  // A bfloat16 is the upper half of a float.
  static float Float(const uint8_t* at) {
    const uint32_t bits = LoadHalf(at) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

}  // namespace flexjax
