// The most that products of bfloat16 can reach: the processor's instruction for them
// alone, on registers.

#include <immintrin.h>

#include <chrono>
#include <cstdint>

namespace {

constexpr int kSums = 16;  // that do not wait for each other
constexpr int64_t kRounds = 1 << 16;
constexpr double kFlopsPerSum = 64;  // 16 lanes, 2 products and 2 additions each

}  // namespace

// Operations per second of one thread, measured for at least `seconds`.
extern "C" double flexjax_peak_flops_per_s(double seconds) {
  using Clock = std::chrono::steady_clock;
  const __m512bh x = (__m512bh)_mm512_set1_epi32(0x3f803f80);  // ones
  __m512 sums[kSums] = {};
  const auto begun = Clock::now();
  for (int64_t rounds = kRounds;; rounds += kRounds) {
    for (int64_t round = 0; round < kRounds; ++round) {
      for (__m512& sum : sums) {
        sum = _mm512_dpbf16_ps(sum, x, x);
        asm volatile("" : "+v"(sum));  // or the compiler would leave rounds out
      }
    }
    const double spent = std::chrono::duration<double>(Clock::now() - begun).count();
    if (spent >= seconds) return rounds * kSums * kFlopsPerSum / spent;
  }
}
