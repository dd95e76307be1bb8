// What is computed, from what. No Python, torch or CUDA types, and nothing of an engine but the reference: the others,
// with options of their own, are declared in cpu/engine.h, sampled/engine.h and cuda/engine.h.
//
// For every query pixel p and every source patch i in S(p), with centre c_i and window phi_i,
//
//     log w_i = - || x[window(p)] - alpha * phi_i ||^2 / (2 sigma^2)
//
// and the result is the partial posterior of each pixel (struct Partial). Letters in shape comments are the ones used
// in Python: N images, B queries, C channels, H rows, W columns, k window size.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "partial.h"

namespace pyels {

// What a query compares around pixel p.
enum class Window : int {
  image = 0,   // the whole image
  square = 1,  // the k x k window around p
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
  want_mean = 1,      // m, s and y of struct Partial
  want_posterior = 3  // and e, top and source
};

// Python has checked what is taken for granted here: 0 <= begin <= end, sigma >= 1e-9, 0 <= alpha <= 1e6, |x| <= 1e6,
// pixels within [-10, 10], masks >= 0, and k <= min(H, W) for circular and interior.
struct Problem {
  // Bank. Exactly one of the two pointers is set; uint8 v stands for v / 127.5 - 1.
  const std::uint8_t* pixels_uint8 = nullptr;  // (N, C, H, W)
  const float* pixels_float = nullptr;         // (N, C, H, W)
  std::int64_t images = 0, channels = 0, height = 0, width = 0;
  const std::int64_t* order = nullptr;  // (M) image numbers, those of one set side by side; null: 0 .. N-1

  // Queries. Query b is compared with the images order[begin[b]] .. order[end[b] - 1].
  std::int64_t queries = 0;             // B
  const float* x = nullptr;             // (B, C, H, W)
  const double* alpha = nullptr;        // (B)
  const double* sigma = nullptr;        // (B)
  const std::int64_t* begin = nullptr;  // (B)
  const std::int64_t* end = nullptr;    // (B)

  Window window = Window::square;
  Sources sources = Sources::zeros;
  std::int64_t patch_size = 1;    // k, odd; of Window::square
  const double* masks = nullptr;  // (H * W, C, H, W); of Window::masks
  int want = want_mean;           // bits of Want

  bool (*interrupted)() = nullptr;  // asked a few times a second by the calling thread; true stops the work

  bool full() const { return (want & want_posterior) == want_posterior; }
};

struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

// The definition in double precision, one pair after the other: what every engine is tested against, and the only one
// for Window::masks.
void reference_engine(const Problem& problem, Sink& sink);

}  // namespace pyels
