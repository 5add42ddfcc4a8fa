// Stands in for the part of the CUDA language that the kernels of cuda/ use, so that the same source runs on a CPU as C++.
//
// Every thread of a block is a fiber. Between two barriers (of the block or of a warp) the fibers run one after another
// in random order, so that code which needs a barrier that is not there computes something else under some seed. In
// half of the blocks all warps keep about the same pace; in the others some run as far ahead as barriers let them.
// - Shared memory holds NaN when a block starts, and lies between red zones that are looked at when it ends.
// - A shuffle is a meeting of all 32 lanes of a warp. Lanes that meet at different operations, threads that meet at
//   different barriers, and threads that wait for ever are errors.
// - A barrier can be left out by its line, to show that the tests would see it missing.
// It does not model memory order within a warp: a shuffle orders memory here, and promises nothing of that on a GPU.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __syncthreads() cuda_stand_in::meet_block(__LINE__)
#define __syncwarp() cuda_stand_in::meet_warp(__LINE__)
#define DYNAMIC_SHARED(name) float4 *name = reinterpret_cast<float4 *>(cuda_stand_in::shared.data())
#define LAUNCH(kernel, grid, block, shared_bytes, stream, args) \
  cuda_stand_in::launch(grid, block, shared_bytes, [&] { kernel(args); })

using std::max;
using std::min;

