// Quantized weights, and how some of them are made wide; see `flexjax.quant`.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace flexjax {

using bfloat16 = uint16_t;

constexpr int64_t kLanes = 16;         // of a register: floats, or pairs of bfloat16
constexpr int64_t kPanelInputs = 256;  // if groups are no larger

// A product of rows and quantized weights.
struct Work {
  const bfloat16* x;      // [rows, inputs]
  const uint8_t* weight;  // [outputs, row_bytes]
  float* out;             // [rows, outputs]
  int64_t rows, inputs, outputs, row_bytes, group_size;
};

// A group's scale and minimum, in all lanes.
class Group {
 public:
  Group(const uint8_t* scale, int64_t num_groups)
      : scale_(Float(scale)), minimum_(Float(scale + 2 * num_groups)) {}

  __m512 Wide(__m512i codes) const {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), scale_, minimum_);
  }

  // What the 16 codes of 4 bits stand for, twice: so whatever is above the lower 4 bits
  // of a code changes nothing when it is looked up.
  __m512i Values() const {
    const __m512i codes =
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512 values = Wide(codes);
    return (__m512i)_mm512_cvtne2ps_pbh(values, values);
  }

 private:
  // A bfloat16 is the upper half of a float.
  static __m512 Float(const uint8_t* at) {
    constexpr __mmask32 kUpper = 0xaaaaaaaa;
    const __m128i half = _mm_loadu_si16(at);
    return _mm512_castsi512_ps(_mm512_maskz_broadcastw_epi16(kUpper, half));
  }

  __m512 scale_, minimum_;
};

// Weights of `kBits` each. A byte of 4-bit codes holds one of each half of a row, so
// inputs go through in stretches of positions in all halves at once.
template <int kBits>
class Weights {
 public:
  static constexpr int64_t kHalves = 8 / kBits;

  explicit Weights(const Work& work)
      : work_(work),
        half_(work.inputs / kHalves),
        num_groups_(work.inputs / work.group_size) {}

  int64_t half() const { return half_; }

  // Positions of a panel, in each half.
  int64_t panel_positions() const {
    const int64_t groups = kPanelInputs / kHalves / work_.group_size;
    return std::max<int64_t>(1, groups) * work_.group_size;
  }

  // Makes `count` positions from `first` on of one output bfloat16: those of the first
  // half, then those of the second.
  void Widen(int64_t output, int64_t first, int64_t count, bfloat16* into) const {
    const uint8_t* codes = Row(output) + first;
    const uint8_t* scale = Scale(output, first);
    for (int64_t at = 0; at < count; at += work_.group_size) {
      if constexpr (kBits == 8) {
        WidenBytes(codes + at, Group(scale, num_groups_), into + at);
      } else {
        const Group low(scale, num_groups_), high(scale + num_groups_, num_groups_);
        WidenNibbles(codes + at, low, high, into + at, into + count + at);
      }
      scale += 2;
    }
  }

  // Asks for what `Widen` will read: it is too scattered for the processor to foresee.
  void Ask(int64_t output, int64_t first, int64_t count) const {
    const uint8_t* codes = Row(output) + first;
    for (int64_t i = 0; i < count; i += 64) Prefetch(codes + i);
    for (int64_t i = 0; i < 2 * kHalves; ++i) {  // scales and minima of each half
      Prefetch(Scale(output, first) + i * (2 * num_groups_ / kHalves));
    }
  }

 private:
  // Into the caches. As assembly, since GCC takes a function that does nothing
  // but prefetch for one without effect, and leaves its calls out.
  static void Prefetch(const uint8_t* at) { asm volatile("prefetcht0 %0" : : "m"(*at)); }

  const uint8_t* Row(int64_t output) const {
    return work_.weight + output * work_.row_bytes;
  }

  // Of the group at a position of the first half; scales are followed by minima.
  const uint8_t* Scale(int64_t output, int64_t position) const {
    return Row(output) + half_ + 2 * (position / work_.group_size);
  }

  void WidenBytes(const uint8_t* codes, const Group& group, bfloat16* into) const {
    for (int64_t i = 0; i < work_.group_size; i += 2 * kLanes) {
      const __m128i* from = reinterpret_cast<const __m128i*>(codes + i);
      const __m512i low = _mm512_cvtepu8_epi32(_mm_loadu_si128(from));
      const __m512i high = _mm512_cvtepu8_epi32(_mm_loadu_si128(from + 1));
      const __m512bh wide = _mm512_cvtne2ps_pbh(group.Wide(high), group.Wide(low));
      _mm512_store_si512(into + i, (__m512i)wide);
    }
  }

  // A group has 16 values: they are computed once, and looked up by their codes.
  void WidenNibbles(const uint8_t* codes, const Group& low, const Group& high,
                    bfloat16* into_low, bfloat16* into_high) const {
    const __m512i low_values = low.Values(), high_values = high.Values();
    for (int64_t i = 0; i < work_.group_size; i += 2 * kLanes) {
      const __m256i* from = reinterpret_cast<const __m256i*>(codes + i);
      const __m512i both = _mm512_cvtepu8_epi16(_mm256_loadu_si256(from));
      const __m512i second = _mm512_srli_epi16(both, 4);
      _mm512_store_si512(into_low + i, _mm512_permutexvar_epi16(both, low_values));
      _mm512_store_si512(into_high + i, _mm512_permutexvar_epi16(second, high_values));
    }
  }

  const Work work_;
  const int64_t half_, num_groups_;
};

}  // namespace flexjax
