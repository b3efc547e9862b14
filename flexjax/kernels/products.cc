// Products `x @ weight.T` with quantized weights, or with bfloat16 ones.
// `flexjax.quant` tells how the former are kept.
//
// Weights are unpacked a panel at a time, some outputs for some inputs, in the level-2
// cache: they are never in memory so. Rows of x lie in the lanes of registers, and
// weights, which are contiguous along what is summed, are broadcast to all lanes a word
// of inputs at a time. So weights need no rearranging; x does, and is smaller.
//
// `Arithmetic` is `Bfloat16` or `Int8`: how inputs and weights are multiplied, in the
// registers that the source is compiled for.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "bfloat16.h"
#include "int8.h"
#include "rounding.h"
#include "tasks.h"
#include "weights.h"
#include "words.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
template <ffi::DataType kType>
using Matrix = ffi::BufferR2<kType>;
using flexjax::kLanes;
using flexjax::Panel;
using flexjax::Strip;
using flexjax::Words;
using flexjax::Work;

constexpr int64_t kPanelOutputs = 256;
constexpr int64_t kPanelInputs = 256;     // if groups are no larger
constexpr int64_t kMostTileOutputs = 16;  // see `Tiles`
constexpr int64_t kBlockRows = 256;       // for which sums are kept, in the level-2 cache

inline int64_t Ceil(int64_t value, int64_t step) { return (value + step - 1) / step; }

// Writes words of a strip as `[words, rows]`; lanes without a row are zero.
template <typename Arithmetic>
void Pack(const char* x, int64_t row_bytes, int64_t rows, int64_t words,
          int32_t* into) {
  constexpr int64_t kWordBytes = Arithmetic::kWordInputs * Arithmetic::kInputBytes;
  const int64_t vectors = Ceil(rows, kLanes);
  for (int64_t v = 0; v < vectors; ++v) {
    for (int64_t k = 0; k < words; k += kLanes) {
      const int64_t some = std::min(kLanes, words - k);
      Words tile[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t m = v * kLanes + i;
        const char* from = x + m * row_bytes + k * kWordBytes;
        tile[i] = m < rows ? Arithmetic::WordsOf(from, some) : flexjax::NoWords();
      }
      flexjax::Transpose(tile);
      for (int64_t i = 0; i < some; ++i) {
        int32_t* to = into + kLanes * (vectors * (k + i) + v);
        flexjax::StoreWords(tile[i], kLanes, to);
      }
    }
  }
}

// A panel from an output on.
inline Panel At(const Panel& panel, int64_t output, int64_t num_words,
                int64_t num_groups) {
  return {panel.words + output * num_words, panel.factors + output * 2 * num_groups};
}

// Packs `rows` rows from `row` on of x for a panel of `count` positions from `first` on.
template <typename Arithmetic>
void PackStrip(const Work& work, const Arithmetic& weights, int64_t row, int64_t rows,
               int64_t first, int64_t count, const Strip& into) {
  constexpr int64_t kBytes = Arithmetic::kInputBytes;
  const int64_t stride = kLanes * Ceil(rows, kLanes);
  const int64_t half_words = count / Arithmetic::kWordInputs;
  for (int64_t half = 0; half < Arithmetic::kHalves; ++half) {
    const int64_t input = half * weights.half() + first;
    Pack<Arithmetic>(work.x + (row * work.inputs + input) * kBytes,
                     work.inputs * kBytes, rows, half_words,
                     into.words + half * half_words * stride);
  }
  if constexpr (Arithmetic::kHasFactors) {
    weights.PackFactors(row, rows, first, count, stride, into.factors);
  }
}

// Adds to `sums`, `[outputs, rows]`, the products of a panel's `outputs`, of `num_words`
// words and `num_groups` groups each, and a strip; calls `before_tile` with the outputs
// of each tile.
template <int kVectors, typename Arithmetic, typename BeforeTile>
void Tiles(const Arithmetic& arithmetic, const Strip& strip, const Panel& panel,
           int64_t num_words, int64_t num_groups, int64_t outputs, float* sums,
           int64_t stride, const BeforeTile& before_tile) {
  constexpr int kOutputs =
      std::min<int>(Arithmetic::kTileSums / kVectors, kMostTileOutputs);
  for (int64_t n = 0; n < outputs; n += kOutputs) {
    before_tile(n, std::min(outputs, n + kOutputs));
    const Panel tile = At(panel, n, num_words, num_groups);
    arithmetic.template Tile<kVectors, kOutputs>(strip, tile, num_words,
                                                 sums + n * stride, stride);
  }
}

// The same for a strip of so many vectors of 16 rows.
template <int kVectors, typename Arithmetic, typename... Args>
void TilesOf(int64_t vectors, const Arithmetic& arithmetic, const Args&... args) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) {
      return TilesOf<kVectors - 1>(vectors, arithmetic, args...);
    }
  }
  Tiles<kVectors>(arithmetic, args...);
}

