// A query against the descriptions of windows: which of them may matter. See Lists in engine.h.
//
// Descriptions lie in blocks of 16, pairs of coordinates side by side, (directions / 2, 16, 2): a product of two pairs
// of 16-bit integers, summed to 32 bits, is one instruction. What they say of distances is approximate, and only
// decides what is picked. Distances of windows that were picked follow below.
#include "sampled/scan.h"

#include "cpu/vec.h"

namespace pyels::PYELS_ISA_NAME {
namespace {

constexpr int kParts = 16 / kLanes;  // vectors in a block
constexpr float kAbsent = -1e30f;

// sum += a0 * b0 + a1 * b1 for kLanes pairs a, of 8 bits, against one pair b of 16.
PYELS_INLINE IntVec add_products(IntVec sum, const std::int8_t* a, const std::int16_t* b) {
  std::int32_t pair;
  __builtin_memcpy(&pair, b, sizeof pair);
#if defined(__AVX512BW__)
  const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  return sum + reinterpret_cast<IntVec>(_mm512_madd_epi16(wide, _mm512_set1_epi32(pair)));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)));
  return sum + reinterpret_cast<IntVec>(_mm256_madd_epi16(wide, _mm256_set1_epi32(pair)));
#elif defined(__SSE4_1__)
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a)));
  return sum + reinterpret_cast<IntVec>(_mm_madd_epi16(wide, _mm_set1_epi32(pair)));
#else
  for (int lane = 0; lane < kLanes; ++lane) sum[lane] += a[2 * lane] * b[0] + a[2 * lane + 1] * b[1];
  return sum;
#endif
}

PYELS_INLINE float across_most(Vec v) {
  float most = v[0];
  for (int lane = 1; lane < kLanes; ++lane) most = v[lane] > most ? v[lane] : most;
  return most;
}

// About log2 w of one part of a block.
PYELS_INLINE Vec log_weights(const ScanTask& t, const ScanQuery& q, std::int64_t block, int part) {
  const std::int8_t* code = t.code + block * t.directions * 16 + part * kLanes * 2;
  IntVec dot{};
#pragma GCC unroll 4
  for (std::int64_t i = 0; i < t.directions; i += 2, code += 32) dot = add_products(dot, code, q.z + i);
  Vec norm, rest;
  __builtin_memcpy(&norm, t.norm + block * 16 + part * kLanes, sizeof norm);
  __builtin_memcpy(&rest, t.rest + block * 16 + part * kLanes, sizeof rest);
  Vec log_w = q.base - q.norm_scale * norm + q.rest_scale * rest + q.dot_scale * __builtin_convertvector(dot, Vec);
  const std::int64_t at = block * 16 + part * kLanes;
  if (at + kLanes > t.members)
    for (int lane = 0; lane < kLanes; ++lane)
      if (at + lane >= t.members) log_w[lane] = kAbsent;
  return log_w;
}

void scan_sum(const ScanTask& t, ScanQuery& q) {
  const std::int64_t blocks = (t.members + 15) / 16;
  Vec sum{}, squares{};
  Vec most = Vec{} + q.top;
  for (std::int64_t block = 0; block < blocks; ++block)
    for (int part = 0; part < kParts; ++part) {
      const Vec log_w = log_weights(t, q, block, part);
      if (any_above(log_w, most)) {
        const float top = across_most(log_w);
        const float down = q.top - top;
        const float factor = down > -100.0f ? exp2(Vec{} + down)[0] : 0.0f;
        sum *= factor, squares *= factor * factor;
        q.sum *= static_cast<double>(factor), q.squares *= static_cast<double>(factor) * static_cast<double>(factor);
        q.top = top, most = Vec{} + top;
      }
      const Vec w = exp2(log_w - q.top);
      sum += w, squares += w * w;
    }
  for (int lane = 0; lane < kLanes; ++lane) {
    q.sum += static_cast<double>(sum[lane]);
    q.squares += static_cast<double>(squares[lane]);
  }
}

