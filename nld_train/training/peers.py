"""Ranks notice at once that another one is gone, whatever the main threads wait for.

Every rank keeps a connection to rank 0 open. The kernel closes it when a process dies, and answers keep-alive probes as
long as the machine lives: no message is sent while all is well, no collective is needed, and it is the same under gloo
and NCCL, torchrun and srun. (A rank that is there and does nothing is the watchdog's business.)
"""

import contextlib
import json
import os
import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist

_CONNECT_TIMEOUT = 60.0  # seconds, of all ranks to rank 0
# Seconds until the first probe, between probes, and how many stay without an answer: a machine that is gone is noticed
# after 11 s.
_KEEP_ALIVE = ((socket.TCP_KEEPIDLE, 3), (socket.TCP_KEEPINTVL, 2), (socket.TCP_KEEPCNT, 4))


@dataclass(frozen=True, slots=True)
class Notice:
    """What a rank tells the others before it ends."""

    rank: int
    kind: str  # "done", "failed" or "stalled"
    status: int = 0
    message: str = ""


class Peers:
    """The connections of one rank, and the thread that listens to them.

    Args:
        on_notice: called in the thread, when another rank has failed or stalled.
        on_loss: called in the thread, with the rank that went without a word.
    """

    def __init__(self, on_notice: Callable[[Notice], None], on_loss: Callable[[int], None]) -> None:
        self._on_notice = on_notice
        self._on_loss = on_loss
        self._rank = 0
        self._connections: dict[socket.socket, int] = {}
        self._lock = threading.Lock()
        self._main_is_done = threading.Event()

    def connect(self, group: dist.ProcessGroup | None = None) -> None:
        """Meet all ranks. Collective."""
        self._rank, world_size = dist.get_rank(), dist.get_world_size()
        if world_size == 1:
            return
        server: socket.socket | None = None
        where: list[Any] = [None]
        if self._rank == 0:
            server = _server(world_size)
            where = [(server.getsockname()[1], secrets.token_hex(8))]
        dist.broadcast_object_list(where, src=0, group=group)
        port, token = where[0]
        if server is None:
            connection = socket.create_connection((os.environ["MASTER_ADDR"], port), timeout=_CONNECT_TIMEOUT)
            connection.sendall(f"{token} {self._rank}\n".encode())
            self._add(connection, 0)
        else:
            with server:
                server.settimeout(_CONNECT_TIMEOUT)
                while len(self._connections) < world_size - 1:
                    connection, _ = server.accept()
                    connection.settimeout(_CONNECT_TIMEOUT)
                    with connection.makefile("rb") as stream:
                        words = stream.readline().decode(errors="replace").split()
                    if len(words) == 2 and words[0] == token:
                        self._add(connection, int(words[1]))
                    else:
                        connection.close()  # a stranger
        threading.Thread(target=self._listen, name="peers", daemon=True).start()

    def tell(self, kind: str, status: int = 0, message: str = "") -> None:
        """Say that this rank ends, and how."""
        self._send(Notice(self._rank, kind, status, message))

    def end_after_main(self, timeout: float) -> None:
        """End together: rank 0 when it has nothing left to do, the others when it says so, since launchers end the
        ranks that are left when the first one has gone."""
        self.tell("done")
        if self._rank != 0:
            self._main_is_done.wait(timeout)

    def _add(self, connection: socket.socket, rank: int) -> None:
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        self._connections[connection] = rank

    def _send(self, notice: Notice) -> None:
        line = json.dumps(asdict(notice)).encode() + b"\n"
        with self._lock:
            for connection, rank in self._connections.items():
                if rank != notice.rank:
                    with contextlib.suppress(OSError):  # it is gone already, which the listener sees
                        connection.sendall(line)

    def _listen(self) -> None:
        selector = selectors.DefaultSelector()
        received: dict[socket.socket, bytes] = {}
        for peer in self._connections:
            selector.register(peer, selectors.EVENT_READ)
            received[peer] = b""
        while received:
            for key, _ in selector.select():
                connection: Any = key.fileobj
                data = b""
                with contextlib.suppress(OSError):
                    data = connection.recv(4096)
                received[connection] += data
                *lines, received[connection] = received[connection].split(b"\n")
                is_done = False
                for line in lines:
                    is_done = self._heard(Notice(**json.loads(line))) or is_done
                if is_done or not data:
                    selector.unregister(connection)
                    del received[connection]
                if not data and not is_done:
                    self._on_loss(self._connections[connection])

    def _heard(self, notice: Notice) -> bool:
        """True: the rank is done."""
        if notice.kind == "done":
            if notice.rank == 0:
                self._main_is_done.set()
            return True
        if self._rank == 0:
            self._send(notice)  # the others know rank 0 alone
        self._on_notice(notice)
        return False


def _server(world_size: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=world_size)
    return socket.create_server(("", 0), backlog=world_size)
