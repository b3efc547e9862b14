// Groups of elements that share a scale and a minimum; see `flexjax.quant`.

#pragma once

#include <cstdint>

#include "floats.h"

namespace flexjax {

// A group's scale and minimum, in all lanes.
class WideGroup {
 public:
  WideGroup(const uint8_t* scale, int64_t num_groups)
      : scale_(SameBfloat16(scale)),
        minimum_(SameBfloat16(scale + 2 * num_groups)) {}

  Floats Wide(Words codes) const {
    return MultiplyAdd(AsFloats(codes), scale_, minimum_);
  }

  // What the 16 codes of 4 bits stand for.
  Floats WideNibbles() const {
    constexpr uint8_t kAll[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return Wide(LoadBytes(kAll));
  }

 private:
  Floats scale_, minimum_;
};

}  // namespace flexjax