std::int64_t scan_pick(const ScanTask& t, const ScanQuery& q, Pick* picks) {
  const std::int64_t blocks = (t.members + 15) / 16;
  const Vec least = Vec{} + q.least, least_p = exp2(least);
  std::int64_t count = 0;
  Bits number;
  for (int lane = 0; lane < kLanes; ++lane) number[lane] = t.first + static_cast<std::uint32_t>(lane);
  for (std::int64_t block = 0; block < blocks; ++block)
    for (int part = 0; part < kParts; ++part) {
      Vec p = log_weights(t, q, block, part) + q.rate;
      const std::int64_t at = block * 16 + part * kLanes;
      // Dice: an integer hash of the member's number, with the query's seed.
      Bits dice = number + static_cast<std::uint32_t>(at);
      dice = (dice ^ q.seed) * 0x9E3779B1u;
      dice = (dice ^ (dice >> 15)) * 0x85EBCA77u;
      dice = (dice ^ (dice >> 13)) * 0xC2B2AE3Du;
      dice ^= dice >> 16;
      constexpr float side = 1.0f / (1 << 24);
      const Vec u = __builtin_convertvector(reinterpret_cast<IntVec>(dice >> 8), Vec) * side + 0.5f * side;
      p = any_above(p, least) ? exp2(p < least ? least : p < Vec{} ? p : Vec{}) : least_p;
      const IntVec picked = u < p;
      if (!any(picked)) continue;
      for (int lane = 0; lane < kLanes; ++lane)
        if (picked[lane] && at + lane < t.members) picks[count++] = {static_cast<std::int32_t>(at + lane), p[lane]};
    }
  return count;
}

void point_distances(const float* panel, const float* x, std::int64_t dims, float* out) {
  Vec sum[4]{};
  std::int64_t i = 0;
  for (; i + 4 <= dims; i += 4)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Vec difference = x[i + j] - load(panel + (i + j) * kLanes);
      sum[j] += difference * difference;
    }
  for (; i < dims; ++i) {
    const Vec difference = x[i] - load(panel + i * kLanes);
    sum[0] += difference * difference;
  }
  const Vec total = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  __builtin_memcpy(out, &total, sizeof total);
}

PYELS_INLINE Vec read(const float* at) {
  Vec v;
  __builtin_memcpy(&v, at, sizeof v);
  return v;
}
PYELS_INLINE Vec read(const std::uint8_t* at) {  // compilers do this byte by byte
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(at)))));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(
      _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(at)))));
#else
  Vec v;
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = static_cast<float>(at[lane]);
  return v;
#endif
}

PYELS_INLINE float across(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(reinterpret_cast<__m512>(v));
#else
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
  return sum;
#endif
}

template <class Pixel>
float distance(const WindowPair& t, const float* x, const Pixel* window) {
  Vec even{}, odd{};  // rows by turns, so that one sum need not wait for the other
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const std::int64_t whole = t.k / kLanes * kLanes;
  const IntVec in_row = lane < static_cast<std::int32_t>(t.k - whole);
  const auto add_row = [&](Vec sum, const float* from, const Pixel* row) {
    std::int64_t j = 0;
    for (; j < whole; j += kLanes) {
      const Vec difference = read(from + j) - read(row + j);
      sum += difference * difference;
    }
    Vec difference = read(from + j) - read(row + j);
    difference = in_row ? difference : Vec{};
    return sum + difference * difference;
  };
  for (std::int64_t c = 0; c < t.channels; ++c, x += t.x_channel, window += t.channel) {
    const float* from = x;
    const Pixel* row = window;
    for (std::int64_t i = 1; i < t.k; i += 2, from += 2 * t.x_row, row += 2 * t.row) {
      even = add_row(even, from, row);
      odd = add_row(odd, from + t.x_row, row + t.row);
    }
    even = add_row(even, from, row);
  }
  return across(even + odd);
}

float distance_uint8(const WindowPair& t, const float* x, const std::uint8_t* window) { return distance(t, x, window); }
float distance_float(const WindowPair& t, const float* x, const float* window) { return distance(t, x, window); }

}  // namespace

extern const Scan scan{kLanes, scan_sum, scan_pick, point_distances, distance_uint8, distance_float};

}  // namespace pyels::PYELS_ISA_NAME
