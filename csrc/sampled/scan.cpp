// A query against the descriptions of windows: which of them may matter. See Lists in engine.h.
//
// Leading coordinates lie in blocks of windows, pairs of them side by side, (leading / 2, block, 2): squares of two pairs
// of 16-bit differences, summed to 32 bits, are one instruction. So is a look into a table of 16 entries for the tails of
// 32 windows. What descriptions say of distances is approximate, and
// only decides what is picked. Distances of windows that were picked follow below.
#include "sampled/scan.h"

#include "cpu/vec.h"

namespace pyels::PYELS_ISA_NAME {
namespace {

constexpr int kLeading = 16, kBlock = 32;
constexpr int kParts = kBlock / kLanes;  // vectors in a block
constexpr float kAbsent = -1e30f;
constexpr float kNothing = 40;  // log2: so far below the largest, weights add nothing to a sum

// sum += (a0 - b0)^2 + (a1 - b1)^2 for kLanes pairs a, of 8 bits, against one pair b of 16.
PYELS_INLINE IntVec add_squares(IntVec sum, const std::int8_t* a, const std::int16_t* b) {
#if defined(__SSE4_1__)
  std::int32_t pair;
  __builtin_memcpy(&pair, b, sizeof pair);
#endif
#if defined(__AVX512BW__)
  const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(a)));
  const __m512i apart = _mm512_sub_epi16(wide, _mm512_set1_epi32(pair));
  return sum + reinterpret_cast<IntVec>(_mm512_madd_epi16(apart, apart));
#elif defined(__AVX2__)
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)));
  const __m256i apart = _mm256_sub_epi16(wide, _mm256_set1_epi32(pair));
  return sum + reinterpret_cast<IntVec>(_mm256_madd_epi16(apart, apart));
#elif defined(__SSE4_1__)
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(a)));
  const __m128i apart = _mm_sub_epi16(wide, _mm_set1_epi32(pair));
  return sum + reinterpret_cast<IntVec>(_mm_madd_epi16(apart, apart));
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    const std::int32_t first = a[2 * lane] - b[0], second = a[2 * lane + 1] - b[1];
    sum[lane] += first * first + second * second;
  }
  return sum;
#endif
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
#elif defined(__SSE4_1__)
  std::int32_t four;
  __builtin_memcpy(&four, at, sizeof four);
  return reinterpret_cast<Vec>(_mm_cvtepi32_ps(_mm_cvtepu8_epi32(_mm_cvtsi32_si128(four))));
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

PYELS_INLINE float across_most(Vec v) {
  float most = v[0];
  for (int lane = 1; lane < kLanes; ++lane) most = v[lane] > most ? v[lane] : most;
  return most;
}

// About log2 w of the windows of a block, but for their tails.
PYELS_INLINE void lead_weights(const ScanTask& t, const ScanQuery& q, std::int64_t block, Vec (&log_w)[kParts]) {
  const std::int8_t* lead = t.lead + block * kLeading * kBlock;
  for (int part = 0; part < kParts; ++part) {
    IntVec squared{};
#pragma GCC unroll 8
    for (int i = 0; i < kLeading; i += 2)
      squared = add_squares(squared, lead + i * kBlock + part * kLanes * 2, q.z + i);
    log_w[part] = -q.lead_scale * __builtin_convertvector(squared, Vec);
  }
  for (std::int64_t i = t.members - block * kBlock; i < kBlock; ++i) log_w[i / kLanes][i % kLanes] = kAbsent;
}

// And with them. Sums of what the tables have stop at 255.
PYELS_INLINE void add_tails(const ScanTask& t, const ScanQuery& q, std::int64_t block, Vec (&log_w)[kParts]) {
  const std::uint8_t* codes = t.tail + block * t.tail_block;
  std::uint8_t sums[kBlock];
#if defined(__AVX2__)
  __m256i sum = _mm256_setzero_si256();
  const __m256i low = _mm256_set1_epi8(15);
  for (std::int64_t i = 0; i < q.tail_bytes; ++i, codes += kBlock) {
    const __m256i code = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
    const auto table = [&](std::int64_t number) __attribute__((always_inline)) {
      return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(q.tables + 16 * number)));
    };
    sum = _mm256_adds_epu8(sum, _mm256_shuffle_epi8(table(2 * i), _mm256_and_si256(code, low)));
    const __m256i high = _mm256_and_si256(_mm256_srli_epi16(code, 4), low);
    sum = _mm256_adds_epu8(sum, _mm256_shuffle_epi8(table(2 * i + 1), high));
  }
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), sum);
#elif defined(__SSSE3__)
  __m128i sum[2] = {_mm_setzero_si128(), _mm_setzero_si128()};
  const __m128i low = _mm_set1_epi8(15);
  for (std::int64_t i = 0; i < q.tail_bytes; ++i, codes += kBlock) {
    const __m128i first = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q.tables + 32 * i));
    const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(q.tables + 32 * i + 16));
    for (int half = 0; half < 2; ++half) {
      const __m128i code = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * half));
      sum[half] = _mm_adds_epu8(sum[half], _mm_shuffle_epi8(first, _mm_and_si128(code, low)));
      sum[half] = _mm_adds_epu8(sum[half], _mm_shuffle_epi8(second, _mm_and_si128(_mm_srli_epi16(code, 4), low)));
    }
  }
  __builtin_memcpy(sums, sum, sizeof sums);
