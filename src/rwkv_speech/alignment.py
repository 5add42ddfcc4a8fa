"""An auxiliary loss that draws the adapter's outputs towards the language model's own embeddings: CTC against them.

CTC: Graves et al. 2006, "Connectionist Temporal Classification". The classes are the whole vocabulary, a position's
logits the cosines between the adapter's output and the frozen embeddings, times `SCALE`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SCALE = 12.0  # cosines lie within one of zero; so scaled they can give a token a probability near one
BLANK = 1  # token of the byte 0, which no transcript holds
ROWS = 256  # positions whose logits over the whole vocabulary are held at once
SMALLEST_NORM = 1e-8  # of an embedding; one of zeros has a cosine of zero


def fits(tokens: Tensor, positions: int) -> bool:
    """Whether CTC can align 1-D tokens to so many positions: each needs one, and equal neighbours a blank between."""
    return len(tokens) + int((tokens[1:] == tokens[:-1]).sum()) <= positions


def alignment_loss_sum(audio_embeds: Tensor, lengths: Tensor, tokens: Sequence[Tensor], embeddings: Tensor) -> Tensor:
    """The CTC loss summed over utterances (fp32 scalar), differentiable in `audio_embeds`.

    Args:
        audio_embeds: (B, G, C), the adapter's outputs.
        lengths: (B,) int64 on the CPU, the valid positions of each.
        tokens: of each transcript, 1-D int64 on the CPU. One that doesn't fit into its positions adds nothing.
        embeddings: (V, C), frozen.
    """
    device = audio_embeds.device
    flat = torch.cat([row[:n] for row, n in zip(audio_embeds, lengths.tolist(), strict=True)])
    classes = torch.unique(torch.cat([torch.tensor([BLANK]), *tokens]))
    targets, blank = torch.searchsorted(classes, torch.cat(list(tokens))), int(torch.searchsorted(classes, BLANK))
    classes = classes.to(device)
    norms = torch.linalg.vector_norm(embeddings, dim=1, dtype=torch.float32).clamp(min=SMALLEST_NORM)
    parts = [
        checkpoint(_class_logits, rows, classes, embeddings, norms, use_reentrant=False) for rows in flat.split(ROWS)
    ]
    log_probs = torch.cat(parts).log_softmax(dim=1)
    padded = torch.nn.utils.rnn.pad_sequence(log_probs.split(lengths.tolist()))  # (G, B, classes)
    return F.ctc_loss(
        padded,
        targets.to(device),
        lengths,
        torch.tensor([len(t) for t in tokens]),
        blank=blank,
        reduction="sum",
        zero_infinity=True,
    )


def _class_logits(rows: Tensor, classes: Tensor, embeddings: Tensor, norms: Tensor) -> Tensor:
    """(R, C) -> (R, classes + 1) in fp32: the classes' logits, and the rest of the vocabulary's as one."""
    cosines = (F.normalize(rows, dim=1) @ embeddings.T).float() / norms
    logits = SCALE * cosines
    rest = logits.index_fill(1, classes, float("-inf")).logsumexp(dim=1, keepdim=True)
    return torch.cat([logits[:, classes], rest], dim=1)
