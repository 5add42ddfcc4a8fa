"""Both WKV operators with their fp64 references, and inputs such as trained models give them."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rwkv_speech.lm import wkv
from rwkv_speech.lm.wkv6 import wkv6_reference
from rwkv_speech.lm.wkv7 import wkv7_reference


@dataclass(frozen=True)
class Case:
    operator: wkv.Operator
    run: Callable[..., tuple[Tensor, Tensor]]
    reference: Callable[..., tuple[Tensor, Tensor]]
    weakest: float
    """w of a decay of 1 in fp32."""
    strongest: float
    """w of the strongest decay there is: 0 in RWKV-6, 0.545 in RWKV-7."""

    @property
    def names(self) -> list[str]:
        """Of the values and gradients."""
        return ["y", "final_state", *(f"g{name}" for name in self.operator.inputs), "g_state"]

    def inputs(self, B, T, H, N, *, dtype=torch.float32, shared=False, seed=0) -> list[Tensor]:
        """The operator's inputs and the state, which want gradients."""
        g = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g)

        values = {name: normal(B, T, H, N) for name in self.operator.steps} | {
            name: normal(H, N) for name in self.operator.heads
        }
        if self.operator is wkv.WKV6:  # from "forgets at once" to "remembers for good"
            values["w"] = torch.rand(B, T, H, N, generator=g) * 10 - 7
        else:
            values["w"] = torch.rand(B, T, H, N, generator=g) * 14 - 8
            values["a"] = -torch.nn.functional.normalize(values["a"], dim=-1)
            values["b"] = -values["a"] * torch.rand(B, T, H, N, generator=g)
        steps = [values[name].to(dtype) for name in self.operator.steps]
        state = normal(H, N, N) if shared else normal(B, H, N, N)
        return [x.requires_grad_() for x in (*steps, *(values[name] for name in self.operator.heads), state)]


CASES = {
    "wkv6": Case(wkv.WKV6, wkv.wkv6, wkv6_reference, weakest=-30.0, strongest=6.0),
    "wkv7": Case(wkv.WKV7, wkv.wkv7, wkv7_reference, weakest=-30.0, strongest=30.0),
}


def values_and_gradients(operator: Callable, inputs: list[Tensor], lengths: Tensor | None, *, seed=1) -> list[Tensor]:
    """y, the final state, and the gradients of a random weighted sum of both, in the order of `Case.names`."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y, final_state = operator(*inputs, lengths)
    g = torch.Generator().manual_seed(seed)
    gy, g_final = (torch.randn(x.shape, generator=g) for x in (y, final_state))
    loss = (y.double() * gy.to(y.device)).sum() + (final_state.double() * g_final.to(y.device)).sum()
    return [y, final_state, *torch.autograd.grad(loss, inputs)]


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double().cpu() - want.double()).norm() / want.double().norm()).item()
