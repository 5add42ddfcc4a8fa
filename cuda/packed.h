// The matrices of lm/quantised.py, for the products of few_rows.h. Their weights become floats, and x stays in floats: the
// integer products that some processors have would round x to eight bits as well.
#pragma once
#include <ATen/core/Tensor.h>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "few_rows.h"

// A byte to a weight, a scale to a row.
struct Int8 {
  static constexpr int VECS = 4, SUMS = 4;
  const int8_t* weights;
  const float* scales;
  int64_t K;

  Int8(const at::Tensor& packed, const at::Tensor& scale)
      : weights(packed.data_ptr<int8_t>()), scales(scale.data_ptr<float>()), K(packed.size(1)) {}
  static int place(int k) { return k % 4 * LANES + k / 4; }
  int64_t row_bytes() const { return K; }
  const int8_t* address(int64_t o, int64_t k) const { return weights + o * K + k; }
  float at(int64_t o, int64_t k) const { return *address(o, k); }
  float scale(int64_t o) const { return scales[o]; }

  void load(int64_t o, int64_t k, vec* out) const {
    ivec words;  // four weights each
    std::memcpy(&words, address(o, k), sizeof words);
    for (int p = 0; p < VECS; ++p) out[p] = __builtin_convertvector(words << (24 - 8 * p) >> 24, vec);
  }
};

// Two weights to a byte, the first in its upper half, a scale to each 64 of them; a row fills whole blocks. A line is a block.
struct Nf4 {
  static constexpr int VECS = 4, SUMS = 4, BLOCK = VECS * LANES;
  // As in lm/quantised.py.
  static constexpr vec CODES = {
      -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
      -0.18477343022823334f, -0.09105003625154495f, 0.0f, 0.07958029955625534f, 0.16093020141124725f,
      0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};
  const uint8_t* weights;
  const float* scales;
  int64_t blocks;  // of a row

  Nf4(const at::Tensor& packed, const at::Tensor& scale)
      : weights(packed.data_ptr<uint8_t>()), scales(scale.data_ptr<float>()), blocks(scale.size(1)) {}
  static int place(int k) { return k % 4 * LANES + k / 4; }
  int64_t row_bytes() const { return blocks * BLOCK / 2; }
  const uint8_t* address(int64_t o, int64_t k) const { return weights + o * row_bytes() + k / 2; }
  float scale(int64_t) const { return 1; }

  float at(int64_t o, int64_t k) const {
    const int pair = *address(o, k);
    return CODES[k % 2 ? pair & 15 : pair >> 4] * scales[o * blocks + k / BLOCK];
  }

  void load(int64_t o, int64_t k, vec* out) const {
    const vec table = CODES * scales[o * blocks + k / BLOCK];
    typedef uint16_t half_words __attribute__((vector_size(LANES * sizeof(uint16_t))));
    half_words h;  // four weights each, the second byte's above the first's
    std::memcpy(&h, address(o, k), sizeof h);
    const ivec words = __builtin_convertvector(h, ivec);
    out[0] = look_up(table, words >> 4);
    out[1] = look_up(table, words);
    out[2] = look_up(table, words >> 12);
    out[3] = look_up(table, words >> 8);
  }

  // By the lowest four bits of each index.
  static vec look_up(vec table, ivec index) {
#ifdef __AVX512F__
    return (vec)_mm512_permutexvar_ps((__m512i)index, (__m512)table);
#else
    float values[LANES];
    store(values, table);
    vec found;
    for (int l = 0; l < LANES; ++l) found[l] = values[index[l] & 15];
    return found;
#endif
  }
};

// f of the matrix that is packed so.
template <typename F>
void with_packed(const at::Tensor& packed, const at::Tensor& scale, F f) {
  if (packed.scalar_type() == at::kChar)
    f(Int8(packed, scale));
  else
    f(Nf4(packed, scale));
}
