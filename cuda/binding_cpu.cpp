#include <torch/library.h>

#include "linear_cpu.h"
#include "step_cpu.h"
#include "wkv6_cpu.h"
#include "wkv7_cpu.h"
#include "wkv_schemas.h"

TORCH_LIBRARY(rwkv_speech_cpu, m) {
  define_wkv(m);
  m.def("few_rows_linear(Tensor x, Tensor weight) -> Tensor");
  m.def("few_rows_packed(Tensor x, Tensor packed, Tensor scale) -> Tensor");
  m.def("few_rows_matmul(Tensor x, Tensor matrix) -> Tensor");
  m.def(
      "rwkv6_step(Tensor x, Tensor att_shift, Tensor ffn_shift, Tensor wkv, Tensor[] weights)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "rwkv7_step(Tensor x, Tensor? v_first, Tensor att_shift, Tensor ffn_shift, Tensor wkv, Tensor[] weights)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(rwkv_speech_cpu, CPU, m) {
  m.impl("wkv6_forward", wkv6_forward_cpu);
  m.impl("wkv6_backward", wkv6_backward_cpu);
  m.impl("wkv7_forward", wkv7_forward_cpu);
  m.impl("wkv7_backward", wkv7_backward_cpu);
  m.impl("few_rows_linear", few_rows_linear_cpu);
  m.impl("few_rows_packed", few_rows_packed_cpu);
  m.impl("few_rows_matmul", few_rows_matmul_cpu);
  m.impl("rwkv6_step", rwkv6_step_cpu);
  m.impl("rwkv7_step", rwkv7_step_cpu);
}
