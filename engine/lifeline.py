"""How the ranks of a run end together: when one fails, the others end within seconds.

A rank that waits for the others in a collective sees no exception when one of them fails, and NCCL
may wait for minutes. So every rank has a plain TCP connection to the first rank, and a thread that
reads it:

- A rank that fails sends its exit code and its message. The first rank prints the message, tells
  the others, and ends with that exit code. So do the others when they see the first rank's end.
- A connection that closes without a goodbye says that its process was killed or has crashed.
- At the end of a run all ranks say goodbye.

Only the first rank prints. It works alike whoever started the ranks: engine/launch.py or torchrun.
This file imports no torch while it is imported. With one rank, none of it is used.
"""

import contextlib
import json
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple, NoReturn

from tqdm import tqdm

from config import ConfigError, Diverged, ExperimentError

if TYPE_CHECKING:
    from engine.distributed import Ranks

CONNECT_SECONDS = 60
# After a peer has failed, this rank's main thread has a moment to end by the same error, whose
# message is then its own.
GRACE_SECONDS = 2.0
# All ranks raise these errors alike. The first rank then writes the results of the run and draws
# its curves, before it ends.
GRACE_OF_CODE = {ConfigError.exit_code: 30.0, Diverged.exit_code: 30.0}
# A collective raises an error when a peer has ended. An error that may be such an echo waits so
# long for the word of what the peer died of. The first rank waits less: an error that all ranks
# have is then its own.
ECHO_SECONDS = 2.0
ECHO_SECONDS_OF_FIRST = 1.0
MAY_BE_AN_ECHO = ExperimentError.exit_code
# Whoever started the ranks may know more of a death than that the connection closed.
LAUNCHER_SECONDS = 1.0
# After the grace of the first rank: then the others end by themselves.
MARGIN_SECONDS = 4.0
# Before the ranks are connected: if the first rank has the same error, it ends, and this process is
# ended with it before it says the same.
UNCONNECTED_SECONDS = 3.0

# A machine that loses its power closes no connection. TCP then looks for it, and gives it up after
# 30 + 6 * 10 seconds.
KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}


class Failure(NamedTuple):
    """Why a run ends: which rank failed, with which exit code, and what there is to say of it."""

    rank: int
    code: int
    text: str


class _State:
    """What this process knows of the run of which it is a rank."""

    def __init__(self) -> None:
        self.rank = 0
        self.size = 1
        self.ranks: Ranks | None = None
        self.stderr = 2  # the descriptor for what must be read; see `begin`
        self.connections: dict[int, socket.socket] = {}  # by the peer's rank
        self.left: set[int] = set()  # peers that have said goodbye
        self.is_over = False  # this rank has said goodbye
        self.peer_has_failed = threading.Event()
        self.first_failure = threading.Lock()  # taken by the first failure of a peer, for good
        self.end = threading.Lock()  # taken by the thread that ends this process, for good


_state = _State()


def begin(rank: int, size: int) -> None:
    """Notes that this process is one of several ranks. From now on only the first rank prints.

    What the others print goes to /dev/null, that of libraries in C and of child processes included.
    """
    _state.rank = rank
    _state.size = size
    if rank == 0:
        return
    sys.stdout.flush()
    sys.stderr.flush()
    _state.stderr = os.dup(2)
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    os.close(nothing)


def warn(text: str) -> None:
    """Prints a warning of this rank, on the real stderr although only the first rank prints."""
    if _state.rank == 0:
        tqdm.write(text, file=sys.stderr)  # above a progress bar
    else:
        _print_of_rank(_state.rank, text)


def is_active() -> bool:
    """Whether this process is one of several ranks, whose run has not come to its good end."""
    return _state.size > 1 and not _state.is_over


def is_connected() -> bool:
    """Whether `join` has connected this rank."""
    return bool(_state.connections)


# ---------------------------------------------------------------- the connections


