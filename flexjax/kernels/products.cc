// Products `x @ weight.T` with quantized weights, on processors with AVX-512 and its
// bfloat16 instructions. `flexjax.quant` tells how the weights are kept.
//
// Weights are made wide a panel at a time, some outputs for some inputs, in the level-2
// cache: as bfloat16 they are never in memory. Rows of x lie in the lanes of registers,
// and weights, which are contiguous along what is summed, are broadcast to all lanes two
// inputs at a time. So weights need no rearranging; x does, and is smaller.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
template <ffi::DataType kType>
using Matrix = ffi::BufferR2<kType>;
using bfloat16 = uint16_t;

constexpr int64_t kLanes = 16;         // of a register: floats, or pairs of bfloat16
constexpr int64_t kStripVectors = 4;   // of rows; with a panel's inputs 32 KiB
constexpr int64_t kPanelInputs = 256;  // if groups are no larger
constexpr int64_t kPanelOutputs = 256;
constexpr int64_t kTileSums = 24;         // registers that a tile adds up in
constexpr int64_t kMostTileOutputs = 16;  // see `Strip`
constexpr int64_t kBlockRows = 1024;      // for which sums are kept

inline int64_t Ceil(int64_t value, int64_t step) { return (value + step - 1) / step; }

inline void Prefetch(const uint8_t* at) {
  _mm_prefetch(reinterpret_cast<const char*>(at), _MM_HINT_T1);
}

struct Work {
  const bfloat16* x;  // [rows, inputs]
  const uint8_t* weight;  // [outputs, row_bytes]
  float* out;  // [rows, outputs]
  int64_t rows, inputs, outputs, row_bytes, group_size;
};

// A group's scale and minimum, in all lanes.
class Group {
 public:
  Group(const uint8_t* scale, const uint8_t* minimum)
      : scale_(Float(scale)), minimum_(Float(minimum)) {}

  __m512 Wide(__m512i codes) const {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(codes), scale_, minimum_);
  }

 private:
  static __m512 Float(const uint8_t* at) {
    uint16_t half;
    std::memcpy(&half, at, sizeof half);
    return _mm512_castsi512_ps(_mm512_set1_epi32(uint32_t{half} << 16));
  }

  __m512 scale_, minimum_;
};

// Weights of `kBits` each.
template <int kBits>
class Weights {
 public:
  explicit Weights(const Work& work)
      : work_(work), num_groups_(work.inputs / work.group_size) {}

  int64_t panel_inputs() const {
    return std::max<int64_t>(1, kPanelInputs / work_.group_size) * work_.group_size;
  }

  // Makes inputs from `first` on of one output bfloat16.
  void Widen(int64_t output, int64_t first, int64_t count, bfloat16* into) const {
    const uint8_t* scale = Scale(output, first / work_.group_size);
    for (int64_t at = first; at < first + count; at += work_.group_size) {
      WidenGroup(output, at, Group(scale, scale + 2 * num_groups_), into);
      into += work_.group_size;
      scale += 2;
    }
  }

  // Asks for what `Widen` will read: it is too scattered for the processor to foresee.
  void Ask(int64_t output, int64_t first, int64_t count) const {
    const uint8_t* codes = Codes(output, first);
    for (int64_t i = 0; i < count * kBits / 8; i += 64) Prefetch(codes + i);
    const uint8_t* scale = Scale(output, first / work_.group_size);
    Prefetch(scale);
    Prefetch(scale + 2 * num_groups_);  // the minimum
  }

 private:
  bool IsHigh(int64_t input) const { return kBits == 4 && input >= work_.inputs / 2; }

  const uint8_t* Row(int64_t output) const {
    return work_.weight + output * work_.row_bytes;
  }

  const uint8_t* Codes(int64_t output, int64_t input) const {
    return Row(output) + (IsHigh(input) ? input - work_.inputs / 2 : input);
  }

  const uint8_t* Scale(int64_t output, int64_t group) const {
    return Row(output) + work_.inputs * kBits / 8 + 2 * group;
  }

