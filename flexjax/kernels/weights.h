// Quantized weights as they are stored; see `flexjax.quant`.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>

#include "groups.h"

namespace flexjax {

constexpr int64_t kGroupStep = 32;  // see `GROUP_STEP` in products.py

// A product of rows and quantized weights.
struct Work {
  const char* x;          // [rows, inputs]
  const float* factors;   // [groups, 2, rows], of `Int8` alone
  const uint8_t* weight;  // [outputs, row_bytes]
  float* out;             // [rows, outputs]
  int64_t rows, inputs, outputs, row_bytes, group_size;
};

// Some outputs' weights for some inputs: those of each output in words, the inputs of
// the first half before those of the second; and by output and group, what `Int8`
// multiplies and adds.
struct Panel {
  int32_t* words;
  float* factors;
};

// Some rows of x for the same inputs, `[words, rows]`, and by group what `Int8` needs.
struct Strip {
  int32_t* words;
  float* factors;
};

// Weights of `kBits` each; of 16 they are not quantized, and have no scales. A byte of
// 4-bit codes holds one of each half of a row, so inputs go through in stretches of
// positions in all halves at once.
template <int kBits>
class Weights {
 public:
  static constexpr int64_t kHalves = kBits == 4 ? 2 : 1;

  explicit Weights(const Work& work)
      : work_(work),
        half_(work.inputs / kHalves),
        num_groups_(work.inputs / work.group_size) {}

  int64_t half() const { return half_; }

  // Positions of a panel of about so many inputs, in each half.
  int64_t panel_positions(int64_t inputs) const {
    const int64_t groups = inputs / kHalves / work_.group_size;
    return std::max<int64_t>(1, groups) * work_.group_size;
  }

  // Asks for what a panel needs of one output: it is too scattered for the processor to
  // foresee.
  void Ask(int64_t output, int64_t first, int64_t count) const {
    const uint8_t* codes = Codes(output, first);
    const int64_t nbytes = count * kHalves * kBits / 8;
    for (int64_t i = 0; i < nbytes; i += 64) Prefetch(codes + i);
    for (int64_t half = 0; kBits < 16 && half < kHalves; ++half) {
      const uint8_t* scale = Scale(output, first, half);
      Prefetch(scale);
      Prefetch(scale + 2 * num_groups_);
    }
  }

 protected:
  const uint8_t* Row(int64_t output) const {
    return work_.weight + output * work_.row_bytes;
  }

  const uint8_t* Codes(int64_t output, int64_t position) const {
    return Row(output) + position * kHalves * kBits / 8;
  }

  // Of the group at a position of a half, as bfloat16; that of the next group follows,
  // and its minimum is `num_groups_` further on.
  const uint8_t* Scale(int64_t output, int64_t position, int64_t half) const {
    return Row(output) + half_ + 2 * Group(position, half);
  }

  int64_t Group(int64_t position, int64_t half) const {
    return position / work_.group_size + half * num_groups_ / kHalves;
  }

  const Work work_;
  const int64_t half_, num_groups_;
};

}  // namespace flexjax