#else
  std::int32_t sum[kBlock]{};
  for (std::int64_t i = 0; i < q.tail_bytes; ++i, codes += kBlock)
    for (int member = 0; member < kBlock; ++member)
      sum[member] += q.tables[32 * i + (codes[member] & 15)] + q.tables[32 * i + 16 + (codes[member] >> 4)];
  for (int member = 0; member < kBlock; ++member)
    sums[member] = static_cast<std::uint8_t>(sum[member] < 255 ? sum[member] : 255);
#endif
  for (int part = 0; part < kParts; ++part) log_w[part] -= q.tail_scale * read(sums + part * kLanes);
}

void scan_sum(const ScanTask& t, ScanQuery& q) {
  const std::int64_t blocks = (t.members + kBlock - 1) / kBlock;
  Vec sum{}, squares{}, log_w[kParts];
  for (std::int64_t block = 0; block < blocks; ++block) {
    lead_weights(t, q, block, log_w);
    Vec most = log_w[0];
    for (int part = 1; part < kParts; ++part) most = most > log_w[part] ? most : log_w[part];
    if (!any_above(most, Vec{} + (q.top - kNothing))) continue;
    if (q.tail_bytes) add_tails(t, q, block, log_w);
    most = log_w[0];
    for (int part = 1; part < kParts; ++part) most = most > log_w[part] ? most : log_w[part];
    if (any_above(most, Vec{} + q.top)) {
      const float top = across_most(most);
      const float down = q.top - top;
      const float factor = down > -100.0f ? exp2(Vec{} + down)[0] : 0.0f;
      sum *= factor, squares *= factor * factor;
      q.sum *= static_cast<double>(factor), q.squares *= static_cast<double>(factor) * static_cast<double>(factor);
      q.top = top;
    }
    for (int part = 0; part < kParts; ++part) {
      const Vec w = exp2(log_w[part] - q.top);
      sum += w, squares += w * w;
    }
  }
  q.sum += static_cast<double>(across(sum)), q.squares += static_cast<double>(across(squares));
}

// Dice. log2 of a number between two powers of 2 is taken to be that of a straight line, as in the bits of a float, so
// that no logarithm is needed; what is asked of the dice, and the probability, go along the same line.
PYELS_INLINE Bits shaken(Bits dice) {
  dice ^= dice << 13;
  dice ^= dice >> 17;
  return dice ^ dice << 5;
}
PYELS_INLINE Vec log_dice(Bits dice) {  // of a number between 0 and 1
  const Vec number = __builtin_convertvector(reinterpret_cast<IntVec>(dice >> 8), Vec);
  return __builtin_convertvector(reinterpret_cast<IntVec>(number), Vec) * (1.0f / (1 << 23)) - (127.0f + 24.0f);
}
PYELS_INLINE float probability(float log_p) {  // with which log_dice is below
  if (log_p >= 0) return 1;
  const float whole = static_cast<float>(static_cast<int>(log_p) - 1);  // -log_p is no whole number by chance alone
  const std::uint32_t power = static_cast<std::uint32_t>(127 + static_cast<int>(whole)) << 23;
  float two;
  __builtin_memcpy(&two, &power, sizeof two);
  return two * (1 + log_p - whole);
}