def join(ranks: "Ranks") -> None:
    """Connects every rank with the first one. All ranks call it together, once."""
    if ranks.size == 1:
        return
    _state.ranks = ranks
    os.register_at_fork(after_in_child=_forget_connections)
    if ranks.is_first:
        _accept_peers(ranks)
    else:
        _connect_to_first(ranks)


def _accept_peers(ranks: "Ranks") -> None:
    on_one_machine = ranks.local_size == ranks.size
    host = "127.0.0.1"
    if not on_one_machine:
        host = os.environ["MASTER_ADDR"]  # of the first rank's machine
    # Another program may connect by mistake: it does not know the secret.
    secret = secrets.token_hex()
    with _server(on_one_machine) as server:
        server.settimeout(CONNECT_SECONDS)
        ranks.value_of_first((host, server.getsockname()[1], secret))
        while len(_state.connections) < ranks.size - 1:
            try:
                connection, _ = server.accept()
            except TimeoutError as error:
                raise ExperimentError(_not_connected_message(ranks.size)) from error
            connection.settimeout(CONNECT_SECONDS)
            messages = _messages(connection)
            greeting = next(messages, None)
            if not isinstance(greeting, dict) or greeting.get("secret") != secret:
                connection.close()
                continue
            _watch(greeting["rank"], connection, messages)


def _server(on_one_machine: bool) -> socket.socket:
    """A socket that ranks connect to, on any free port."""
    if on_one_machine:
        return socket.create_server(("127.0.0.1", 0))
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _not_connected_message(size: int) -> str:
    missing = sorted(set(range(1, size)) - _state.connections.keys())
    return (
        f"no connection from rank {', '.join(map(str, missing))} within {CONNECT_SECONDS} seconds: "
        "let the machines of a run connect to any port of the first one"
    )


def _connect_to_first(ranks: "Ranks") -> None:
    host, port, secret = ranks.value_of_first()
    connection = socket.create_connection((host, port), timeout=CONNECT_SECONDS)
    _send(connection, dict(rank=ranks.rank, secret=secret))
    _watch(0, connection, _messages(connection))


def _watch(peer: int, connection: socket.socket, messages: Iterator[dict]) -> None:
    """Lets a thread read what the peer sends."""
    connection.settimeout(None)
    _keep_alive(connection)
    _state.connections[peer] = connection
    read = _read_first_rank
    if _state.rank == 0:
        read = _read_peer
    threading.Thread(target=read, args=(peer, messages), daemon=True).start()


