"""Serving: an HTTP server that answers with several missions at a time."""

import importlib.util
import logging
import socket
from collections import Counter
from dataclasses import replace

from rwkv_speech.engine.machine import fit_to_machine
from rwkv_speech.errors import UserError
from rwkv_speech.ops.common import check_model_file, chosen_mission_files, load_model, longest_pieces
from rwkv_speech.options import Options

log = logging.getLogger("rwkv_speech")

NEEDED = ("starlette", "uvicorn", "python_multipart", "websockets")
MESSAGE = 1 << 20  # bytes of a websocket's
CONNECTIONS = 512  # at a time: more are told to come back, before anything is read


def serve(options: Options) -> int:
    """Answers requests until it is interrupted."""
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise UserError(f"--op serve needs {', '.join(missing)}: sh demo/setup.sh serve, or pip install '.[serve]'")
    if options.serving.speak and importlib.util.find_spec("hibari") is None:
        raise UserError("--speak needs the package hibari-tts: pip install hibari-tts")
    import uvicorn

    from rwkv_speech.serve.app import make_app
    from rwkv_speech.serve.connections import Connection
    from rwkv_speech.serve.guard import is_local

    serving = options.serving
    if serving.missions and options.model.adapter:
        raise UserError("--missions and --adapter both name mission files: leave one out")
    if serving.missions:
        options = replace(options, model=replace(options.model, adapter=serving.missions))
    check_model_file(options.model)
    with _listening(serving.host, serving.port) as listening:
        machine = fit_to_machine(options.machine)
        files = chosen_mission_files(options)
        model = load_model(options.model, files, machine.first_device, machine)
        named = [(name, file.mission) for file in files for name in {file.path.name, file.path.stem}]
        counts = Counter(name for name, _ in named)
        app = make_app(
            model,
            serving,
            files={name: mission for name, mission in named if counts[name] == 1 and mission in model.tasks},
            longest=longest_pieces(model, options),
            options=options.decoding,
        )
        host, port = listening.getsockname()[:2]
        log.info("serving %s at http://%s:%d", ", ".join(model.tasks), f"[{host}]" if ":" in host else host, port)
        if not serving.api_key and not is_local(host):
            log.warning("whoever reaches %s may use this server: --api_key asks them for a key", host)
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="websockets-sansio",
            ws_max_size=MESSAGE,
            log_level="warning",
            access_log=False,
            server_header=False,
            lifespan="on",
            limit_concurrency=CONNECTIONS,
            timeout_graceful_shutdown=5,
        )
        uvicorn.Server(config).run([listening])
    return 0


def _listening(host: str, port: int) -> socket.socket:
    """Taken before the model is read, which takes longer.

    Raises:
        UserError: it can't be had.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen()  # from now on, nobody else can
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--host {host} --port {port}: {reason}; --port 0 takes any that is free") from None
    return listening
