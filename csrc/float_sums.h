// How sums of float32 weights keep their digits: the same numbers in every kernel. No std here: units built for one
// instruction set include it.
#pragma once

namespace pyels {

// About so many float32 terms may meet in one sum before it is moved into double.
constexpr int max_float_terms = 128;

// log2 of what a weight may exceed the exponent of its sum by, before that is raised: far from overflow.
constexpr float headroom = 43.0f;

// Of the weight gathered so far: a distance that float32 may be too coarse for is found again in double above it.
constexpr float stands_out = 0.25f;

}  // namespace pyels
