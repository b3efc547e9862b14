// Products with inputs of bfloat16, and weights that are made so.

#pragma once

#include "weights.h"
#include "words.h"

namespace flexjax {

// What does not depend on the registers. A `Widener` makes codes of a group wide: its
// `Element` is what a weight becomes, a bfloat16, or the float that is equal to it.
template <int kBits, typename Widener>
class WidenedProducts : public Weights<kBits> {
 public:
  static constexpr int64_t kInputBytes = 2;
  static constexpr bool kHasFactors = false;

  using Weights<kBits>::Weights;

  // Makes `count` positions from `first` on of one output wide.
  void Unpack(int64_t output, int64_t first, int64_t count, const Panel& into) const {
    const int64_t group_size = this->work_.group_size, num_groups = this->num_groups_;
    const uint8_t* codes = this->Codes(output, first);
    auto* wide = reinterpret_cast<typename Widener::Element*>(into.words);
    if constexpr (kBits == 16) return Widener::Halves(codes, count, wide);
    const uint8_t* scale = this->Scale(output, first, 0);
    const int64_t other_half = this->Scale(output, first, 1) - scale;
    for (int64_t at = 0; at < count; at += group_size, scale += 2) {
      const WideGroup low(scale, num_groups);
      if constexpr (kBits == 8) {
        Widener::Bytes(codes + at, group_size, low, wide + at);
      } else {
        const WideGroup high(scale + other_half, num_groups);
        Widener::Nibbles(codes + at, group_size, low, high, wide + at,
                         wide + count + at);
      }
    }
  }
};

}  // namespace flexjax

#ifdef FLEXJAX_AVX2
#include "bfloat16_avx2.h"
#else
#include "bfloat16_avx512.h"
#endif
