"""The entry point: read the flags, then do what they ask."""

import logging
import os
import sys

from rwkv_speech import terminal
from rwkv_speech.errors import UserError
from rwkv_speech.options import Options


def main() -> int:
    to_terminal = logging.StreamHandler(sys.stderr)
    to_terminal.setFormatter(terminal.LogFormatter())
    logging.basicConfig(handlers=[to_terminal], level=logging.WARNING)
    # Of several processes the first one logs, the others only warn.
    others = any(int(os.environ.get(rank, 0)) for rank in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    logging.getLogger("rwkv_speech").setLevel(logging.WARNING if others else logging.INFO)
    try:
        options = Options.parse()
        from rwkv_speech.ops import OPS  # torch and Lightning take seconds, which a wrong flag need not wait for

        return OPS[options.op](options)
    except UserError as error:
        terminal.complain(str(error))
        return 2
    except OSError as error:
        if error.errno is None:  # a library's own
            raise
        where = f"{error.filename}: " if error.filename else ""
        terminal.complain(f"{where}{error.strerror}; what was written before is whole")
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    terminal.prepare()
    sys.exit(main())
