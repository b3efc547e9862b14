// Attention of one new token a row to a cache. `flexjax.attention` tells what it
// computes, `flexjax.quant` how a quantized cache is kept.
//
// Keys and values are read once, as they are kept, and only slots that a row may see: a
// head's scores, of some slots at a time, are in the level-1 cache, and its sums are in
// registers (the online softmax of FlashAttention, arXiv 2205.14135). Heads are shared
// out among the threads.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cached.h"
#include "floats.h"
#include "tasks.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using flexjax::Floats;
using flexjax::kLanes;

constexpr int64_t kBlockSlots = 64;  // whose scores are there at a time
constexpr int64_t kAheadBytes = 2048, kLineBytes = 64;  // of what is asked for

// Some slots of a cache, `[rows, heads, slots, row_bytes]` each.
struct Piece {
  const uint8_t *keys, *values;
  int64_t slots;
};

struct Work {
  const uint8_t *query, *new_key, *new_value;  // [rows, heads, head_dim]
  const int32_t* start;                        // [rows]
  // Found elsewhere by each head of each row, or nothing: see `Partial`.
  const float *found_peak, *found_total, *found_values;
  int64_t length;                              // slots that are in use
  std::vector<Piece> pieces;                   // in the order of their slots
  uint8_t* out;                                // [rows, heads, head_dim]
  int64_t rows, heads, head_dim;
  int64_t row_bytes;  // of one slot of one head
  int64_t group_size;
};

// One head of one row. `Element` is the type of what is not cached, `Kept` how the rest
// is kept; a head has `kVectors` times 16 elements.
template <typename Element, typename Kept, int kVectors>
class Head {
 public:
  Head(const Work& work, const Kept& kept, int64_t index)
      : work_(work), kept_(kept), index_(index) {
    ReadNew(work.query, query_);
    ReadNew(work.new_value, sums_);
    Floats key[kVectors];
    ReadNew(work.new_key, key);
    peak_ = flexjax::Sum(Product(key));
    if (work.found_peak != nullptr) AddFound();
  }

  void Attend() {
    int64_t first = 0;
    const int64_t start = work_.start[index_ / work_.heads];
    for (const Piece& piece : work_.pieces) {
      const int64_t begin = std::max<int64_t>(0, start - first);
      const int64_t end = std::min(piece.slots, work_.length - first);
      const int64_t before = index_ * piece.slots;
      for (int64_t slot = begin; slot < end; slot += kBlockSlots) {
        const int64_t bytes = (before + slot) * work_.row_bytes;
        AttendTo(piece.keys + bytes, piece.values + bytes,
                 std::min(kBlockSlots, end - slot));
      }
      first += piece.slots;
    }
    const Floats share = flexjax::Same(1.0f / total_);
    uint8_t* out = work_.out + index_ * work_.head_dim * Element::kBytes;
    for (int v = 0; v < kVectors; ++v) {
      Element::Write(sums_[v] * share, out + v * kLanes * Element::kBytes);
    }
  }

 private:
  // Takes what was found elsewhere into the sums.
  void AddFound() {
    const float found = work_.found_peak[index_];
    const float peak = std::max(peak_, found);
    const Floats kept = flexjax::Exp(flexjax::Same(peak_ - peak));
    const Floats added = flexjax::Exp(flexjax::Same(found - peak));
    const float* values = work_.found_values + index_ * work_.head_dim;
    for (int v = 0; v < kVectors; ++v) {
      const Floats value = flexjax::Load(values + v * kLanes);
      sums_[v] = flexjax::MultiplyAdd(added, value, sums_[v] * kept);
    }
    total_ = flexjax::First(kept) * total_ +
             flexjax::First(added) * work_.found_total[index_];
    peak_ = peak;
  }

  void ReadNew(const uint8_t* vectors, Floats (&into)[kVectors]) const {
    const uint8_t* at = vectors + index_ * work_.head_dim * Element::kBytes;
    for (int v = 0; v < kVectors; ++v) {
      into[v] = Element::Read(at + v * kLanes * Element::kBytes);
    }
  }

  // One slot of the cache; and asks for what comes a little later, since one core does
  // not wait for enough of it at once by itself.
  void Read(const uint8_t* slot, Floats (&into)[kVectors]) const {
    for (int64_t i = 0; i < work_.row_bytes; i += kLineBytes) {
      flexjax::Prefetch(slot + kAheadBytes + i);
    }
    kept_.Read(slot, into);
  }

  Floats Product(const Floats (&key)[kVectors]) const {
    Floats sum = query_[0] * key[0];
    for (int v = 1; v < kVectors; ++v) {
      sum = flexjax::MultiplyAdd(query_[v], key[v], sum);
    }
    return sum;
  }