  void WidenGroup(int64_t output, int64_t at, const Group& group,
                  bfloat16* into) const {
    const uint8_t* codes = Codes(output, at);
    if constexpr (kBits == 8) {
      for (int64_t i = 0; i < work_.group_size; i += 2 * kLanes) {
        const __m128i* from = reinterpret_cast<const __m128i*>(codes + i);
        const __m512i low = _mm512_cvtepu8_epi32(_mm_loadu_si128(from));
        const __m512i high = _mm512_cvtepu8_epi32(_mm_loadu_si128(from + 1));
        const __m512bh wide = _mm512_cvtne2ps_pbh(group.Wide(high), group.Wide(low));
        _mm512_store_si512(into + i, (__m512i)wide);
      }
    } else {
      // A group has 16 values: they are computed once, and looked up by their codes.
      const __m512i all = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3,
                                           2, 1, 0);
      const __m512i values =
          _mm512_castsi256_si512((__m256i)_mm512_cvtneps_pbh(group.Wide(all)));
      const bool is_high = IsHigh(at);
      for (int64_t i = 0; i < work_.group_size; i += 2 * kLanes) {
        const __m256i* from = reinterpret_cast<const __m256i*>(codes + i);
        __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256(from));
        code = is_high ? _mm512_srli_epi16(code, 4)
                       : _mm512_and_si512(code, _mm512_set1_epi16(15));
        _mm512_store_si512(into + i, _mm512_permutexvar_epi16(code, values));
      }
    }
  }

  const Work work_;
  const int64_t num_groups_;
};