// Writes `sums`, `[outputs, rows]`, to where they belong.
inline void Store(const Work& work, const float* sums, int64_t stride, int64_t row,
                  int64_t row_end, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; n += kLanes) {
    const int64_t some = std::min(kLanes, end - n);
    for (int64_t m = row; m < row_end; m += kLanes) {
      Words tile[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) {
        const float* from = sums + (n - begin + i) * stride + m - row;
        tile[i] = flexjax::LoadWords(reinterpret_cast<const char*>(from), kLanes);
      }
      flexjax::Transpose(tile);
      for (int64_t i = 0; i < std::min(kLanes, row_end - m); ++i) {
        flexjax::StoreWords(tile[i], some, work.out + (m + i) * work.outputs + n);
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
template <typename Arithmetic>
bool Block(const Work& work, const Arithmetic& weights, int64_t row, int64_t row_end,
           int64_t begin, int64_t end, int64_t after) {
  thread_local Memory memory;
  constexpr int64_t kHalves = Arithmetic::kHalves;
  constexpr int64_t kWordInputs = Arithmetic::kWordInputs;
  constexpr int64_t kStripRows = Arithmetic::kStripVectors * kLanes;
  const int64_t span = weights.panel_positions(kPanelInputs);
  const int64_t most_words = span * kHalves / kWordInputs;
  const int64_t most_factors =
      Arithmetic::kHasFactors ? 2 * kHalves * span / work.group_size : 0;
  const int64_t stride = kLanes * Ceil(row_end - row, kLanes);
  const int64_t outputs = end - begin + kMostTileOutputs;  // the last tile's too
  memory.Reset((outputs + kStripRows) * (most_words + most_factors) * sizeof(float) +
               outputs * stride * sizeof(float) + 5 * 64);
  if (!memory.is_there()) return false;
  const Panel panel{memory.Take<int32_t>(outputs * most_words),
                    memory.Take<float>(outputs * most_factors)};
  const Strip strip{memory.Take<int32_t>(kStripRows * most_words),
                    memory.Take<float>(kStripRows * most_factors)};
  float* sums = memory.Take<float>(outputs * stride);
  std::memset(strip.factors, 0, kStripRows * most_factors * sizeof(float));
  std::memset(sums, 0, outputs * stride * sizeof(float));
  for (int64_t first = 0; first < weights.half(); first += span) {
    const int64_t positions = std::min(span, weights.half() - first);
    const int64_t next = first + positions;
    const int64_t next_positions = std::min(span, weights.half() - next);
    const int64_t num_words = kHalves * positions / kWordInputs;
    const int64_t num_groups =
        Arithmetic::kHasFactors ? kHalves * positions / work.group_size : 0;
    for (int64_t n = begin; n < end; ++n) {
      weights.Unpack(n, first, positions, At(panel, n - begin, num_words, num_groups));
    }
    for (int64_t m = row; m < row_end; m += kStripRows) {
      const int64_t rows = std::min(kStripRows, row_end - m);
      PackStrip(work, weights, m, rows, first, positions, strip);
      const auto ask_ahead = [&](int64_t tile, int64_t tile_end) {
        if (m > row) return;
        const bool is_last = next_positions == 0;
        const int64_t from = is_last ? after : begin;
        for (int64_t n = from + tile; n < std::min(work.outputs, from + tile_end); ++n) {
          weights.Ask(n, is_last ? 0 : next, is_last ? span : next_positions);
        }
      };
      TilesOf<Arithmetic::kStripVectors>(
          Ceil(rows, kLanes), weights, strip, panel, num_words, num_groups, end - begin,
          sums + m - row, stride, ask_ahead);
    }
  }
  Store(work, sums, stride, row, row_end, begin, end);
  return true;
}

// A product in shares, some outputs of a block of rows each. All outputs of a block come
// before the next block, so that its rows of x stay in the caches: each share reads them
// anew.
template <typename Arithmetic>
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

  // Computes one of them; false if there is no memory to work in.
  bool operator()(int64_t index) const {
    const int64_t row = index / per_block_ * kBlockRows;
    const int64_t row_end = std::min(work_.rows, row + kBlockRows);
    const int64_t share = index % per_block_, next = index + num_threads_;
    const int64_t begin = Outputs(share), end = Outputs(share + 1);
    const int64_t after = next < count_ ? Outputs(next % per_block_) : work_.outputs;
    return begin >= end || Block(work_, weights_, row, row_end, begin, end, after);
  }

 private:
  // How many outputs come before those of a share.
  int64_t Outputs(int64_t share) const { return std::min(work_.outputs, share * size_); }

  const Work work_;
  const Arithmetic weights_;
  const int64_t num_threads_, per_block_, size_, count_;
};

template <typename Arithmetic>
ffi::Error Run(ffi::ThreadPool pool, const Work& work) {
  const Shares<Arithmetic> shares(work, flexjax::NumThreads(pool));
  if (!flexjax::InParallel(pool, shares.count(), shares)) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                      "no memory for a product");
  }
  return ffi::Error::Success();
}

