// Products of inputs rounded to 8 bits with the codes of weights, both as integers.
//
// With an input `step * code` and a weight `scale * code + minimum`, a group adds
// `step * scale * (sum of the codes' products) + minimum * (sum of the inputs)`.
// Integers are summed without error; `MOST_GROUP` in products.py keeps sums in 32 bits.

#pragma once

#include <cstring>

#include "weights.h"
#include "words.h"

namespace flexjax {

// What does not depend on the registers.
template <int kBits>
class RoundedProducts : public Weights<kBits> {
 public:
  static constexpr int64_t kInputBytes = 1;
  static constexpr bool kHasFactors = true;

  using Weights<kBits>::Weights;

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

 protected:
  // Writes by group the scale and the minimum of one output.
  void UnpackFactors(int64_t output, int64_t first, int64_t count, float* into) const {
    for (int64_t half = 0; half < this->kHalves; ++half) {
      const uint8_t* scale = this->Scale(output, first, half);
      for (int64_t at = 0; at < count; at += this->work_.group_size, scale += 2) {
        *into++ = Float(scale);
        *into++ = Float(scale + 2 * this->num_groups_);
      }
    }
  }

  // Gives each of `count` codes of 4 bits a byte, those of each half together.
  static void UnpackNibbles(const uint8_t* codes, int64_t count, uint8_t* bytes) {
    const __m256i lower = _mm256_set1_epi8(15);
    for (int64_t i = 0; i < count; i += sizeof(__m256i)) {
      const __m256i* from = reinterpret_cast<const __m256i*>(codes + i);
      __m256i* into = reinterpret_cast<__m256i*>(bytes + i);
      __m256i* into_high = reinterpret_cast<__m256i*>(bytes + count + i);
      const __m256i both = _mm256_loadu_si256(from);
      _mm256_storeu_si256(into, _mm256_and_si256(both, lower));
      _mm256_storeu_si256(into_high,
                          _mm256_and_si256(_mm256_srli_epi16(both, 4), lower));
    }
  }

  // Adds a group's part to sums of 16 rows, of one output with these factors: `steps`
  // has the rows', and `totals` the sums of their inputs.
  static void AddGroup(Words products, const float* factors, const float* steps,
                       const float* totals, float* sums) {
    const Floats lower = MultiplyAdd(Same(factors[1]), Load(totals), Load(sums));
    const Floats scaled = AsFloats(products) * Load(steps);
    Store(MultiplyAdd(Same(factors[0]), scaled, lower), sums);
  }

 private:
  // A bfloat16 is the upper half of a float.
  static float Float(const uint8_t* at) {
    const uint32_t bits = LoadHalf(at) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }
};

}  // namespace flexjax

#ifdef FLEXJAX_AVX2
#include "int8_avx2.h"
#else
#include "int8_avx512.h"
#endif
