// The whole C++ interface: what is computed, from what, into what. No Python, torch or CUDA types.
//
// For every query pixel p and every source patch i in S(p), with centre c_i and window phi_i,
//
//     log w_i = - || x[window(p)] - alpha * phi_i ||^2 / (2 sigma^2)
//
// and the result is the partial posterior of each pixel (struct Partial). Letters in shape comments are the ones used
// in Python: N images, B queries, C channels, H rows, W columns, k window size.
#pragma once

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <vector>

namespace pyels {

// What a query compares: the whole image, or the k x k window around the pixel.
enum class Window : int { image = 0, square = 1 };

// The source set S(p): where in each bank image the patches compared with pixel p lie.
enum class Sources : int {
  same_position = 0,  // at p; windows are clipped at the border                              (IS, LS)
  circular = 1,       // everywhere; windows wrap around                                      (ES, ELS)
  interior = 2,       // where the window lies wholly inside; the query's window wraps around (ELS)
  zeros = 3           // where the window overhangs the border as p's does; windows clipped   (ELS)
};

// Python has checked what is taken for granted here: 0 <= begin <= end, sigma >= 1e-9, 0 <= alpha <= 1e6, |x| <= 1e6,
// pixels within [-10, 10], and k <= min(H, W) for circular and interior.
struct Problem {
  // Bank. Exactly one of the two pointers is set; uint8 v stands for v / 127.5 - 1.
  const std::uint8_t* pixels_uint8 = nullptr;  // (N, C, H, W)
  const float* pixels_float = nullptr;         // (N, C, H, W)
  std::int64_t images = 0, channels = 0, height = 0, width = 0;
  const std::int64_t* order = nullptr;         // (N) image numbers, those of one class side by side; null: 0 .. N-1

  // Queries. Query b is compared with the images order[begin[b]] .. order[end[b] - 1].
  std::int64_t queries = 0;             // B
  const float* x = nullptr;             // (B, C, H, W)
  const double* alpha = nullptr;        // (B)
  const double* sigma = nullptr;        // (B)
  const std::int64_t* begin = nullptr;  // (B)
  const std::int64_t* end = nullptr;    // (B)

  Window window = Window::square;
  Sources sources = Sources::zeros;
  std::int64_t patch_size = 1;  // k, odd; of no meaning to Window::image
  bool rim = false;             // Sources::zeros: leave out the pixels whose window lies wholly inside (cpu_engine)

  int threads = 1;
  bool full = false;                  // also fill the last three arrays of Partial
  bool tensor_cores = false;          // cuda_engine may use them where log-weights then err by less than 2e-3
  bool (*interrupted)() = nullptr;    // asked a few times a second by the calling thread; true stops the work
};

// The partial posterior of each pixel over a part of the bank. It is a monoid: `merge` below is associative, and the
// neutral element is what `Partial(pixels, channels, full)` makes. Posterior mean = y / s.
struct Partial {
  std::int64_t pixels = 0, channels = 0;  // pixels = H * W
  bool full = false;
  std::vector<double> m;  // (H, W)    exponent that s, y and e refer to: near the largest log w, -inf when empty
  std::vector<double> s;  // (H, W)    sum of exp(log w - m)
  std::vector<double> y;  // (C, H, W) sum of exp(log w - m) * centre
  std::vector<double> e;                  // (H, W) sum of exp(log w - m) * (log w - m)
  std::vector<double> top;                // (H, W) largest log w
  std::vector<std::int64_t> source;       // (H, W) its patch: image * H * W + row * W + column, -1 when empty

  // Of an approximation (`sampled`), where s and y are estimates; relative to exp(2 m).
  bool sampled = false;
  std::vector<double> ss, sy, yy;  // (H, W), (C, H, W), (C, H, W) variance of s, covariance of s and y, variance of y
  std::vector<double> chance;      // (H, W) number of patches of which chance decided whether to weigh them

