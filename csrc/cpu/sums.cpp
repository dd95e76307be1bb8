// Masks: the distances of a block of images, for all pixels, are the product of their squared differences from the query
//
//     D(z) = (x(z) - alpha * phi(z))^2
//
// with the matrix of the masks. Differences are taken first, every term is non-negative, and sums only ever add.
// Precision: float32 for up to a few hundred terms, and double from there on; what float32 is too coarse for is found
// again in double, by the rules of weighing.h.
#include "cpu/sums.h"

#include "cpu/vec.h"
#include "float_sums.h"

namespace pyels::PYELS_ISA_NAME {
namespace {

constexpr int V = block_vectors;

// The share of the whole from which on a weight stands out.
constexpr float outstanding = 1.0f / 64;

// Half by half: copied as a whole, by GCC in smaller pieces, it would have to wait for itself.
PYELS_INLINE DoubleVec load(const double* at) {
  const Half* halves = reinterpret_cast<const Half*>(at);
  return {halves[0], halves[1]};
}
PYELS_INLINE void store(double* at, DoubleVec v) {
  Half* halves = reinterpret_cast<Half*>(at);
  halves[0] = v.low, halves[1] = v.high;
}
PYELS_INLINE void add(double* at, DoubleVec v) { store(at, load(at) + v); }

void squares(const MaskTask& t, float precision_unit, float* out) {
  const float alpha = static_cast<float>(t.alpha);
  for (int v = 0; v < V; ++v)
    for (std::int64_t z = 0; z < t.values; ++z) {
      const Vec difference = t.x[z] - alpha * load(t.images + (v * t.values + z) * kLanes);
      Vec square = difference * difference;
      if (t.precision) square *= t.precision[z] * precision_unit;
      store(out + (z * V + v) * kLanes, square);
    }
}

// ---- Sums --------------------------------------------------------------------------------------------------------

void gather(const WeightedSums& sums, std::int64_t o, const float* in, double* out) {
  constexpr std::int64_t at_once = 16;
  DoubleVec total[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) total[v] = {Half{}, Half{}};
  for (std::int64_t i = sums.begin[o], end = sums.begin[o + 1]; i < end;) {
    Vec some[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) some[v] = Vec{};
    for (const std::int64_t stop = end - i < at_once ? end : i + at_once; i < stop; ++i) {
      const Entry entry = sums.entries[i];
      const float* at = in + std::int64_t{entry.input} * V * kLanes;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) some[v] += entry.weight * load(at + v * kLanes);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) total[v] = total[v] + widen(some[v]);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) store(out + (o * V + v) * kLanes, total[v]);
}

constexpr int W = tabled_vectors;

// The sums of all subsets of the inputs of a group, field by field; of those behind the last there are none.
void fill_table(const float* in, std::int64_t inputs, float* table) {
  for (int field = 0; field < fields; ++field, table += W * kLanes << subset) {
    for (int v = 0; v < W; ++v) store(table + v * kLanes, Vec{});
    for (int i = 0; i < subset; ++i) {
      const std::int64_t at = field * subset + i;
      Vec one[W];
      for (int v = 0; v < W; ++v) one[v] = at < inputs ? load(in + (at * V + v) * kLanes) : Vec{};
      for (int j = 0; j < 1 << i; ++j)
        for (int v = 0; v < W; ++v)
          store(table + (((1 << i) + j) * W + v) * kLanes, load(table + (j * W + v) * kLanes) + one[v]);
    }
  }
}

// The entry of a table that a word asks for in a field.
PYELS_INLINE const float* taken(const float* table, std::uint64_t word, int field) {
  constexpr int size = W * kLanes * 4, log_size = __builtin_ctz(size);
  constexpr std::uint64_t mask = ((std::uint64_t{1} << subset) - 1) << log_size;
  const int shift = field * subset - log_size;
  const std::uint64_t offset = (shift < 0 ? word << -shift : word >> shift) & mask;
  return reinterpret_cast<const float*>(reinterpret_cast<const char*>(table) + (size << subset) * field + offset);
}

void sum_by_table(const WeightedSums& sums, const float* in, double* out, float* scratch) {
  constexpr std::int64_t groups_at_once = 10;
  float* table = scratch;
  float* some = scratch + scratch_floats(0, kLanes);  // of the last few groups
  for (std::int64_t first = 0; first < sums.groups; first += groups_at_once) {
    const std::int64_t end = first + groups_at_once < sums.groups ? first + groups_at_once : sums.groups;
    for (std::int64_t i = 0; i < sums.tabled * W; ++i) store(some + i * kLanes, Vec{});
    for (std::int64_t group = first; group < end; ++group) {
      const std::uint64_t *at = sums.words + sums.group_begin[group], *stop = sums.words + sums.group_begin[group + 1];
      if (at == stop) continue;
      fill_table(in + group * group_inputs * V * kLanes, sums.inputs - group * group_inputs, table);
      for (; at < stop; ++at) {
        const std::uint64_t word = *at;
        Vec sum[W];
#pragma GCC unroll 8
        for (int field = 0; field < fields; ++field) {
          const float* entry = taken(table, word, field);
#pragma GCC unroll 2
          for (int v = 0; v < W; ++v)
            sum[v] = field == 0 ? load(entry + v * kLanes) : sum[v] + load(entry + v * kLanes);
        }
        float* to = some + static_cast<std::int64_t>(word >> group_inputs) * W * kLanes;
#pragma GCC unroll 2
        for (int v = 0; v < W; ++v) store(to + v * kLanes, load(to + v * kLanes) + sum[v]);
      }
    }
    for (std::int64_t o = 0; o < sums.tabled; ++o)
      for (int v = 0; v < W; ++v) {
        double* to = out + (std::int64_t{sums.output[o]} * V + v) * kLanes;
        const DoubleVec sum = static_cast<double>(sums.weight[o]) * widen(load(some + (o * W + v) * kLanes));
        store(to, first == 0 ? sum : load(to) + sum);
      }
  }
}

void sum(const WeightedSums& sums, const float* in, double* out, float* scratch) {
  for (std::int64_t o = 0; o < sums.outputs; ++o)
    if (sums.begin[o] < sums.begin[o + 1] || sums.tabled < sums.outputs) gather(sums, o, in, out);
  if (sums.tabled == 0) return;
  for (int v = 0; v < V; v += W) sum_by_table(sums, in + v * kLanes, out + v * kLanes, scratch);
}

// ---- Weights -----------------------------------------------------------------------------------------------------

// The squared distances of pixel p and a plane of images in double: the same terms, one after the other.
DoubleVec exact_distance(const MaskTask& t, std::int64_t p, int v) {
  const float* image = t.images + v * t.values * kLanes;
  const auto term = [&](std::int64_t z) __attribute__((always_inline)) {
    const DoubleVec difference = static_cast<double>(t.x[z]) - t.alpha * widen(load(image + z * kLanes));
    const double weight = t.sets ? t.sets[p * t.values + z] : t.masks[p * t.values + z];
    return (t.precision ? weight * static_cast<double>(t.precision[z]) : weight) * (difference * difference);
  };
  DoubleVec even{}, odd{};
  const std::int64_t begin = t.sums->begin[p], end = t.sums->begin[p + 1];
  for (std::int64_t i = begin; i < end; ++i) even = even + term(t.sums->entries[i].input);
  for (std::int64_t z = 0; begin == end && z < t.values; z += 2) {  // where there are no entries
    even = even + term(z);
    if (z + 1 < t.values) odd = odd + term(z + 1);
  }
  return t.unit * (even + odd);
}

PYELS_INLINE IntVec alive(const MaskTask& t, int v) { return *reinterpret_cast<const IntVec*>(t.alive + v * kLanes); }

// Moves the sums of a pixel to a higher reference.
void raise_reference(const MaskTask& t, std::int64_t p, double reference) {
  const double down = t.reference[p] - reference;  // -inf while there are none
  const double factor = down > -1000.0 ? __builtin_exp2(down) : 0.0;
  double *s = t.s + p * kLanes, *e = t.e + p * kLanes;
  if (t.full) store(e, factor * (load(e) + (down > -1000.0 ? down : 0.0) * load(s)));
  store(s, factor * load(s));
  for (std::int64_t r = 0; r < t.answers; ++r) {
    double* y = t.y + (r * t.pixels + p) * kLanes;
    store(y, factor * load(y));
  }
  t.reference[p] = reference;
}

PYELS_INLINE double sum_of(DoubleVec v) {
  double lanes[kLanes], sum = 0.0;
  __builtin_memcpy(lanes, &v, sizeof lanes);
  for (const double lane : lanes) sum += lane;
  return sum;
}

// The largest of the lanes that matter, and of `top`.
PYELS_INLINE double largest(IntVec matters, DoubleVec v, double top) {
  double lanes[kLanes];
  __builtin_memcpy(lanes, &v, sizeof lanes);
  for (int i = 0; i < kLanes; ++i)
    if (matters[i] && lanes[i] > top) top = lanes[i];
  return top;
}

// Finds again in double what float32 is too coarse for: weights that stand out from the sum of all so far, with those of
// this block; of a full posterior whatever may matter, so that ties are ties.
template <bool full>
void refine(const MaskTask& t, std::int64_t p, const IntVec* matters, DoubleVec* distance) {
  double top = t.reference[p];
  for (int v = 0; v < V; ++v) top = largest(matters[v], -t.scale * distance[v], top);
  const double down = t.reference[p] - top;
  double sum = down > -1000.0 ? __builtin_exp2(down) * sum_of(load(t.s + p * kLanes)) : 0.0;
  Vec w[V];
  for (int v = 0; v < V; ++v) {
    const Vec relative = narrow(-t.scale * distance[v] - top);
    w[v] = (matters[v] & (relative > -t.skip - t.slack)) ? exp2(relative) : Vec{};
    sum += sum_of(widen(w[v]));
  }
  const float least = static_cast<float>(sum) * outstanding;
  for (int v = 0; v < V; ++v) {
    const Vec near = narrow(distance[v]);
    const IntVec exact =
        (w[v] > 0.0f) & (near > t.exact_above) & ((w[v] > (full ? 0.0f : least)) | (near > t.always_exact_above));
    if (any(exact)) distance[v] = choose(exact, exact_distance(t, p, v), distance[v]);
  }
}

template <bool full>
void weigh(const MaskTask& t) {
  for (std::int64_t p = 0; p < t.pixels; ++p) {
    DoubleVec distance[V];
    Vec least{}, most{}, relative[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      distance[v] = load(t.distances + (p * V + v) * kLanes);
      const Vec near = narrow(distance[v]);
      least = v == 0 ? near : least < near ? least : near;
      most = most > near ? most : near;
    }
    const float reach = t.skip + t.slack - static_cast<float>(t.reference[p]);  // infinite while there is no weight
    if (!any(reach > t.least_scale * least)) continue;  // nor of lanes without an image, which repeat others
    if (any(most > t.exact_above)) {
      IntVec matters[V], far{};
      for (int v = 0; v < V; ++v) {
        const Vec near = narrow(distance[v]);
        matters[v] = alive(t, v) & (reach > t.least_scale * near), far |= matters[v] & (near > t.exact_above);
      }
      if (any(far)) refine<full>(t, p, matters, distance);
    }
    const auto relate = [&]() __attribute__((always_inline)) {
      Vec top = Vec{} - headroom;
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        relative[v] = narrow(-t.scale * distance[v] - t.reference[p]);
        top = top > relative[v] ? top : relative[v];
      }
      return top;
    };
    if (any(relate() > headroom)) {
      double top = t.reference[p];
      for (int v = 0; v < V; ++v) top = largest(alive(t, v), -t.scale * distance[v], top);
      raise_reference(t, p, top);
      relate();
    }
    Vec w[V], sum{}, e{};
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const IntVec matters = alive(t, v) & (relative[v] > -t.skip);
      w[v] = matters ? exp2(relative[v]) : Vec{};
      sum += w[v];
      if (!full) continue;
      e += matters ? w[v] * relative[v] : Vec{};
      // Decided by what does not depend on the reference, so that ties stay ties; the first of equals.
      double* nearest = t.nearest + p * kLanes;
      IntVec& near = *reinterpret_cast<IntVec*>(t.near + p * kLanes);
      const IntVec nearer = matters & (distance[v] < load(nearest));
      near = nearer ? IntVec{} + (t.at + v * kLanes) : near;
      store(nearest, choose(nearer, distance[v], load(nearest)));
    }
    add(t.s + p * kLanes, widen(sum));
    if (full) add(t.e + p * kLanes, widen(e));
    const float* response = t.responses + (t.first + p) * kLanes;
    for (std::int64_t r = 0; r < t.answers; ++r, response += t.plane * kLanes) {
      Vec some{};
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) some += w[v] * load(response + v * t.answers * t.plane * kLanes);
      add(t.y + (r * t.pixels + p) * kLanes, widen(some));
    }
  }
}

