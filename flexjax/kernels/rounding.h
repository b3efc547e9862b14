// Rows of bfloat16 rounded to 8 bits: see `flexjax.kernels.products.round_rows`.

#pragma once

#include <cfloat>
#include <cstdint>

#include "words.h"

namespace flexjax {

// `[rows, inputs]` and what becomes of them.
struct Rounding {
  const uint8_t* x;
  int8_t* codes;
  float* factors;  // [groups, 2, rows]: by group the steps, then the sums of inputs
  int64_t rows, inputs, group_size;
};

inline void RoundRow(const Rounding& work, int64_t row) {
  const int64_t size = work.group_size;
  const uint8_t* x = work.x + 2 * row * work.inputs;
  int8_t* codes = work.codes + row * work.inputs;
  float* factors = work.factors + row;
  for (int64_t at = 0; at < work.inputs; at += size, factors += 2 * work.rows) {
    Words most = NoWords();
    for (int64_t i = at; i < at + size; i += kLanes) {
      most = Max(most, Magnitudes(LoadBfloat16(x + 2 * i)));
    }
    const uint32_t bits = Largest(most);
    float step;
    static_assert(sizeof step == sizeof bits);
    __builtin_memcpy(&step, &bits, sizeof step);
    step /= 127;
    if (step < FLT_MIN) step = 0;  // too small to divide by
    const Floats divisor = Same(step == 0 ? FLT_MAX : step);
    Words sum = NoWords();
    for (int64_t i = at; i < at + size; i += kLanes) {
      const Words code = Rounded(LoadBfloat16(x + 2 * i) / divisor);
      sum = Add(sum, code);
      StoreBytes(code, codes + i);
    }
    factors[0] = step;
    factors[work.rows] = step * static_cast<float>(Sum(sum));
  }
}

}  // namespace flexjax