// Swaps the axes of 16 x 16 numbers of 32 bits.
inline void Transpose(__m512i (&rows)[kLanes]) {
  __m512i part[kLanes];
  for (int i = 0; i < 16; i += 2) {
    part[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    part[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    for (int j = 0; j < 2; ++j) {
      rows[i + 2 * j] = _mm512_unpacklo_epi64(part[i + j], part[i + j + 2]);
      rows[i + 2 * j + 1] = _mm512_unpackhi_epi64(part[i + j], part[i + j + 2]);
    }
  }
  for (int i = 0; i < 4; ++i) {
    part[i] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    part[i + 4] = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    part[i + 8] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    part[i + 12] = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    rows[i] = _mm512_shuffle_i32x4(part[i], part[i + 8], 0x88);
    rows[i + 8] = _mm512_shuffle_i32x4(part[i], part[i + 8], 0xdd);
  }
}

// Writes a strip's inputs as `[pairs, rows]`; lanes without a row are zero.
inline void Pack(const Work& work, int64_t row, int64_t row_end, int64_t first,
                 int64_t count, bfloat16* into) {
  const int64_t vectors = Ceil(row_end - row, kLanes);
  for (int64_t v = 0; v < vectors; ++v) {
    for (int64_t k = 0; k < count; k += 2 * kLanes) {
      __m512i tile[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t m = row + v * kLanes + i;
        tile[i] = m < row_end
                      ? _mm512_loadu_si512(work.x + m * work.inputs + first + k)
                      : _mm512_setzero_si512();
      }
      Transpose(tile);
      for (int64_t i = 0; i < kLanes; ++i) {
        bfloat16* pair = into + 2 * kLanes * vectors * (k / 2 + i);
        _mm512_store_si512(pair + 2 * kLanes * v, tile[i]);
      }
    }
  }
}

// Adds to `sums`, `[outputs, rows]`, the products of a panel's first outputs,
// `[outputs, inputs]`, and `kVectors` times 16 rows, `[pairs, rows]`.
template <int kVectors, int kOutputs>
void Tile(const bfloat16* x, const bfloat16* panel, int64_t count, float* sums,
          int64_t stride) {
  __m512 sum[kOutputs][kVectors];
  for (int n = 0; n < kOutputs; ++n) {
    for (int v = 0; v < kVectors; ++v) {
      sum[n][v] = _mm512_load_ps(sums + n * stride + v * kLanes);
    }
  }
  for (int64_t pair = 0; pair < count / 2; ++pair) {
    __m512bh rows[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      rows[v] = (__m512bh)_mm512_load_si512(x + 2 * kLanes * (pair * kVectors + v));
    }
    for (int n = 0; n < kOutputs; ++n) {
      int32_t both;
      std::memcpy(&both, panel + n * count + 2 * pair, sizeof both);
      const __m512bh weight = (__m512bh)_mm512_set1_epi32(both);
      for (int v = 0; v < kVectors; ++v) {
        sum[n][v] = _mm512_dpbf16_ps(sum[n][v], rows[v], weight);
      }
    }
  }
  for (int n = 0; n < kOutputs; ++n) {
    for (int v = 0; v < kVectors; ++v) {
      _mm512_store_ps(sums + n * stride + v * kLanes, sum[n][v]);
    }
  }
}

// The same for all `outputs` of a panel; calls `before_tile` with those of each tile.
template <int kVectors, typename BeforeTile>
void Strip(const bfloat16* x, const bfloat16* panel, int64_t count, int64_t outputs,
           float* sums, int64_t stride, const BeforeTile& before_tile) {
  constexpr int kOutputs = std::min(kTileSums / kVectors, kMostTileOutputs);
  for (int64_t n = 0; n < outputs; n += kOutputs) {
    before_tile(n, std::min(outputs, n + kOutputs));
    Tile<kVectors, kOutputs>(x, panel + n * count, count, sums + n * stride, stride);
  }
}

template <typename... Args>
void StripOf(int64_t vectors, const Args&... args) {
  switch (vectors) {
    case 1: return Strip<1>(args...);
    case 2: return Strip<2>(args...);
    case 3: return Strip<3>(args...);
    default: return Strip<kStripVectors>(args...);
  }
}

// Writes `sums`, `[outputs, rows]`, to where they belong.
inline void Store(const Work& work, const float* sums, int64_t stride, int64_t row,
                  int64_t row_end, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += kLanes) {
    const __mmask16 there = (1u << std::min(kLanes, end - n)) - 1;
    for (int64_t m = row; m < row_end; m += kLanes) {
      __m512i tile[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        tile[i] = _mm512_load_si512(sums + (n - begin + i) * stride + m - row);
      }
      Transpose(tile);
      for (int64_t i = 0; i < std::min(kLanes, row_end - m); ++i) {
        float* out = work.out + (m + i) * work.outputs + n;
        _mm512_mask_storeu_epi32(out, there, tile[i]);
      }
    }
  }
}

// What a thread works in, kept from call to call.
class Memory {
 public:
  void Reset(int64_t nbytes) {
    if (nbytes > size_) {
      memory_.reset(static_cast<char*>(std::aligned_alloc(64, 64 * Ceil(nbytes, 64))));
      size_ = memory_ ? nbytes : 0;
    }
    next_ = memory_.get();
  }

  bool is_there() const { return next_ != nullptr; }

  template <typename T>
  T* Take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += 64 * Ceil(count * sizeof(T), 64);
    return taken;
  }

 private:
  std::unique_ptr<char, decltype(&std::free)> memory_{nullptr, &std::free};
  int64_t size_ = 0;
  char* next_ = nullptr;
};

