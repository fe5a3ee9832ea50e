"""The server's process: bind, serve, load, drain, leave.

HTTP answers from the first moment (`/ready` says that the model is being loaded). SIGTERM or SIGINT: no new requests,
the running ones end or are cut off at the deadline, exit code 0; a second signal cuts them off at once. A dead engine:
`/health` fails, and shortly after the process leaves with one line and a code that is not 0.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import signal
import socket
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import uvicorn

from moesaic.assets import embedded_model
from moesaic.errors import MoesaicError, OptionError
from moesaic.serving.app import document, make_app
from moesaic.serving.auth import Keys
from moesaic.serving.errors import unavailable
from moesaic.serving.guard import guarded
from moesaic.serving.logs import log, set_up
from moesaic.serving.metrics import Metrics
from moesaic.serving.options import Resolved, ServeConfig
from moesaic.serving.parent import settle
from moesaic.serving.process import EngineFailed
from moesaic.serving.session import Session
from moesaic.serving.state import State

LINGER = 1.0
"""Seconds for which `/health` tells of a dead engine before the process leaves."""
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Server(uvicorn.Server):
    """uvicorn without its signal handlers: ours drain first, and do not die of the signal afterwards."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(options: Resolved) -> int:
    """Runs until told to stop. Returns the exit code; raises what keeps it from starting, or what killed the engine."""
    keys = Keys(options.serve.keys())
    metrics = Metrics(expert_series=options.serve.expert_series)
    set_up(options.serve, metrics.lost_logs.inc)
    listener = bind(options.serve)
    raise_descriptor_limit()
    if options.serve.exposed and not keys:
        log.warning("everybody who can reach %s may use this server: give it --api-key-file", options.serve.host)
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        return runner.run(run(options, keys, metrics, listener))


def loop_factory() -> type[asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    found: type[asyncio.AbstractEventLoop] = uvloop.Loop
    return found


async def run(options: Resolved, keys: Keys, metrics: Metrics, listener: socket.socket) -> int:
    config, session = options.serve, Session(metrics, options.serve.max_queue)
    model = options.model or str(embedded_model())
    names = config.served_model_name or (options.model or "tiny",)
    state = State(config, session, names, lambda: document(tuple(names), bool(keys)))
    server = Server(uvicorn.Config(
        make_app(state, keys), log_config=None, access_log=False, lifespan="off", ws="none", server_header=False,
        http=guarded(config.header_timeout, config.max_connections), proxy_headers=False,
        timeout_keep_alive=30, timeout_graceful_shutdown=2,
    ))  # fmt: skip
    stop = asyncio.Event()
    hurry = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, lambda: (hurry if stop.is_set() else stop).set())
    serving = loop.create_task(server.serve(sockets=[listener]))
    try:
        address = ":".join(map(str, listener.getsockname()[:2]))
        log.info("listening", extra={"fields": {"address": address, "model": model}})
        return await live(options, state, model, stop, hurry)
    finally:
        server.should_exit = True
        await serving
        await session.stop()


async def live(options: Resolved, state: State, model: str, stop: asyncio.Event, hurry: asyncio.Event) -> int:
    """From loading to the end of draining. Raises EngineFailed, or what is wrong with the tokenizer."""
    session, loop = state.session, asyncio.get_running_loop()
    engine = {name: value for name, value in asdict(options.engine).items()} | {"progress": False}
    loading = loop.create_task(start(state, model, engine))
    stopping = loop.create_task(stop.wait())
    await asyncio.wait({loading, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if not loading.done():
        loading.cancel()
        return 0
    loading.result()
    log.info("ready", extra={"fields": {"names": list(state.names), "summary": session.info["summary"]}})
    for note in session.info["notes"]:
        log.info("note: %s", note)
    settle()
    watching = loop.create_task(session.watch(options.serve.engine_timeout))
    ends: set[asyncio.Future[Any]] = {stopping, session.died}
    try:
        await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        if not stopping.done():
            stopping.cancel()
            return await mourn(session.died.result())
        await drain(session, options.serve.drain_timeout, hurry)
        return 0
    finally:
        watching.cancel()


async def start(state: State, model: str, engine: dict[str, object]) -> None:
    await state.session.start(model, engine, experts=state.config.expert_load)
    try:
        state.load()
    except MoesaicError:
        state.session.state = "dead"
        raise
    state.session.open()


async def mourn(error: EngineFailed) -> int:
    log.error("%s", error.one_line())
    await asyncio.sleep(LINGER)
    raise error


async def drain(session: Session, seconds: float, hurry: asyncio.Event) -> None:
    """Takes nothing new, and waits for what runs; what is left at the deadline is cut off and told so.

    Raises EngineFailed where the engine does not live so long.
    """
    session.state = "draining"
    log.info("draining", extra={"fields": {"running": len(session.jobs), "seconds": seconds}})
    deadline = asyncio.get_running_loop().time() + seconds
    while session.jobs and not hurry.is_set() and asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0.05)
    if session.state == "dead":
        raise await session.died
    left = set(session.jobs.values())
    for job in left:
        job.fail(unavailable("the server is shutting down", 10), "shutdown")
    log.info("drained", extra={"fields": {"cut_off": len(left)}})


def bind(config: ServeConfig) -> socket.socket:
    """The listening socket, before the model is loaded: a port in use is known at once. Raises OptionError."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        listener = socket.create_server((config.host, config.port), family=family, backlog=2048)
    except OSError as error:
        raise OptionError(f"{config.host}:{config.port} cannot be listened on ({error.strerror or error})",
                          where="--port", remedy="Choose another --host or --port.") from None  # fmt: skip
    listener.setblocking(False)
    return listener


def raise_descriptor_limit() -> None:
    """As many connections as the system lets us have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
