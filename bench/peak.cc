// The most that products can reach: the processor's instructions for them alone, on
// registers.

#include <immintrin.h>

#include <chrono>
#include <cstdint>

namespace {

constexpr int kSums = 12;  // that do not wait for each other, and are all in registers
constexpr int64_t kRounds = 1 << 16;

// Products and additions per second of one thread, measured for at least `seconds`.
// `add` adds as many `products` to a sum.
template <typename Sum, typename Add>
double OpsPerSecond(double seconds, double products, const Add& add) {
  using Clock = std::chrono::steady_clock;
  Sum sums[kSums] = {};
  const auto begun = Clock::now();
  for (int64_t rounds = kRounds;; rounds += kRounds) {
    for (int64_t round = 0; round < kRounds; ++round) {
      for (Sum& sum : sums) {
        sum = add(sum);
        asm volatile("" : "+v"(sum));  // or the compiler would leave rounds out
      }
    }
    const double spent = std::chrono::duration<double>(Clock::now() - begun).count();
    if (spent >= seconds) return rounds * kSums * 2 * products / spent;
  }
}

}  // namespace

#ifdef FLEXJAX_AVX2

// It has none for bfloat16, which is multiplied as float32.
extern "C" double flexjax_peak_bfloat16(double seconds) {
  const __m256 x = _mm256_set1_ps(1);
  return OpsPerSecond<__m256>(seconds, 8,
                              [x](__m256 sum) { return _mm256_fmadd_ps(x, x, sum); });
}

// With an addition of its own, as codes of 4 bits are multiplied.
extern "C" double flexjax_peak_int8(double seconds) {
  return OpsPerSecond<__m256i>(seconds, 32, [](__m256i sum) {
    __m256i x = _mm256_set1_epi8(1);
    asm volatile("" : "+v"(x));  // or it would be multiplied once
    return _mm256_add_epi16(sum, _mm256_maddubs_epi16(x, x));
  });
}

#else

extern "C" double flexjax_peak_bfloat16(double seconds) {
  const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80);  // ones
  return OpsPerSecond<__m512>(seconds, 32,
                              [x](__m512 sum) { return _mm512_dpbf16_ps(sum, x, x); });
}

extern "C" double flexjax_peak_int8(double seconds) {
  const __m512i x = _mm512_set1_epi8(1);
  return OpsPerSecond<__m512i>(
      seconds, 64, [x](__m512i sum) { return _mm512_dpbusd_epi32(sum, x, x); });
}

#endif
