// The most that products can reach: the processor's instructions for them alone, on
// registers.

#include <immintrin.h>

#include <chrono>
#include <cstdint>

namespace {

constexpr int kSums = 16;  // that do not wait for each other
constexpr int64_t kRounds = 1 << 16;
constexpr double kLanes = 16;

// Products and additions per second of one thread, measured for at least `seconds`.
// `add` adds as many `products` to each lane of a sum.
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
    if (spent >= seconds) return rounds * kSums * kLanes * 2 * products / spent;
  }
}

}  // namespace

extern "C" double flexjax_peak_bfloat16(double seconds) {
  const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80);  // ones
  return OpsPerSecond<__m512>(seconds, 2,
                              [x](__m512 sum) { return _mm512_dpbf16_ps(sum, x, x); });
}

extern "C" double flexjax_peak_int8(double seconds) {
  const __m512i x = _mm512_set1_epi8(1);
  return OpsPerSecond<__m512i>(
      seconds, 4, [x](__m512i sum) { return _mm512_dpbusd_epi32(sum, x, x); });
}
