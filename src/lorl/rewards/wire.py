"""Length-prefixed JSON over a stream socket. What a worker sends is only ever parsed, never unpickled."""

import json
import socket
import struct
import time
from typing import Any

HEADER = struct.Struct("!I")
MAX_BYTES = 64 << 20


def send(channel: socket.socket, message: Any) -> None:
    send_encoded(channel, json.dumps(message).encode())


def send_encoded(channel: socket.socket, body: bytes) -> None:
    """Send a message that is JSON already."""
    channel.sendall(HEADER.pack(len(body)) + body)


def receive(channel: socket.socket, deadline: float | None = None) -> Any:
    """The next message.

    `deadline` is a value of `time.monotonic()`; past it TimeoutError is raised. EOFError when the other side is gone,
    ValueError when what came is not a message.
    """
    (length,) = HEADER.unpack(_exactly(channel, HEADER.size, deadline))
    if length > MAX_BYTES:
        raise ValueError(f"a message of {length} bytes")
    try:
        return json.loads(_exactly(channel, length, deadline))
    except RecursionError as error:
        raise ValueError("JSON nested too deeply") from error


def _exactly(channel: socket.socket, length: int, deadline: float | None) -> bytes:
    parts = bytearray()
    while len(parts) < length:
        if deadline is not None:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            channel.settimeout(remaining)
        part = channel.recv(min(length - len(parts), 1 << 20))
        if not part:
            raise EOFError
        parts += part
    return bytes(parts)