  Partial(std::int64_t pixels_, std::int64_t channels_, bool full_, bool sampled_ = false)
      : pixels(pixels_), channels(channels_), full(full_), sampled(sampled_) {
    clear();
  }

  void clear() {
    const double none = -std::numeric_limits<double>::infinity();
    const auto n = static_cast<std::size_t>(pixels);
    m.assign(n, none);
    s.assign(n, 0.0);
    y.assign(n * static_cast<std::size_t>(channels), 0.0);
    if (full) {
      e.assign(n, 0.0);
      top.assign(n, none);
      source.assign(n, -1);
    }
    if (sampled) {
      for (auto* one : {&ss, &chance}) one->assign(n, 0.0);
      for (auto* one : {&sy, &yy}) one->assign(n * static_cast<std::size_t>(channels), 0.0);
    }
  }
};

// The one merge: into := into + from. Of two equally heavy patches that in the lower image is the source, and within an
// image that of `into`.
void merge(Partial& into, const Partial& from);

// Receives the finished partial posterior of query b; called from the calling thread, b ascending.
struct Sink {
  virtual ~Sink() = default;
  virtual void take(std::int64_t b, const Partial& partial) = 0;
};

struct Interrupted : std::runtime_error {
  Interrupted() : std::runtime_error("interrupted") {}
};

// The definition in double precision, one pair after the other: what every engine is tested against.
void reference_engine(const Problem& problem, Sink& sink);

// The exact float32 engine. Bit-identical for any number of threads and any batch.
void cpu_engine(const Problem& problem, Sink& sink);

// The windows of some images of the bank in lists of similar ones, each with a short description that tells about how
// far a query is from it: its coordinates along the leading principal directions of all windows.
struct Lists {
  std::int64_t count = 0;
  // Members are numbered through all lists; a list begins at a multiple of list_block, and is filled up behind `end`.
  const std::int64_t* begin = nullptr;   // (lists) first member of each list
  const std::int64_t* end = nullptr;     // (lists) behind its last
  const std::int32_t* image = nullptr;   // (members) image of the window
  const std::uint16_t* place = nullptr;  // (members) and its centre: row * W + column
  const float* mean = nullptr;           // (lists, directions) of the coordinates of the windows
  const float* spread = nullptr;         // (lists) mean squared distance of the windows from that point
  // Descriptions. A window less `origin` has coordinates along `directions` of about `code` * step; `norm` is the
  // squared length of these, and `rest` that of what lies in no direction.
  std::int64_t directions_count = 0;     // even
  const float* origin = nullptr;         // (C, k, k)
  const float* directions = nullptr;     // (directions, C, k, k), orthonormal; rows of zeros may fill up
  const float* step = nullptr;           // (directions)
  const std::int8_t* code = nullptr;     // (members / list_block, directions / 2, list_block, 2)
  const float* norm = nullptr;           // (members)
  const float* rest = nullptr;           // (members)
};
constexpr std::int64_t list_block = 16;

// Describes every member: fills in mean and spread, (lists, ...), and code, norm and rest.
void describe_lists(const Problem& problem, const Lists& lists, float* mean, float* spread, std::int8_t* code,
                    float* norm, float* rest);

// Standard errors to either side that make an interval of 95%. 1.96 would do for a normal distribution; sums of few
// heavy weights have longer tails, and a search that ends when its error seems small ends too early more often than too
// late.
constexpr double list_interval = 2.3;

// The posterior by importance sampling, until the error of every pixel's mean, list_interval standard errors,
// is below `tolerance`. The lists are of the images order[begin[b]] .. order[end[b] - 1] for every query b.
// Exact, by cpu_engine, for pixels whose windows overhang the border, and for all of a query where that costs less.
void lists_engine(const Problem& problem, const Lists& lists, double tolerance, Sink& sink);

// The instruction sets this CPU can run, best first, and the one in use: environment variable PYELS_ISA, else the best.
std::vector<const char*> available_isas();
const char* isa_in_use();

}  // namespace pyels