void weigh_either(const MaskTask& t) { t.full ? weigh<true>(t) : weigh<false>(t); }

// ---- The second pass ---------------------------------------------------------------------------------------------

bool second(const MaskTask& t) {
  IntVec found{};
  for (std::int64_t p = 0; p < t.pixels; ++p)
    for (int v = 0; v < V; ++v) {
      const DoubleVec distance = load(t.distances + (p * V + v) * kLanes);
      const Vec near = narrow(distance);
      const double log_sum = t.log_sum[p];
      IntVec matters = alive(t, v) & (t.skip + t.slack - static_cast<float>(log_sum) > t.least_scale * near);
      Vec w{};
      if (log_sum < 1e300 && log_sum > -1e300 && any(matters)) {
        Vec relative = narrow(-t.scale * distance - log_sum);
        const IntVec exact =
            matters & (near > t.exact_above) & ((exp2(relative) > outstanding) | (near > t.always_exact_above));
        if (any(exact)) relative = narrow(-t.scale * choose(exact, exact_distance(t, p, v), distance) - log_sum);
        matters &= relative > -t.skip;
        const Vec most = Vec{} + 1.0f;  // of all, but for rounding
        relative = relative < most ? relative : most;
        w = matters ? exp2(relative) : w;
        found |= matters;
      }
      store(t.weights + (p * V + v) * kLanes, w);
    }
  if (!any(found)) return false;
  for (std::int64_t p = 0; p < t.pixels; ++p)
    for (int v = 0; v < V; ++v) {
      const Vec w = load(t.weights + (p * V + v) * kLanes);
      if (t.influence) add(t.influence + v * kLanes, widen(w));
      if (!t.variance && !t.projected) continue;
      DoubleVec projected{};
      for (std::int64_t r = 0; r < t.answers; ++r) {
        const float* response = t.responses + ((v * t.answers + r) * t.plane + t.first + p) * kLanes;
        const DoubleVec off =
            widen(load(response)) - t.mean[r * t.pixels + p];  // of one that has all weight, all but 0
        if (t.projected) projected = projected + t.cotangent[r * t.pixels + p] * off;
        if (t.variance) add(t.variance + (r * t.pixels + p) * kLanes, widen(w) * off * off);
      }
      if (t.projected) store(t.projected + (p * V + v) * kLanes, w * narrow(projected));
    }
  return true;
}

void add_products(const double* factors, const float* pixels, std::int64_t stride, std::int64_t n, double* into) {
  for (int v = 0; v < V; ++v)
    for (std::int64_t z = 0; z < n; ++z)
      add(into + z * kLanes, load(factors + (z * V + v) * kLanes) * widen(load(pixels + v * stride + z * kLanes)));
}

}  // namespace

extern const SumsKernel sums{kLanes, squares, sum, weigh_either, second, add_products};

}  // namespace pyels::PYELS_ISA_NAME
