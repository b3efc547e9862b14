// Vectors of one head as tensors and caches keep them, read as floats.

#pragma once

#include <cstdint>

#include "floats.h"
#include "groups.h"

namespace flexjax {

struct Float32 {
  static constexpr int64_t kBytes = 4;
  static Floats Read(const uint8_t* at) {
    return Load(reinterpret_cast<const float*>(at));
  }
  static void Write(Floats values, uint8_t* at) {
    Store(values, reinterpret_cast<float*>(at));
  }
};

struct Float16 {
  static constexpr int64_t kBytes = 2;
  static Floats Read(const uint8_t* at) { return LoadFloat16(at); }
  static void Write(Floats values, uint8_t* at) { StoreFloat16(values, at); }
};

struct Bfloat16Element {
  static constexpr int64_t kBytes = 2;
  static Floats Read(const uint8_t* at) { return LoadBfloat16(at); }
  static void Write(Floats values, uint8_t* at) { StoreBfloat16(values, at); }
};

// What is kept in the type that it has.
template <typename Element>
class Plain {
 public:
  Plain(int64_t, int64_t) {}

  static constexpr bool IsFor(int) { return true; }

  static int64_t RowBytes(int64_t head_dim, int64_t) {
    return head_dim * Element::kBytes;
  }

  template <int kVectors>
  void Read(const uint8_t* row, Floats (&into)[kVectors]) const {
    for (int v = 0; v < kVectors; ++v) {
      into[v] = Element::Read(row + v * kLanes * Element::kBytes);
    }
  }
};

// What is quantized from bfloat16, in groups of whole registers.
template <int kBits>
class Quantized {
 public:
  Quantized(int64_t head_dim, int64_t group_size)
      : head_dim_(head_dim), num_groups_(head_dim / group_size) {
    for (int64_t at = 0; at < head_dim; at += group_size) begins_ |= 1 << at / kLanes;
    high_group_ = head_dim / 2 / group_size;
  }

  // Halves of 4-bit codes are whole registers.
  static constexpr bool IsFor(int vectors) { return kBits == 8 || vectors % 2 == 0; }

  static int64_t RowBytes(int64_t head_dim, int64_t group_size) {
    return head_dim * kBits / 8 + head_dim / group_size * 4;
  }

  template <int kVectors>
  void Read(const uint8_t* row, Floats (&into)[kVectors]) const {
    const uint8_t* scales = row + head_dim_ * kBits / 8;
    if constexpr (kBits == 8) {
      WideGroup group(scales, num_groups_);
      for (int v = 0; v < kVectors; ++v) {
        if (v > 0 && BeginsAt(v)) group = WideGroup(scales += 2, num_groups_);
        into[v] = RoundedToBfloat16(group.Wide(LoadBytes(row + v * kLanes)));
      }
    } else {
      // The 16 values of a group are computed once, and looked up by their codes.
      constexpr int kHalf = kVectors / 2;
      const uint8_t* high_scales = scales + 2 * high_group_;
      Floats low = Values(scales), high = high_group_ ? Values(high_scales) : low;
      for (int v = 0; v < kHalf; ++v) {
        if (v > 0 && BeginsAt(v)) low = Values(scales += 2);
        if (v > 0 && BeginsAt(kHalf + v)) high = Values(high_scales += 2);
        const Words codes = LoadBytes(row + v * kLanes);
        into[v] = LookUp(low, codes);
        into[kHalf + v] = LookUp(high, UpperNibbles(codes));
      }
    }
  }

 private:
  bool BeginsAt(int vector) const { return begins_ >> vector & 1; }

  Floats Values(const uint8_t* scale) const {
    return RoundedToBfloat16(WideGroup(scale, num_groups_).WideNibbles());
  }

  const int64_t head_dim_, num_groups_;
  int64_t high_group_;    // with which the second half of a head begins
  uint32_t begins_ = 0;   // a bit for each register of a head with which a group begins
};

}  // namespace flexjax