// Rows from `row` to `row_end` times the weights of the outputs from `begin` to `end`;
// false if there is no memory to work in.
template <typename Weights>
bool Block(const Work& work, const Weights& weights, int64_t row, int64_t row_end,
           int64_t begin, int64_t end) {
  thread_local Memory memory;
  const int64_t most = weights.panel_inputs(), strip = kStripVectors * kLanes;
  const int64_t stride = kLanes * Ceil(row_end - row, kLanes);
  const int64_t outputs = end - begin + kMostTileOutputs;  // the last tile's too
  memory.Reset((outputs + strip) * most * sizeof(bfloat16) +
               outputs * stride * sizeof(float) + 3 * 64);
  if (!memory.is_there()) return false;
  bfloat16* panel = memory.Take<bfloat16>(outputs * most);
  bfloat16* x = memory.Take<bfloat16>(strip * most);
  float* sums = memory.Take<float>(outputs * stride);
  std::memset(sums, 0, outputs * stride * sizeof(float));
  for (int64_t first = 0; first < work.inputs; first += most) {
    const int64_t count = std::min(most, work.inputs - first);
    const int64_t next = first + count, next_count = std::min(most, work.inputs - next);
    for (int64_t n = begin; n < end; ++n) {
      weights.Widen(n, first, count, panel + (n - begin) * count);
    }
    for (int64_t m = row; m < row_end; m += strip) {
      const int64_t m_end = std::min(row_end, m + strip);
      Pack(work, m, m_end, first, count, x);
      const auto ask_ahead = [&](int64_t tile, int64_t tile_end) {
        if (m > row || next_count == 0) return;
        for (int64_t n = tile; n < tile_end; ++n) {
          weights.Ask(begin + n, next, next_count);
        }
      };
      StripOf(Ceil(m_end - m, kLanes), x, panel, count, end - begin, sums + m - row,
              stride, ask_ahead);
    }
  }
  Store(work, sums, stride, row, row_end, begin, end);
  return true;
}

// A product in shares of some outputs, which threads take one after the other.
template <typename Weights>
class Shares {
 public:
  Shares(const Work& work, int64_t num_threads)
      : work_(work),
        weights_(work),
        count_(num_threads * Ceil(work.outputs, kPanelOutputs * num_threads)),
        size_(Ceil(work.outputs, count_)) {}

  int64_t count() const { return count_; }

  void Take() {
    for (int64_t index; (index = taken_.fetch_add(1)) < count_;) {
      const int64_t begin = std::min(work_.outputs, index * size_);
      const int64_t end = std::min(work_.outputs, begin + size_);
      for (int64_t row = 0; row < work_.rows && begin < end; row += kBlockRows) {
        const int64_t row_end = std::min(work_.rows, row + kBlockRows);
        if (!Block(work_, weights_, row, row_end, begin, end)) has_failed_ = true;
      }
      if (done_.fetch_add(1) + 1 == count_) done_.notify_all();
    }
  }

  // Waits until all are done; whether all are well.
  bool Wait() {
    for (int64_t done; (done = done_.load()) < count_;) done_.wait(done);
    return !has_failed_;
  }

 private:
  const Work work_;
  const Weights weights_;
  const int64_t count_, size_;
  std::atomic<int64_t> taken_ = 0, done_ = 0;
  std::atomic<bool> has_failed_ = false;
};

// Threads of XLA's pool help the one that calls, which takes shares too: so it never
// waits for a thread that has not begun.
template <typename Weights>
ffi::Error Run(ffi::ThreadPool pool, const Work& work) {
  const int64_t num_threads = std::max<int64_t>(1, pool.num_threads());
  auto shares = std::make_shared<Shares<Weights>>(work, num_threads);
  for (int64_t i = 1; i < num_threads; ++i) {
    pool.Schedule([shares] { shares->Take(); });
  }
  shares->Take();
  if (!shares->Wait()) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "no memory for a product with quantized weights");
  }
  return ffi::Error::Success();
}

ffi::Error ContractQuantized(ffi::ThreadPool pool, Matrix<ffi::BF16> x,
                             Matrix<ffi::U8> weight,
                             ffi::Result<Matrix<ffi::F32>> out, int64_t bits,
                             int64_t group_size) {
  const Work work{static_cast<const bfloat16*>(x.untyped_data()),
                  static_cast<const uint8_t*>(weight.untyped_data()),
                  static_cast<float*>(out->untyped_data()),
                  x.dimensions()[0],
                  x.dimensions()[1],
                  weight.dimensions()[0],
                  weight.dimensions()[1],
                  group_size};
  return bits == 4 ? Run<Weights<4>>(pool, work) : Run<Weights<8>>(pool, work);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(flexjax_contract_quantized, ContractQuantized,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrix<ffi::BF16>>()
                                  .Arg<Matrix<ffi::U8>>()
                                  .Ret<Matrix<ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size"));
