// Sixteen floats as one value, by the vector extension that GCC and Clang share: the compiler lowers it to
// whatever the machine has (one AVX-512 register, two of AVX2, four of NEON).
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

constexpr int LANES = 16;
typedef float vec __attribute__((vector_size(LANES * sizeof(float))));
typedef int32_t ivec __attribute__((vector_size(LANES * sizeof(int32_t))));

// Lanes of a (0-15) and b (16-31), in any order.
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, ivec{__VA_ARGS__})
#endif

inline vec broadcast(float x) { return x - vec{}; }

inline vec load(const float* p) {
  vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}

inline void store(float* p, vec x) { std::memcpy(p, &x, sizeof x); }

// bf16 is the upper half of a float.
inline vec load(const c10::BFloat16* p) {
  typedef uint16_t half_words __attribute__((vector_size(LANES * sizeof(uint16_t))));
  typedef uint32_t words __attribute__((vector_size(LANES * sizeof(uint32_t))));
  half_words h;
  std::memcpy(&h, p, sizeof h);
  words w = __builtin_convertvector(h, words) << 16;
  vec x;
  std::memcpy(&x, &w, sizeof x);
  return x;
}

inline vec load(const c10::Half* p) {
  vec x;
  for (int l = 0; l < LANES; ++l) x[l] = static_cast<float>(p[l]);
  return x;
}

// Halves of a vector, summed lane by lane.
template <typename half_t, typename whole_t>
inline half_t fold(whole_t x) {
  half_t low, high;
  std::memcpy(&low, &x, sizeof low);
  std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
  return low + high;
}

inline float sum(vec x) {
  typedef float vec8 __attribute__((vector_size(8 * sizeof(float))));
  typedef float vec4 __attribute__((vector_size(4 * sizeof(float))));
  typedef float vec2 __attribute__((vector_size(2 * sizeof(float))));
  const vec4 q = fold<vec4>(fold<vec8>(x));
  const vec2 p = fold<vec2>(q);
  return p[0] + p[1];
}

// Swaps the second half of every 2h lanes of a with the first half of the same lanes of b.
template <int h>
inline void exchange(vec& a, vec& b) {
  vec x, y;
  if constexpr (h == 8) {
    x = SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    y = SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  } else if constexpr (h == 4) {
    x = SHUFFLE(a, b, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27);
    y = SHUFFLE(a, b, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  } else if constexpr (h == 2) {
    x = SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29);
    y = SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  } else {
    x = SHUFFLE(a, b, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30);
    y = SHUFFLE(a, b, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
  }
  a = x;
  b = y;
}

template <int h = LANES / 2>
inline void transpose_tile(vec (&x)[LANES]) {
  for (int i = 0; i < LANES; ++i)
    if (!(i & h)) exchange<h>(x[i], x[i + h]);
  if constexpr (h > 1) transpose_tile<h / 2>(x);
}

// The sums of sixteen vectors, in order: each round halves their number and mixes the lanes of the pairs.
template <int h = LANES / 2>
inline vec sums(vec (&x)[LANES]) {
  for (int i = 0; i < h; ++i) {
    exchange<h>(x[i], x[i + h]);
    x[i] += x[i + h];
  }
  if constexpr (h > 1) return sums<h / 2>(x);
  return x[0];
}

// e^x within one unit in the last place; 0 below 2^-126, and 1.7e38 where it would overflow. With n = round(x / ln 2),
// e^x = 2^n e^f, and f = x - n ln 2 lies within +-0.35, where (e^f - 1 - f) / f^2 is a polynomial of degree 4 (its
// coefficients fitted for the least relative error of e^f, 4e-9). Adding 1.5 * 2^23 leaves n in the lowest bits.
inline vec exp(vec x) {
  const auto vanishes = x < -87.33f;
  x = x > 88.02f ? broadcast(88.02f) : x;
  const float shift = 12582912.0f;
  const vec shifted = x * 1.44269504f + shift;
  const vec n = shifted - shift;
  const vec f = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = f * 1.3863713e-3f + 8.367558e-3f;
  p = p * f + 4.166724e-2f;
  p = p * f + 1.6666533e-1f;
  p = p * f + 0.5f;
  p = p * (f * f) + f + 1.0f;
  ivec bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  bits = (bits << 23) + 0x3f800000;
  vec scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return vanishes ? vec{} : p * scale;
}