  // Takes up to `kBlockSlots` slots into the sums.
  void AttendTo(const uint8_t* keys, const uint8_t* values, int64_t count) {
    alignas(64) float weights[kBlockSlots];
    Floats peaks = flexjax::Same(peak_);
    for (int64_t slot = 0; slot < count; slot += kLanes) {
      const int64_t some = std::min(kLanes, count - slot);
      const Floats scores = Scores(keys + slot * work_.row_bytes, some);
      peaks = flexjax::Max(peaks, scores);
      flexjax::Store(scores, weights + slot);
      std::fill(weights + slot + some, weights + slot + kLanes, -INFINITY);
    }
    const float peak = flexjax::Largest(peaks);
    if (!(peak == peak_)) {
      const Floats shrunk = flexjax::Exp(flexjax::Same(peak_ - peak));
      for (Floats& sum : sums_) sum = sum * shrunk;
      total_ *= flexjax::First(shrunk);
      peak_ = peak;
    }
    Floats total = flexjax::Same(0);
    for (int64_t slot = 0; slot < count; slot += kLanes) {
      const Floats score = flexjax::Load(weights + slot);
      const Floats weight = flexjax::Exp(score - flexjax::Same(peak));
      total = total + weight;
      flexjax::Store(weight, weights + slot);
    }
    total_ += flexjax::Sum(total);
    AddValues(values, weights, count);
  }

  void AddValues(const uint8_t* values, const float* weights, int64_t count) {
    Floats sums[kVectors];  // in registers
    for (int v = 0; v < kVectors; ++v) sums[v] = sums_[v];
    for (int64_t slot = 0; slot < count; ++slot) {
      Floats value[kVectors];
      Read(values + slot * work_.row_bytes, value);
      const Floats weight = flexjax::Same(weights[slot]);
      for (int v = 0; v < kVectors; ++v) {
        sums[v] = flexjax::MultiplyAdd(weight, value[v], sums[v]);
      }
    }
    for (int v = 0; v < kVectors; ++v) sums_[v] = sums[v];
  }

  // Of up to 16 slots; the rest are as the last one.
  Floats Scores(const uint8_t* keys, int64_t count) const {
    Floats products[kLanes];
    for (int64_t slot = 0; slot < kLanes; ++slot) {
      Floats key[kVectors];
      Read(keys + std::min(slot, count - 1) * work_.row_bytes, key);
      products[slot] = Product(key);
    }
    return flexjax::SumEach(products);
  }

  const Work& work_;
  const Kept kept_;
  const int64_t index_;
  Floats query_[kVectors];
  // Of what has been seen: the largest score, and sums of weights and of values, where
  // that score's weight is 1.
  float peak_, total_ = 1.0f;
  Floats sums_[kVectors];
};

template <typename Element, typename Kept, int kVectors>
ffi::Error Run(ffi::ThreadPool pool, const Work& work) {
  const Kept kept(work.head_dim, work.group_size);
  // The work is the caller's, which waits.
  flexjax::InParallel(pool, work.rows * work.heads, [&work, kept](int64_t index) {
    Head<Element, Kept, kVectors>(work, kept, index).Attend();
    return true;
  });
  return ffi::Error::Success();
}

ffi::Error Refusal() {
  return ffi::Error::InvalidArgument("the cache is not for attention by this kernel");
}

template <typename Element, typename Kept, int kVectors>
ffi::Error RunIfFor(ffi::ThreadPool pool, const Work& work) {
  if constexpr (Kept::IsFor(kVectors)) {
    return Run<Element, Kept, kVectors>(pool, work);
  } else {
    return Refusal();
  }
}

template <typename Element, typename Kept>
ffi::Error RunAs(ffi::ThreadPool pool, const Work& work) {
  if (work.head_dim % work.group_size != 0 ||
      work.row_bytes != Kept::RowBytes(work.head_dim, work.group_size)) {
    return Refusal();
  }
  switch (work.head_dim) {
    case 16: return RunIfFor<Element, Kept, 1>(pool, work);
    case 32: return RunIfFor<Element, Kept, 2>(pool, work);
    case 48: return RunIfFor<Element, Kept, 3>(pool, work);
    case 64: return RunIfFor<Element, Kept, 4>(pool, work);
    case 80: return RunIfFor<Element, Kept, 5>(pool, work);
    case 96: return RunIfFor<Element, Kept, 6>(pool, work);
    case 112: return RunIfFor<Element, Kept, 7>(pool, work);
    case 128: return RunIfFor<Element, Kept, 8>(pool, work);
    default: return Refusal();
  }
}

