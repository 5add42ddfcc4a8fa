// The WKV operators as torch is told of them, the same on the CPU and on GPUs.
#pragma once
#include <torch/library.h>

inline void define_wkv(torch::Library &m) {
  m.def(
      "wkv6_forward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor state, Tensor? lengths, bool save_states)"
      " -> (Tensor, Tensor, Tensor)");
  m.def(
      "wkv6_backward(Tensor r, Tensor k, Tensor v, Tensor w, Tensor u, Tensor chunk_states, Tensor? lengths, Tensor gy,"
      " Tensor g_final) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "wkv7_forward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor state, Tensor? lengths,"
      " bool save_states) -> (Tensor, Tensor, Tensor)");
  m.def(
      "wkv7_backward(Tensor r, Tensor w, Tensor k, Tensor v, Tensor a, Tensor b, Tensor chunk_states, Tensor? lengths,"
      " Tensor gy, Tensor g_final) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
}
