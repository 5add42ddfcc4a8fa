"""The entry point: read the flags, then do what they ask."""

import logging
import signal
import sys

from rwkv_speech import terminal
from rwkv_speech.engine.lock import is_first_process
from rwkv_speech.errors import UserError
from rwkv_speech.options import Options


def main() -> int:
    to_terminal = logging.StreamHandler(sys.stderr)
    to_terminal.setFormatter(terminal.LogFormatter())
    logging.basicConfig(handlers=[to_terminal], level=logging.WARNING)
    # Of several processes the first one logs, the others only warn.
    first = is_first_process()
    logging.getLogger("rwkv_speech").setLevel(logging.INFO if first else logging.WARNING)
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
        if first:
            print("train.py: interrupted; files that are complete stay", file=sys.stderr)
        return 128 + signal.SIGINT


if __name__ == "__main__":
    terminal.prepare()
    sys.exit(main())
