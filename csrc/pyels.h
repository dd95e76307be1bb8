// What is computed, from what. No Python, torch or CUDA types, and nothing of an engine but the reference: the others,
// with options of their own, are declared in cpu/engine.h, sampled/engine.h and cuda/engine.h.
//
// For every query pixel p and every source patch i in S(p), with window phi_i and response psi_i,
//
//     log w_i(p) = - sum_z L_p(z) (x(z) - alpha * phi_i(z))^2 / (2 sigma^2)
//
// and the result of the first pass over a bank is the partial posterior of each pixel (struct Partial). When that of
// the whole bank is known, so is every normalised weight, and a second pass answers what is asked of these (struct
// Second). Letters in shape comments are the ones used in Python: N images, B queries, C channels, H rows, W columns,
// k window size, R channels of the response.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "partial.h"

namespace pyels {

// What a query compares around pixel p.
enum class Window : int {
  image = 0,   // the whole image
  square = 1,  // the k x k window around p, its places alike or weighted by the products of `taps`
  masks = 2    // every pixel and channel z with a weight of its own: sum_z masks[p, z] (x(z) - alpha * phi_i(z))^2
};

// The source set S(p): where in each bank image the patches compared with pixel p lie.
enum class Sources : int {
  same_position = 0,  // at p; windows are clipped at the border                              (IS, LS, masks)
  circular = 1,       // everywhere; windows wrap around                                      (ES, ELS)
  interior = 2,       // where the window lies wholly inside; the query's window wraps around (ELS)
  zeros = 3           // where the window overhangs the border as p's does; windows clipped   (ELS)
};

// What of the posterior is wanted, as bits.
enum Want : int {
  want_mean = 1,       // y of struct Partial, beside m and s
  want_posterior = 3,  // and e, top and source
  want_second = 4      // m and s as good as those of a full posterior, for a second pass; y, if nothing else, in double
};

// Python has checked what is taken for granted here: 0 <= begin <= end, sigma >= 1e-9, 0 <= alpha <= 1e6, |x| <= 1e6,
// pixels within [-10, 10], masks, taps and precision finite and >= 0, and k <= min(H, W) for circular and interior.
struct Problem {
  // Bank. Exactly one of the two pointers is set; uint8 v stands for v / 127.5 - 1.
  const std::uint8_t* pixels_uint8 = nullptr;  // (N, C, H, W)
  const float* pixels_float = nullptr;         // (N, C, H, W)
  std::int64_t images = 0, channels = 0, height = 0, width = 0;
  const std::int64_t* order = nullptr;  // (M) image numbers, those of one set side by side; null: 0 .. N-1

  // What answers in place of the images that are compared, likewise; both null: these do.
  const std::uint8_t* responses_uint8 = nullptr;  // (N, R, H, W)
  const float* responses_float = nullptr;         // (N, R, H, W)
  std::int64_t response_channels = 0;             // theirs

  // Queries. Query b is compared with the images order[begin[b]] .. order[end[b] - 1].
  std::int64_t queries = 0;             // B
  const float* x = nullptr;             // (B, C, H, W)
  const double* alpha = nullptr;        // (B)
  const double* sigma = nullptr;        // (B)
  const std::int64_t* begin = nullptr;  // (B)
  const std::int64_t* end = nullptr;    // (B)
  const float* precision = nullptr;     // (B, C, H, W) factors of L at every value of the query; null: all 1

  Window window = Window::square;
  Sources sources = Sources::zeros;
  std::int64_t patch_size = 1;    // k, odd; of Window::square
  const double* taps = nullptr;   // (k), of Window::square: L of a place is the product of those of its row and column
                                  // within the window; null: all 1
  const double* masks = nullptr;  // (H * W, C, H, W), of Window::masks; or
  const bool* sets = nullptr;     // likewise, where all weights are 0 or 1
  int want = want_mean;           // bits of Want

  bool (*interrupted)() = nullptr;  // asked a few times a second by the calling thread; true stops the work

  bool full() const { return (want & want_posterior) == want_posterior; }
  bool others_answer() const { return responses_uint8 || responses_float; }
  std::int64_t answer_channels() const { return others_answer() ? response_channels : channels; }  // R
  double mask(std::int64_t at) const { return sets ? sets[at] : masks[at]; }
};

// The second pass. With W_i(p) = exp(log w_i(p) - log_sum(p)), of every image of the problem's ranges, it adds to every
// answer that is not null what it adds up to; the answers over the parts of a bank therefore add up to that over the
// bank, but for the heaviest, which Python merges. `want` of the problem plays no part.
struct Second {
  const double* log_sum = nullptr;  // (B, H, W) log of the sum of all weights; infinite: this pixel has no window

  // Every window answers for all its pixels, with weights r: the products of fold_taps, or the support of a mask.
  //     folded(z) = sum over p, o with p + o = z of r_p(o) sum_i W_i(p) psi_i(o), o counted from the patch's centre
  // Windows wrap around where the query's do; of clipped ones there is only what lies on the image.
  const double* fold_taps = nullptr;  // (k), of Window::square
  double* folded = nullptr;           // (B, R, H, W); not of Window::image

  const double* mean = nullptr;  // (B, R, H, W) posterior mean, for the next two
  // variance(p) = sum_i W_i(p) (psi_i(p) - mean(p))^2, of the response at the centre
  double* variance = nullptr;  // (B, R, H, W)
  // The derivative of sum_p cotangent(p) mean(p) with respect to x, which is
  //     sum over p, o with p + o = z of L_p(z) alpha / sigma^2 sum_i W_i(p) A_i(p) phi_i(o)
  // with A_i(p) = sum over channels of cotangent(p) (psi_i(p) - mean(p)); the terms in x cancel.
  const double* cotangent = nullptr;  // (B, R, H, W)
  double* derivative = nullptr;       // (B, C, H, W)

  double* influence = nullptr;  // (B, N) sum over p of all weights of the image's patches

  // The `top` heaviest sources of chosen pixels, in descending order; of equally heavy ones the lower source first.
  // What there are fewer of stays as it was.
  std::int64_t top = 0, pixels = 0;
  const std::int64_t* pixel = nullptr;      // (pixels) row * W + column
  double* heaviest = nullptr;               // (B, pixels, top) W
  std::int64_t* heaviest_source = nullptr;  // (B, pixels, top) image * H * W + row * W + column
};

struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

// The definition in double precision, one pair after the other: what every engine is tested against.
void reference_engine(const Problem& problem, Sink& sink);
void reference_second(const Problem& problem, const Second& second);

}  // namespace pyels
