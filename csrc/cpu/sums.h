// The interface of the kernels for masks, compiled once per instruction set from sums.cpp and chosen at run time by
// dispatch.cpp. No std templates here, as in maps.h.
#pragma once

#include <cstdint>

namespace pyels {

// A block is V * L images: arrays that end in [V][L] hold one value for each of them, and those that begin with [V] and
// end in [L] are V planes.
static constexpr int block_vectors = 4;

// One of the inputs of a sum, with its weight.
struct Entry {
  std::uint32_t input;
  float weight;
};

// out[o] = sum over i of weight(o, i) * in[i], o < outputs, each in one of two ways:
//
// gathered  the inputs whose weights are not 0, one after the other
// by table  where all of these weigh alike, as in a mask of zeros and ones: the sums of all subsets of `subset` inputs
//           side by side are found once for all outputs, and an output adds up one of them where it would have met
//           `subset` inputs. A word is what an output takes of a group of inputs: which subset of each field of them,
//           and above these bits its number among the outputs that are summed by table. A table is of `tabled_vectors`
//           of a block's, which share what it takes to read a word; together they stay in the nearest cache.
static constexpr int subset = 5, fields = 8, group_inputs = subset * fields, tabled_vectors = 2;
struct WeightedSums {
  std::int64_t outputs, inputs;
  const std::int64_t* begin;  // (outputs + 1) of the entries of each output; none of those that are summed by table
  const Entry* entries;
  std::int64_t tabled, groups;
  const std::uint32_t* output;      // (tabled) which these are
  const float* weight;              // (tabled) of all of their inputs
  const std::int64_t* group_begin;  // (groups + 1) of the words of each group
  const std::uint64_t* words;
};

// Of WeightedSums, in floats: tables, and sums of the outputs with one.
static constexpr std::int64_t scratch_floats(std::int64_t outputs, std::int64_t lanes) {
  return ((std::int64_t{fields} << subset) + outputs) * tabled_vectors * lanes;
}

// A block of images against the pixels `first` .. `first + pixels - 1` of one query, each with a mask of its own.
// Logarithms are to base 2. What ends in [L] is carried on from block to block.
struct MaskTask {
  std::int64_t plane, values;  // H * W, C * H * W
  std::int64_t first, pixels;
  const float* x;            // (C, H, W)
  const float* precision;    // (C, H, W); null: all 1
  const double* masks;       // (pixels, C, H, W), or
  const bool* sets;          // likewise, of ones
  const WeightedSums* sums;  // of the squares, with these weights
  double unit;               // of the distances: the weights there are those of the masks and the precision, times this
  double alpha;              // signal level, times the value of one unit of the images
  const float* images;       // [V](C, H, W)[L], in units that make them exact
  std::int64_t answers;      // R
  const float* responses;    // [V](R, H, W)[L], likewise
  const std::int32_t* alive;  // [V][L] -1; 0 where there is no image
  const double* distances;    // (pixels)[V][L]

  double scale;              // log w = -scale * squared distance
  float least_scale;         // the same, less what a float32 distance may be too large by
  float skip;                // weights below 2^-skip of the whole are taken as zero
  float slack;               // what else a float32 distance may be too large by, as log2 of a weight
  float exact_above;         // distances beyond this are found again in double where the weight stands out,
  float always_exact_above;  // and beyond this wherever the weight may matter

  // The first pass. Weights refer to 2^reference.
  bool full;           // also keep entropy and heaviest source
  std::int32_t at;     // number of the block's first image
  double* reference;   // (pixels)
  double* s;           // (pixels)[L]
  double* y;           // (R, pixels)[L]
  double* e;           // (pixels)[L] sum of w * (log w - reference)
  double* nearest;     // (pixels)[L] least squared distance
  std::int32_t* near;  // (pixels)[L] and which image's it is, but for its lane

  // The second pass.
  const double* log_sum;    // (pixels) log of the sum of all weights
  float* weights;           // (pixels)[V][L] w / sum of all
  const double* mean;       // (R, pixels) in units of the responses
  const double* cotangent;  // (R, pixels)
  double* variance;         // (R, pixels)[L], null where it is not asked for; so are the next two
  float* projected;         // (pixels)[V][L] weights * sum over R of cotangent * (response - mean)
  double* influence;        // [V][L] sum of the weights
};

struct SumsKernel {
  int lanes;
  // precision[z] * precision_unit * (x[z] - alpha * images[z])^2, (values)[V][L]
  void (*squares)(const MaskTask&, float precision_unit, float* squares);
  // in (inputs)[V][L], out (outputs)[V][L]; scratch (scratch_floats(tabled, L)), at any values
  void (*sum)(const WeightedSums&, const float* in, double* out, float* scratch);
  void (*weigh)(const MaskTask&);
  // Whether any weight of the block is not zero; only then is all the rest done.
  bool (*second)(const MaskTask&);
  // into[z] += sum over V of factors[z] * pixels[z], z < n: of (n)[V][L] and [V](n)[L], the next plane being `stride` on.
  void (*add_products)(const double* factors, const float* pixels, std::int64_t stride, std::int64_t n, double* into);
};

const SumsKernel& sums_in_use();

#if defined(__x86_64__)
namespace x86_64_v2 {
extern const SumsKernel sums;
}
namespace x86_64_v3 {
extern const SumsKernel sums;
}
namespace x86_64_v4 {
extern const SumsKernel sums;
}
#else
namespace generic {
extern const SumsKernel sums;
}
#endif

}  // namespace pyels
