"""Starting and reaping the engine's process."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from typing import Any

from moesaic.config import engine_environment
from moesaic.errors import MoesaicError


class EngineFailed(MoesaicError):
    """The engine could not start, or is gone. `code` is what the server exits with."""

    http_status = 503

    def __init__(self, line: str, code: int = 1) -> None:
        super().__init__(line)
        self.exit_code = code


class EngineProcess:
    """The process, and our end of the socket to it."""

    def __init__(self, process: asyncio.subprocess.Process, sock: socket.socket) -> None:
        self.process, self.sock = process, sock

    @property
    def pid(self) -> int:
        return self.process.pid

    @classmethod
    async def start(cls) -> EngineProcess:
        """Its own session: a Ctrl-C at the terminal is for the server, which decides how to end."""
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        argv: list[Any] = [sys.executable, "-m", "moesaic.serving.worker", str(theirs.fileno()), str(os.getpid())]
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *argv, stdin=asyncio.subprocess.DEVNULL, pass_fds=[theirs.fileno()], start_new_session=True,
                env=engine_environment(),
            )  # fmt: skip
        return cls(process, ours)

    async def ended(self) -> str:
        """Waits for its end; how it ended, in words."""
        code = await self.process.wait()
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    async def stop(self, patience: float = 5.0) -> None:
        """It leaves when its socket closes; one that does not is killed."""
        try:
            await asyncio.wait_for(self.process.wait(), patience)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()