def _keep_alive(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in KEEPALIVE.items():
        if hasattr(socket, name):  # macOS has not all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _forget_connections() -> None:
    """In a process that was forked: else a connection would stay open when its rank dies."""
    for connection in _state.connections.values():
        os.close(connection.detach())
    _state.connections.clear()
    _state.size = 1


def _messages(connection: socket.socket) -> Iterator[dict]:
    """The messages that come, each a line of JSON, until the connection closes."""
    with contextlib.suppress(OSError, ValueError):
        for line in connection.makefile("rb"):
            yield json.loads(line)


def _send(connection: socket.socket, message: dict) -> None:
    with contextlib.suppress(OSError):  # the peer is gone
        connection.sendall(json.dumps(message).encode() + b"\n")


def _send_to_all(message: dict) -> None:
    for connection in list(_state.connections.values()):
        _send(connection, message)


# ---------------------------------------------------------------- the end of a run


GOODBYE = dict(goodbye=True)


def leave() -> None:
    """Ends the run well, also after a signal. All ranks call it together; they wait for the last.

    From now on the ranks end each by itself.
    """
    if _state.ranks is None:
        return
    import torch.distributed

    _state.ranks.wait_for_all()
    _state.is_over = True
    _send_to_all(GOODBYE)
    torch.distributed.destroy_process_group()


def has_left(peer: int) -> bool:
    """Whether nothing is wrong when this peer's process ends."""
    return _state.is_over or peer in _state.left


def fail(code: int, text: str) -> NoReturn:
    """Ends this rank with an exit code, and with it the run. `text` is what the user should read.

    The main thread calls it. An error that may be the echo of a peer's failure gives way to that.
    """
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    # torchrun sends SIGTERM to the others when one rank has ended: the exit code stays this one.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(code))
    failure = Failure(_state.rank, code, text)
    if _state.rank == 0:
        _wait_if_an_echo(code, ECHO_SECONDS_OF_FIRST)
        _end(failure)
    _wait_if_an_echo(code, ECHO_SECONDS)
    if is_connected():
        _send_to_all(failure._asdict())
        # The first rank speaks first. Whoever started the ranks may end it when this one has ended.
        time.sleep(_grace(code) + MARGIN_SECONDS)
    else:
        time.sleep(UNCONNECTED_SECONDS)
        _print(failure)
    os._exit(code)


def _wait_if_an_echo(code: int, seconds: float) -> None:
    """Does not return when a peer's failure becomes known, which may be the cause of this one."""
    if code == MAY_BE_AN_ECHO and is_connected() and _state.peer_has_failed.wait(seconds):
        _wait_to_be_ended()


def peer_failed(failure: Failure) -> None:
    """Ends the first rank's process because of a peer. It is called outside of the main thread."""
    if not _state.first_failure.acquire(blocking=False):
        return
    _make_known(failure)
    time.sleep(_grace(failure.code))
    _end(failure)


def _make_known(failure: Failure) -> None:
    """On the first rank: tells all ranks of a failure, before their collectives fail for it."""
    _state.peer_has_failed.set()
    _send_to_all(failure._asdict())


def _grace(code: int) -> float:
    if not is_connected():
        return GRACE_SECONDS
    return GRACE_OF_CODE.get(code, GRACE_SECONDS)


def _end(failure: Failure) -> NoReturn:
    """Ends the first rank's process, and says why. Of several threads one does so."""
    if not _state.end.acquire(blocking=False):
        _wait_to_be_ended()
    _send_to_all(failure._asdict())
    _print(failure)
    # Not sys.exit: the process group's own end could wait for ranks that are gone.
    os._exit(failure.code)


def _print(failure: Failure) -> None:
    if failure.text:
        _print_of_rank(failure.rank, failure.text)


def _print_of_rank(rank: int, text: str) -> None:
    if rank != 0:
        text = f"rank {rank}: {text}"
    if os.isatty(_state.stderr):
        text = f"\n{text}"  # below a progress bar
    with contextlib.suppress(OSError):
        # To the descriptor, as in a signal's handler: the main thread may be in a print, and hold
        # its lock. A reader that does not read is not waited for.
        _, is_ready, _ = select.select([], [_state.stderr], [], 1)
        if is_ready:
            os.write(_state.stderr, f"{text}\n".encode(errors="backslashreplace"))


def _wait_to_be_ended() -> NoReturn:
    """Returns never: another thread is about to end this process."""
    while True:
        time.sleep(1)


# ---------------------------------------------------------------- the threads that read


def _read_peer(peer: int, messages: Iterator[dict]) -> None:
    """On the first rank: reads what a peer sends, to its end."""
    for message in messages:
        if message == GOODBYE:
            _state.left.add(peer)
            return
        peer_failed(Failure(**message))
    if _state.is_over:
        return
    failure = Failure(peer, 1, "it was killed or has crashed: its connection closed")
    _make_known(failure)
    time.sleep(LAUNCHER_SECONDS)
    peer_failed(failure)


def _read_first_rank(first: int, messages: Iterator[dict]) -> None:
    """On the other ranks: ends this process when the first rank ends after a failure."""
    code = None
    for message in messages:
        if message == GOODBYE:
            return
        code = message["code"]
        _state.peer_has_failed.set()
        _exit_later(code)
    if _state.is_over:
        return
    if code is None:
        code = 1
        if _state.rank == 1:
            text = "the first rank was killed or has crashed: its connection closed"
            _print(Failure(_state.rank, code, text))
    os._exit(code)


def _exit_later(code: int) -> None:
    """Ends this process even if the first rank does not end."""
    timer = threading.Timer(_grace(code) + MARGIN_SECONDS, os._exit, [code])
    timer.daemon = True
    timer.start()