struct alignas(16) float4 {
  float x, y, z, w;
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

struct __half {
  _Float16 value;
};
inline float __half2float(__half x) { return x.value; }
inline __half __float2half(float x) { return {static_cast<_Float16>(x)}; }

struct __nv_bfloat16 {
  uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline __nv_bfloat16 __float2bfloat16(float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  return {std::isnan(x) ? uint16_t(0x7fff) : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

template <typename T>
void __stcg(T *to, const T &x) {
  *to = x;
}

inline float __fdividef(float x, float y) { return x / y; }

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx, blockDim;

enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
void cudaFuncSetAttribute(Kernel, int, int) {}

namespace cuda_stand_in {

constexpr unsigned WARP = 32;
constexpr size_t STACK = 64 << 10, RED_ZONE = 4096, MOST_SHARED = 163 << 10;  // bytes; the last: a block of sm_80
constexpr uint8_t NAN_BYTE = 0xff;                                            // four of them are a NaN

// Dynamic shared memory between its red zones.
struct Shared {
  alignas(16) uint8_t bytes[RED_ZONE + MOST_SHARED + RED_ZONE];
  uint8_t *data() { return bytes + RED_ZONE; }
  void poison(size_t size) { memset(bytes, NAN_BYTE, RED_ZONE + size + RED_ZONE); }
  void check(size_t size) const {
    const auto untouched = [](uint8_t x) { return x == NAN_BYTE; };
    const uint8_t *end = bytes + RED_ZONE + size;
    if (!std::all_of(bytes, bytes + RED_ZONE, untouched) || !std::all_of(end, end + RED_ZONE, untouched))
      throw std::runtime_error("a kernel wrote outside its shared memory");
  }
};
inline Shared shared;

struct Fiber {
  ucontext_t start;
  jmp_buf paused;
  std::vector<char> stack = std::vector<char>(STACK);
  bool started;
  int line;  // of the barrier it waits at
};

struct Warp {
  unsigned haste;           // a warp of more haste runs first
  unsigned arrived, round;  // of the current meeting
  float slots[2][WARP];     // values on their way, of this meeting and the one before
};

inline std::mt19937 random_order;
inline int skipped_line;  // of a barrier to leave out; 0: none
inline std::vector<Fiber> fibers(1024);
inline Warp warps[32];
inline std::vector<unsigned> runnable, waiting;  // waiting: at the block's barrier
inline unsigned current;
inline jmp_buf scheduler;
inline const std::function<void()> *body;
inline std::string error;

inline void pause() {
  if (!_setjmp(fibers[current].paused)) _longjmp(scheduler, 1);
}

[[noreturn]] inline void fail(const std::string &message) {
  error = message;
  _longjmp(scheduler, 1);
}

inline void meet_block(int line) {
  if (line == skipped_line) return;
  fibers[current].line = line;
  if (!waiting.empty() && fibers[waiting[0]].line != line)
    fail("threads of a block meet at barriers of lines " + std::to_string(line) + " and " +
         std::to_string(fibers[waiting[0]].line));
  waiting.push_back(current);
  if (waiting.size() == blockDim.x) waiting.swap(runnable);
  pause();
}

// Waits for all lanes of the warp; returns the round of this meeting.
inline unsigned meet_warp(int line) {
  const unsigned first = current / WARP * WARP;
  Warp &warp = warps[current / WARP];
  fibers[current].line = line;
  const unsigned round = warp.round;
  if (++warp.arrived == WARP) {
    for (unsigned lane = 0; lane < WARP; lane++) {
      if (fibers[first + lane].line != line) fail("lanes of a warp meet at different operations");
      runnable.push_back(first + lane);
    }
    warp.arrived = 0;
    warp.round++;
  }
  pause();
  return round;
}

inline void run_thread() {
  (*body)();
  _longjmp(scheduler, 1);  // done: neither runnable nor waiting
}

// Takes a thread from `runnable`: any one of those whose warps have the most haste.
inline unsigned next_thread() {
  std::swap(runnable[random_order() % runnable.size()], runnable.back());
  for (unsigned &other : runnable)
    if (warps[other / WARP].haste > warps[runnable.back() / WARP].haste) std::swap(other, runnable.back());
  const unsigned thread = runnable.back();
  runnable.pop_back();
  return thread;
}

inline void run_block(unsigned threads) {
  const bool even_pace = random_order() % 2;
  runnable.resize(threads);
  std::iota(runnable.begin(), runnable.end(), 0u);
  waiting.clear();
  for (Warp &warp : warps) warp = {even_pace ? 0 : unsigned(random_order())};
  for (unsigned t = 0; t < threads; t++) fibers[t].started = false;
  while (!runnable.empty() && error.empty()) {
    current = next_thread();
    threadIdx.x = current;
    Fiber &fiber = fibers[current];
    if (_setjmp(scheduler)) continue;
    if (fiber.started) _longjmp(fiber.paused, 1);
    fiber.started = true;
    getcontext(&fiber.start);
    fiber.start.uc_stack.ss_sp = fiber.stack.data();
    fiber.start.uc_stack.ss_size = STACK;
    makecontext(&fiber.start, run_thread, 0);
    setcontext(&fiber.start);
  }
  const bool stuck = !waiting.empty() || std::any_of(warps, warps + 32, [](const Warp &w) { return w.arrived; });
  if (error.empty() && stuck) error = "threads wait at a barrier that others never reach";
  if (!error.empty()) throw std::runtime_error(std::exchange(error, {}));
}

inline void launch(unsigned grid, unsigned block, size_t shared_bytes, const std::function<void()> &kernel) {
  if (block % WARP || block > fibers.size()) throw std::runtime_error("a block must be whole warps, at most 32");
  if (shared_bytes > MOST_SHARED) throw std::runtime_error("more shared memory than a block of sm_80 can have");
  body = &kernel;
  blockDim.x = block;
  std::vector<unsigned> blocks(grid);
  std::iota(blocks.begin(), blocks.end(), 0u);
  std::shuffle(blocks.begin(), blocks.end(), random_order);
  for (unsigned at : blocks) {
    blockIdx.x = at;
    shared.poison(shared_bytes);
    run_block(block);
    shared.check(shared_bytes);
  }
}

inline float shuffle_xor(float x, unsigned mask, int line) {
  Warp &warp = warps[current / WARP];
  const unsigned lane = current % WARP;
  warp.slots[warp.round % 2][lane] = x;
  const unsigned round = meet_warp(line);
  return warp.slots[round % 2][lane ^ mask];
}

}  // namespace cuda_stand_in

#define __shfl_xor_sync(lanes, x, mask) cuda_stand_in::shuffle_xor(x, mask, __LINE__)
