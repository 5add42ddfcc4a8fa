// What the tests call through ctypes: the launchers of cuda/wkv6.cu and cuda/wkv7.cu, run under the stand-in.
#include "cuda_stand_in.h"
#include "wkv6.h"
#include "wkv7.h"

namespace {

std::string message;

// Null, or what the stand-in found.
template <typename Args>
const char *run(void (*launcher)(const Args &, CUstream_st *), const Args *args, unsigned seed, int skipped_line) {
  cuda_stand_in::random_order.seed(seed);
  cuda_stand_in::skipped_line = skipped_line;
  try {
    launcher(*args, nullptr);
  } catch (const std::exception &error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace

#define LAUNCHERS(operator_)                                                                                           \
  extern "C" const char *operator_##_forward(const operator_::Forward *args, unsigned seed, int skipped_line) {        \
    return run(operator_::forward, args, seed, skipped_line);                                                          \
  }                                                                                                                    \
  extern "C" const char *operator_##_backward(const operator_::Backward *args, unsigned seed, int skipped_line) {      \
    return run(operator_::backward, args, seed, skipped_line);                                                         \
  }                                                                                                                    \
  extern "C" int operator_##_chunk() { return operator_::CHUNK; }

LAUNCHERS(wkv6)
LAUNCHERS(wkv7)

extern "C" int wkv6_slices(int N) { return wkv6::slices(N); }
extern "C" int wkv7_backward_slices(int N, int64_t heads, int multiprocessors) {
  return wkv7::backward_slices(N, heads, multiprocessors);
}
