"""The WKV operator of RWKV-6 as plain fp64 loops: what every fast form is held against."""

import torch
from torch import Tensor


def wkv6_reference(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The recurrence as written in the RWKV-6 paper (Peng et al. 2024, arXiv:2404.05892, eq. 18-19).

    Args:
        r, k, v, w: (B, T, H, N); `w` is the log of minus the log of the decay, `d = exp(-exp(w))`.
        u: (H, N), the bonus of the current token.
        state: (H, N, N) shared by the batch, or (B, H, N, N); index [value, key].
        lengths: (B,) valid steps of each sample, or None for all T.

    Returns:
        y (B, T, H, N), zero at and after each sample's length, and the final state (B, H, N, N); both fp64
        and differentiable by autograd in all six inputs.
    """
    r, k, v, w, u, state = (x.double() for x in (r, k, v, w, u, state))
    B, T, H, N = r.shape
    decay = torch.exp(-torch.exp(w))
    per_sample = state.expand(B, H, N, N)
    outputs, finals = [], []
    for b in range(B):
        S = per_sample[b]  # (H, N value, N key)
        steps = T if lengths is None else int(lengths[b])
        ys = []
        for t in range(steps):
            kv = v[b, t, :, :, None] * k[b, t, :, None, :]  # (H, N value, N key)
            ys.append(((S + u[:, None, :] * kv) * r[b, t, :, None, :]).sum(-1))
            S = decay[b, t, :, None, :] * S + kv
        ys.extend(r.new_zeros(H, N) for _ in range(T - steps))
        outputs.append(torch.stack(ys))
        finals.append(S)
    return torch.stack(outputs), torch.stack(finals)
