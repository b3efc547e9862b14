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

#include "weights.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
template <ffi::DataType kType>
using Matrix = ffi::BufferR2<kType>;
using flexjax::bfloat16;
using flexjax::kLanes;
using flexjax::Work;

constexpr int64_t kStripVectors = 4;  // of rows; with a panel's inputs 32 KiB
constexpr int64_t kPanelOutputs = 256;
constexpr int64_t kTileSums = 24;         // registers that a tile adds up in
constexpr int64_t kMostTileOutputs = 16;  // see `Strip`
constexpr int64_t kBlockRows = 256;       // for which sums are kept, in the level-2 cache

inline int64_t Ceil(int64_t value, int64_t step) { return (value + step - 1) / step; }

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

// Writes inputs of a strip as `[pairs, rows]`, and returns where the next ones belong;
// lanes without a row are zero.
inline bfloat16* Pack(const Work& work, int64_t row, int64_t row_end, int64_t first,
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
  return into + kLanes * vectors * count;
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
// false if there is no memory to work in. `after` is where the next outputs may begin.
template <typename Weights>
bool Block(const Work& work, const Weights& weights, int64_t row, int64_t row_end,
           int64_t begin, int64_t end, int64_t after) {
  thread_local Memory memory;
  const int64_t span = weights.panel_positions(), strip = kStripVectors * kLanes;
  const int64_t most = span * Weights::kHalves;  // inputs of a panel
  const int64_t stride = kLanes * Ceil(row_end - row, kLanes);
  const int64_t outputs = end - begin + kMostTileOutputs;  // the last tile's too
  memory.Reset((outputs + strip) * most * sizeof(bfloat16) +
               outputs * stride * sizeof(float) + 3 * 64);
  if (!memory.is_there()) return false;
  bfloat16* panel = memory.Take<bfloat16>(outputs * most);
  bfloat16* x = memory.Take<bfloat16>(strip * most);
  float* sums = memory.Take<float>(outputs * stride);
  std::memset(sums, 0, outputs * stride * sizeof(float));
  for (int64_t first = 0; first < weights.half(); first += span) {
    const int64_t positions = std::min(span, weights.half() - first);
    const int64_t count = positions * Weights::kHalves, next = first + positions;
    const int64_t next_positions = std::min(span, weights.half() - next);
    for (int64_t n = begin; n < end; ++n) {
      weights.Widen(n, first, positions, panel + (n - begin) * count);
    }
    for (int64_t m = row; m < row_end; m += strip) {
      const int64_t m_end = std::min(row_end, m + strip);
      bfloat16* at = x;
      for (int64_t half = 0; half < Weights::kHalves; ++half) {
        at = Pack(work, m, m_end, half * weights.half() + first, positions, at);
      }
      const auto ask_ahead = [&](int64_t tile, int64_t tile_end) {
        if (m > row) return;
        const bool is_last = next_positions == 0;
        const int64_t from = is_last ? after : begin;
        for (int64_t n = from + tile; n < std::min(work.outputs, from + tile_end); ++n) {
          weights.Ask(n, is_last ? 0 : next, is_last ? span : next_positions);
        }
      };
      StripOf(Ceil(m_end - m, kLanes), x, panel, count, end - begin, sums + m - row,
              stride, ask_ahead);
    }
  }
  Store(work, sums, stride, row, row_end, begin, end);
  return true;
}

// A product in shares, some outputs of a block of rows, which threads take one after
// the other. All outputs of a block come before the next block, so that its rows of x
// stay in the caches: each share reads them anew.
template <typename Weights>
class Shares {
 public:
  Shares(const Work& work, int64_t num_threads)
      : work_(work),
        weights_(work),
        num_threads_(num_threads),
        per_block_(num_threads * Ceil(work.outputs, kPanelOutputs * num_threads)),
        size_(Ceil(work.outputs, per_block_)),
        count_(per_block_ * Ceil(work.rows, kBlockRows)) {}

  int64_t count() const { return count_; }

  void Take() {
    for (int64_t index; (index = taken_.fetch_add(1)) < count_;) {
      const int64_t row = index / per_block_ * kBlockRows;
      const int64_t row_end = std::min(work_.rows, row + kBlockRows);
      const int64_t share = index % per_block_, next = index + num_threads_;
      const int64_t begin = Outputs(share), end = Outputs(share + 1);
      const int64_t after = next < count_ ? Outputs(next % per_block_) : work_.outputs;
      if (begin < end &&
          !Block(work_, weights_, row, row_end, begin, end, after)) {
        has_failed_ = true;
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
  // How many outputs come before those of a share.
  int64_t Outputs(int64_t share) const { return std::min(work_.outputs, share * size_); }

  const Work work_;
  const Weights weights_;
  const int64_t num_threads_, per_block_, size_, count_;
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
  const int64_t num_groups = work.inputs / std::max<int64_t>(1, group_size);
  if (work.row_bytes != work.inputs * bits / 8 + 4 * num_groups || work.outputs == 0) {
    return ffi::Error::InvalidArgument("the weights are not for so many inputs");
  }
  return bits == 4 ? Run<flexjax::Weights<4>>(pool, work)
                   : Run<flexjax::Weights<8>>(pool, work);
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