std::int64_t scan_pick(const ScanTask& t, const ScanQuery& q, Pick* picks) {
  const std::int64_t blocks = (t.members + kBlock - 1) / kBlock;
  const Vec least = Vec{} + q.least;
  std::int64_t count = 0;
  Bits dice[kParts];
  for (int part = 0; part < kParts; ++part) {  // from a hash of the first members' numbers, with the query's seed
    Bits hash;
    for (int lane = 0; lane < kLanes; ++lane) hash[lane] = static_cast<std::uint32_t>(part * kLanes + lane);
    hash = ((hash + t.first) ^ q.seed) * 0x9E3779B1u;
    hash = (hash ^ (hash >> 15)) * 0x85EBCA77u;
    hash = (hash ^ (hash >> 13)) * 0xC2B2AE3Du;
    hash ^= hash >> 16;
    dice[part] = hash | (Bits{} + 1);  // not 0, which shaking leaves
  }
  Vec log_p[kParts], thrown[kParts];
  const auto picked = [&](int part) __attribute__((always_inline)) {
    const Vec p = log_p[part] + q.rate;
    return thrown[part] < (p > least ? p : least);
  };
  for (std::int64_t block = 0; block < blocks; ++block) {
    lead_weights(t, q, block, log_p);
    IntVec may_be{};
    for (int part = 0; part < kParts; ++part) {
      dice[part] = shaken(dice[part]);
      thrown[part] = log_dice(dice[part]);
      may_be |= picked(part);
    }
    if (!any(may_be)) continue;
    if (q.tail_bytes) add_tails(t, q, block, log_p);
    for (int part = 0; part < kParts; ++part) {
      for (std::uint32_t is = bits_of(picked(part)); is; is &= is - 1) {
        const int lane = __builtin_ctz(is);
        const std::int64_t member = block * kBlock + part * kLanes + lane;
        if (member >= t.members) break;
        const float p = log_p[part][lane] + q.rate;
        picks[count++] = {static_cast<std::int32_t>(member), probability(p > q.least ? p : q.least)};
      }
    }
  }
  return count;
}

template <int wide>
std::int64_t project_some(const float* x, std::int64_t dims, const float* matrix, std::int64_t n, std::int64_t at,
                          float* z) {
  typedef float Four __attribute__((vector_size(16)));
  for (; at + 4 * wide <= n; at += 4 * wide) {
    Four sum[wide]{};
    for (std::int64_t j = 0; j < dims; ++j)
      for (int i = 0; i < wide; ++i) {
        Four along;
        __builtin_memcpy(&along, matrix + j * n + at + 4 * i, sizeof along);
        sum[i] += x[j] * along;
      }
    __builtin_memcpy(z + at, sum, sizeof sum);
  }
  return at;
}
void project(const float* x, std::int64_t dims, const float* matrix, std::int64_t n, float* z) {
  project_some<1>(x, dims, matrix, n, project_some<7>(x, dims, matrix, n, 0, z), z);
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

template <class Pixel>
float distance(const WindowPair& t, const float* x, const Pixel* window) {
  Vec even{}, odd{};  // rows by turns, so that one sum need not wait for the other
  IntVec lane;
  for (int i = 0; i < kLanes; ++i) lane[i] = i;
  const std::int64_t whole = t.columns / kLanes * kLanes;
  const IntVec in_row = lane < static_cast<std::int32_t>(t.columns - whole);
  const auto add_row = [&](Vec sum, const float* from, const Pixel* row) {
    std::int64_t j = 0;
    for (; j < whole; j += kLanes) {
      const Vec difference = read(from + j) - read(row + j);
      sum += difference * difference;
    }
    if (j == t.columns) return sum;
    Vec difference = read(from + j) - read(row + j);
    difference = in_row ? difference : Vec{};
    return sum + difference * difference;
  };
  for (std::int64_t c = 0; c < t.channels; ++c, x += t.x_channel, window += t.channel) {
    const float* from = x;
    const Pixel* row = window;
    std::int64_t i = 1;
    for (; i < t.rows; i += 2, from += 2 * t.x_row, row += 2 * t.row) {
      even = add_row(even, from, row);
      odd = add_row(odd, from + t.x_row, row + t.row);
    }
    if (i == t.rows) even = add_row(even, from, row);
  }
  return across(even + odd);
}

float distance_uint8(const WindowPair& t, const float* x, const std::uint8_t* window) { return distance(t, x, window); }
float distance_float(const WindowPair& t, const float* x, const float* window) { return distance(t, x, window); }

}  // namespace

extern const Scan scan{kLanes, scan_sum, scan_pick, project, point_distances, distance_uint8, distance_float};

}  // namespace pyels::PYELS_ISA_NAME
