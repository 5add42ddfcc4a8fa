// What the tests call through ctypes: the launchers of cuda/wkv6.cu, run under the stand-in.
#include "cuda_stand_in.h"
#include "wkv6.h"

namespace {

std::string message;

template <typename Args>
const char *run(void (*launcher)(const Args &, CUstream_st *), const Args &args, unsigned seed, int skipped_line) {
  cuda_stand_in::random_order.seed(seed);
  cuda_stand_in::skipped_line = skipped_line;
  try {
    launcher(args, nullptr);
  } catch (const std::exception &error) {
    message = error.what();
    return message.c_str();
  }
  return nullptr;
}

}  // namespace

// Null, or what the stand-in found.
extern "C" const char *wkv6_forward(const wkv6::Forward *args, unsigned seed, int skipped_line) {
  return run(wkv6::forward, *args, seed, skipped_line);
}
extern "C" const char *wkv6_backward(const wkv6::Backward *args, unsigned seed, int skipped_line) {
  return run(wkv6::backward, *args, seed, skipped_line);
}
extern "C" int wkv6_chunk() { return wkv6::CHUNK; }
extern "C" int wkv6_gv_slices(int N) { return wkv6::gv_slices(N); }