// What is said of a product by the shapes of its parts.
template <typename X, typename Weight>
Work WorkOf(const X& x, const Weight& weight, Matrix<ffi::F32>& out,
            int64_t group_size, const float* factors = nullptr) {
  return {static_cast<const char*>(x.untyped_data()),
          factors,
          static_cast<const uint8_t*>(weight.untyped_data()),
          static_cast<float*>(out.untyped_data()),
          x.dimensions()[0],
          x.dimensions()[1],
          weight.dimensions()[0],
          static_cast<int64_t>(weight.size_bytes()) /
              std::max<int64_t>(1, weight.dimensions()[0]),
          std::max<int64_t>(1, group_size)};
}

bool IsWhole(const Work& work, int64_t bits) {
  const int64_t num_groups = bits == 16 ? 0 : work.inputs / work.group_size;
  return work.inputs % work.group_size == 0 &&
         work.group_size % flexjax::kGroupStep == 0 && work.outputs > 0 &&
         work.row_bytes == work.inputs * bits / 8 + 4 * num_groups;
}

ffi::Error Refusal() {
  return ffi::Error::InvalidArgument("the weights are not for so many inputs");
}

ffi::Error ContractQuantized(ffi::ThreadPool pool, Matrix<ffi::BF16> x,
                             Matrix<ffi::U8> weight,
                             ffi::Result<Matrix<ffi::F32>> out, int64_t bits,
                             int64_t group_size) {
  const Work work = WorkOf(x, weight, *out, group_size);
  if (!IsWhole(work, bits)) return Refusal();
  return bits == 4 ? Run<flexjax::Bfloat16<4>>(pool, work)
                   : Run<flexjax::Bfloat16<8>>(pool, work);
}

ffi::Error ContractBfloat16(ffi::ThreadPool pool, Matrix<ffi::BF16> x,
                            Matrix<ffi::BF16> weight,
                            ffi::Result<Matrix<ffi::F32>> out) {
  const Work work = WorkOf(x, weight, *out, flexjax::kGroupStep);
  return IsWhole(work, 16) ? Run<flexjax::Bfloat16<16>>(pool, work) : Refusal();
}

ffi::Error ContractRounded(ffi::ThreadPool pool, Matrix<ffi::S8> x,
                           ffi::BufferR3<ffi::F32> factors, Matrix<ffi::U8> weight,
                           ffi::Result<Matrix<ffi::F32>> out, int64_t bits,
                           int64_t group_size) {
  const Work work = WorkOf(x, weight, *out, group_size,
                           static_cast<const float*>(factors.untyped_data()));
  if (!IsWhole(work, bits)) return Refusal();
  return bits == 4 ? Run<flexjax::Int8<4>>(pool, work)
                   : Run<flexjax::Int8<8>>(pool, work);
}

ffi::Error RoundRows(ffi::ThreadPool pool, Matrix<ffi::BF16> x,
                     ffi::Result<Matrix<ffi::S8>> codes,
                     ffi::Result<ffi::BufferR3<ffi::F32>> factors, int64_t group_size) {
  if (group_size < kLanes || group_size % kLanes || x.dimensions()[1] % group_size) {
    return ffi::Error::InvalidArgument("rows are not whole groups of lanes");
  }
  const flexjax::Rounding work{static_cast<const uint8_t*>(x.untyped_data()),
                               codes->typed_data(),
                               factors->typed_data(),
                               x.dimensions()[0],
                               x.dimensions()[1],
                               group_size};
  flexjax::InParallel(pool, Ceil(work.rows, kLanes), [work](int64_t index) {
    const int64_t begin = index * kLanes;
    for (int64_t row = begin; row < std::min(work.rows, begin + kLanes); ++row) {
      flexjax::RoundRow(work, row);
    }
    return true;
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(flexjax_round_rows, RoundRows,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrix<ffi::BF16>>()
                                  .Ret<Matrix<ffi::S8>>()
                                  .Ret<ffi::BufferR3<ffi::F32>>()
                                  .Attr<int64_t>("group_size"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(flexjax_contract_bfloat16, ContractBfloat16,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrix<ffi::BF16>>()
                                  .Arg<Matrix<ffi::BF16>>()
                                  .Ret<Matrix<ffi::F32>>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(flexjax_contract_quantized, ContractQuantized,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrix<ffi::BF16>>()
                                  .Arg<Matrix<ffi::U8>>()
                                  .Ret<Matrix<ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(flexjax_contract_rounded, ContractRounded,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Matrix<ffi::S8>>()
                                  .Arg<ffi::BufferR3<ffi::F32>>()
                                  .Arg<Matrix<ffi::U8>>()
                                  .Ret<Matrix<ffi::F32>>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size"));
