// Sixteen floats at a time, in the registers that the source is compiled for; which those
// are does not go by what else a compiler was told it may use.

#pragma once

#ifdef FLEXJAX_AVX2
#include "floats_avx2.h"
#else
#include "floats_avx512.h"
#endif

namespace flexjax {

// e^x of numbers up to 0, within 2 units in the last place; 0 if a float is too large.
inline Floats Exp(Floats x) {
  x = Max(Same(-104.0f), x);  // e^-104 is 0; NaN stays
  const Floats power = ToNearest(x * Same(1.44269504f));
  // ln 2 in two parts, the first with few bits, so that its multiples are exact.
  Floats rest = MultiplyAdd(power, Same(-0.693359375f), x);
  rest = MultiplyAdd(power, Same(2.12194440e-4f), rest);
  // The Taylor series, of at most ln 2 / 2: what is left out is below 6e-9.
  constexpr float kFactors[] = {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6,
                                1.0f / 2,   1.0f,       1.0f};
  Floats sum = Same(1.0f / 5040);
  for (const float factor : kFactors) sum = MultiplyAdd(sum, rest, Same(factor));
  return Scaled(sum, power);
}

}  // namespace flexjax
