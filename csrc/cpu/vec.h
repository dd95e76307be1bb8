// Vectors of float32, one lane for each of L bank images, in the vector extensions GCC and clang share. Included by
// each unit that is compiled for one instruction set, in whose namespace all this stays.
#pragma once

#include <cstdint>

#if defined(__x86_64__)
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of GCC 12, in its own header
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#define PYELS_INLINE inline __attribute__((always_inline))

namespace pyels::PYELS_ISA_NAME {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#define PYELS_LOW 0, 1, 2, 3, 4, 5, 6, 7
#define PYELS_HIGH 8, 9, 10, 11, 12, 13, 14, 15
#elif defined(__AVX__)
constexpr int kLanes = 8;
#define PYELS_LOW 0, 1, 2, 3
#define PYELS_HIGH 4, 5, 6, 7
#else
constexpr int kLanes = 4;
#define PYELS_LOW 0, 1
#define PYELS_HIGH 2, 3
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4), may_alias));
typedef std::int32_t IntVec __attribute__((vector_size(kLanes * 4), may_alias));
typedef std::uint32_t Bits __attribute__((vector_size(kLanes * 4)));

Vec load(const float* at) { return *reinterpret_cast<const Vec*>(at); }
inline void store(float* at, Vec v) { *reinterpret_cast<Vec*>(at) = v; }

// A double for each lane, as two vectors: compilers take vectors that are too long for the machine apart lane by lane.
typedef double Half __attribute__((vector_size(kLanes * 4), may_alias));
typedef std::int64_t HalfLong __attribute__((vector_size(kLanes * 4)));
typedef float HalfFloat __attribute__((vector_size(kLanes * 2)));
typedef std::int32_t HalfInt __attribute__((vector_size(kLanes * 2)));

struct DoubleVec {
  Half low, high;
};

PYELS_INLINE DoubleVec widen(Vec v) {
#if defined(__AVX512F__)  // which GCC does in quarters
  const __m512d swapped = reinterpret_cast<__m512d>(__builtin_shufflevector(v, v, PYELS_HIGH, PYELS_LOW));
  return {reinterpret_cast<Half>(_mm512_cvtps_pd(_mm512_castps512_ps256(reinterpret_cast<__m512>(v)))),
          reinterpret_cast<Half>(_mm512_cvtps_pd(_mm512_castps512_ps256(_mm512_castpd_ps(swapped))))};
#elif defined(__AVX__)  // and of these the upper half through memory
  const __m256 whole = reinterpret_cast<__m256>(v);
  return {reinterpret_cast<Half>(_mm256_cvtps_pd(_mm256_castps256_ps128(whole))),
          reinterpret_cast<Half>(_mm256_cvtps_pd(_mm256_extractf128_ps(whole, 1)))};
#else
  return {__builtin_convertvector(__builtin_shufflevector(v, v, PYELS_LOW), Half),
          __builtin_convertvector(__builtin_shufflevector(v, v, PYELS_HIGH), Half)};
#endif
}
PYELS_INLINE Vec narrow(DoubleVec v) {
  return __builtin_shufflevector(__builtin_convertvector(v.low, HalfFloat), __builtin_convertvector(v.high, HalfFloat),
                                 PYELS_LOW, PYELS_HIGH);
}
PYELS_INLINE IntVec narrow(HalfLong low, HalfLong high) {
  return __builtin_shufflevector(__builtin_convertvector(low, HalfInt), __builtin_convertvector(high, HalfInt),
                                 PYELS_LOW, PYELS_HIGH);
}
PYELS_INLINE DoubleVec operator+(DoubleVec a, DoubleVec b) { return {a.low + b.low, a.high + b.high}; }
PYELS_INLINE DoubleVec operator-(double a, DoubleVec b) { return {a - b.low, a - b.high}; }
PYELS_INLINE DoubleVec operator-(DoubleVec a, double b) { return {a.low - b, a.high - b}; }
PYELS_INLINE DoubleVec operator*(double a, DoubleVec b) { return {a * b.low, a * b.high}; }
PYELS_INLINE DoubleVec operator*(DoubleVec a, DoubleVec b) { return {a.low * b.low, a.high * b.high}; }
PYELS_INLINE IntVec operator<(DoubleVec a, DoubleVec b) { return narrow(a.low < b.low, a.high < b.high); }
PYELS_INLINE IntVec operator==(DoubleVec a, DoubleVec b) { return narrow(a.low == b.low, a.high == b.high); }
PYELS_INLINE DoubleVec choose(IntVec mask, DoubleVec a, DoubleVec b) {
  const HalfLong low = __builtin_convertvector(__builtin_shufflevector(mask, mask, PYELS_LOW), HalfLong);
  const HalfLong high = __builtin_convertvector(__builtin_shufflevector(mask, mask, PYELS_HIGH), HalfLong);
  return {low ? a.low : b.low, high ? a.high : b.high};
}

// A bit for each lane, the first the lowest.
inline std::uint32_t bits_of(IntVec mask) {
#if defined(__AVX512F__)
  return static_cast<std::uint32_t>(_mm512_movepi32_mask(reinterpret_cast<__m512i>(mask)));
#elif defined(__AVX__)
  return static_cast<std::uint32_t>(_mm256_movemask_ps(reinterpret_cast<__m256>(mask)));
#elif defined(__SSE2__)
  return static_cast<std::uint32_t>(_mm_movemask_ps(reinterpret_cast<__m128>(mask)));
#else
  std::uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= static_cast<std::uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}
inline bool any(IntVec mask) {
#if defined(__SSE2__)
  return bits_of(mask) != 0;
#else
  std::int32_t joined = 0;
  for (int i = 0; i < kLanes; ++i) joined |= mask[i];
  return joined != 0;
#endif
}

inline bool any_above(Vec v, Vec limit) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(v), reinterpret_cast<__m512>(limit), _CMP_GT_OQ) != 0;
#else
  return any(v > limit);
#endif
}

inline std::int32_t least(std::int32_t a, std::int32_t b) { return a < b ? a : b; }

// Keeps the compiler from fusing a product with the sum it goes into in one place and not in the next.
PYELS_INLINE void keep_apart(Vec& v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
}

// 2^max(x, -100) for x < 127, relative error below 2e-7: 2^n times a polynomial on |f| <= 1/2. The least is far from
// numbers that take longer because they are denormal.
Vec exp2(Vec x) {
  const Vec lowest = Vec{} - 100.0f;
  x = x > lowest ? x : lowest;
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, left in the low mantissa bits
  const Vec shifted = x + magic;
  const Vec n = shifted - magic;
  const Vec f = x - n;
  Vec p = f * 1.326472725e-3f + 9.671512786e-3f;
  p = p * f + 5.550733744e-2f;
  p = p * f + 2.402224208e-1f;
  p = p * f + 6.931469776e-1f;
  p = p * f + 1.0f;
  return reinterpret_cast<Vec>(reinterpret_cast<Bits>(p) + (reinterpret_cast<Bits>(shifted) << 23));
}

}  // namespace
}  // namespace pyels::PYELS_ISA_NAME
