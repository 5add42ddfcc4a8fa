// Sixteen floats as one value, by the vector extension that GCC and Clang share: the compiler lowers it to
// whatever the machine has (one AVX-512 register, two of AVX2, four of NEON).
#pragma once
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <cstring>

constexpr int LANES = 16;
typedef float vec __attribute__((vector_size(LANES * sizeof(float))));

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
