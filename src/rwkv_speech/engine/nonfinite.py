"""What happens when a loss is no number."""

import json
import logging
from pathlib import Path

from rwkv_speech.errors import UserError
from rwkv_speech.system import SpeechRWKV

log = logging.getLogger("rwkv_speech")


class NonFinite:
    """The policy for a loss that is NaN or infinite, and the record of the batches that gave it.

    policy: "stop" ends the run, "skip" goes on as if the batch had no targets.
    path: JSON-lines file; each line the step, and the ids of one process's batch.
    model: whose weights are looked at: where they are spoilt, nothing can be skipped.
    """

    def __init__(self, policy: str, path: Path, model: SpeechRWKV) -> None:
        self.policy, self.path, self.model = policy, path, model

    def __call__(self, step: int, ids: list[str]) -> None:
        """All processes call it together, with the ids of those batches whose loss is none, else without.

        Raises:
            UserError: the policy is to stop, or a trained weight is not finite either.
        """
        if ids:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps({"step": step, "ids": ids}, ensure_ascii=False) + "\n")
        spoilt = not all(bool(x.isfinite().all()) for x in self.model.trainable_state_dict().values())
        what = f"the loss of step {step} is not finite; the batch is listed in {self.path}"
        if spoilt:
            raise UserError(f"{what}, and the weights are spoilt: start from the last mission file by --adapter, "
                            "with a lower --lr_init")  # fmt: skip
        if self.policy == "stop":
            raise UserError(f"{what}; look at it, or go on without such batches by --on_nonfinite skip")
        log.warning("%s and skipped", what)