// Whether two tensors have the same elements in the same places.
bool AreAlike(const ffi::AnyBuffer& left, const ffi::AnyBuffer& right) {
  return left.element_type() == right.element_type() &&
         std::ranges::equal(left.dimensions(), right.dimensions());
}

// Adds the pieces of a cache, all keys before all values; whether they are a cache of
// the work's rows and heads, of elements of `type`.
bool AddPieces(ffi::RemainingArgs cache, ffi::DataType type, Work& work) {
  const size_t count = cache.size() / 2;
  for (size_t i = 0; i < count; ++i) {
    const auto keys = cache.get<ffi::AnyBuffer>(i);
    const auto values = cache.get<ffi::AnyBuffer>(count + i);
    if (!keys || !values || !AreAlike(*keys, *values)) return false;
    const auto shape = keys->dimensions();
    if (keys->element_type() != type || shape.size() != 4) return false;
    const int64_t row_bytes = shape[3] * ffi::ByteWidth(type);
    if (i > 0 && row_bytes != work.row_bytes) return false;
    if (shape[0] != work.rows || shape[1] != work.heads) return false;
    work.row_bytes = row_bytes;
    work.pieces.push_back({.keys = static_cast<const uint8_t*>(keys->untyped_data()),
                           .values = static_cast<const uint8_t*>(values->untyped_data()),
                           .slots = shape[2]});
  }
  return count > 0 && cache.size() == 2 * count;
}

using Found = ffi::Buffer<ffi::F32>;

// Adds what was found elsewhere, if anything was; whether it is for the work's heads.
bool AddFound(Found peak, Found total, Found values, Work& work) {
  const size_t heads = work.rows * work.heads;
  if (peak.element_count() == 0) return true;
  if (peak.element_count() != heads || total.element_count() != heads ||
      values.element_count() != heads * work.head_dim) {
    return false;
  }
  work.found_peak = peak.typed_data();
  work.found_total = total.typed_data();
  work.found_values = values.typed_data();
  return true;
}

ffi::Error Attend(ffi::ThreadPool pool, ffi::AnyBuffer query, ffi::AnyBuffer new_key,
                  ffi::AnyBuffer new_value, ffi::BufferR1<ffi::S32> start,
                  ffi::BufferR0<ffi::S32> length, Found peak, Found total, Found values,
                  ffi::RemainingArgs cache, ffi::Result<ffi::AnyBuffer> out,
                  int64_t bits, int64_t group_size) {
  const auto shape = query.dimensions();  // [rows, heads, 1, head_dim]
  const ffi::DataType type = query.element_type();
  if (shape.size() != 4 || shape[2] != 1 || shape[0] != start.dimensions()[0] ||
      !AreAlike(query, new_key) || !AreAlike(query, new_value) ||
      !AreAlike(query, *out)) {
    return Refusal();
  }
  if (bits != 0 && (type != ffi::BF16 || group_size % kLanes != 0)) return Refusal();
  Work work{.query = static_cast<const uint8_t*>(query.untyped_data()),
            .new_key = static_cast<const uint8_t*>(new_key.untyped_data()),
            .new_value = static_cast<const uint8_t*>(new_value.untyped_data()),
            .start = start.typed_data(),
            .length = *length.typed_data(),
            .out = static_cast<uint8_t*>(out->untyped_data()),
            .rows = shape[0],
            .heads = shape[1],
            .head_dim = shape[3],
            .group_size = std::max<int64_t>(1, group_size)};
  if (!AddPieces(cache, bits == 0 ? type : ffi::U8, work)) return Refusal();
  if (!AddFound(peak, total, values, work)) return Refusal();
  using flexjax::Bfloat16Element;
  using flexjax::Float16;
  using flexjax::Float32;
  if (bits == 4) return RunAs<Bfloat16Element, flexjax::Quantized<4>>(pool, work);
  if (bits == 8) return RunAs<Bfloat16Element, flexjax::Quantized<8>>(pool, work);
  if (type == ffi::BF16) {
    return RunAs<Bfloat16Element, flexjax::Plain<Bfloat16Element>>(pool, work);
  }
  if (type == ffi::F16) return RunAs<Float16, flexjax::Plain<Float16>>(pool, work);
  if (type == ffi::F32) return RunAs<Float32, flexjax::Plain<Float32>>(pool, work);
  return Refusal();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(flexjax_decode_attention, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::BufferR1<ffi::S32>>()
                                  .Arg<ffi::BufferR0<ffi::S32>>()
                                  .Arg<Found>()
                                  .Arg<Found>()
                                  .Arg<Found>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size"));
