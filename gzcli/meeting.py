"""How several machines find each other before a training starts: machine 0 makes the run, the others are told
which one it is, over TCP, at the port that torch's processes use afterwards.

Nothing that is received is more than a name: a run is looked up in the machine's own store.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from gzcli.core.errors import MissingError, UsageError

PATIENCE = 1800.0  # seconds for the others: somebody may still be typing, or a machine be packing its images
ANSWER = 10.0  # seconds for an answer of a machine that is there
LOOKING = 90.0  # seconds for the answer of one that looks for the run on a slow disk
LONGEST = 4096  # bytes of a message
FIRST, PORTS = 20_000, 10_000  # below the ports that systems give to outgoing connections
Facts = Mapping[str, Any]


def port_of(job: Sequence[object]) -> int:
    """The port of a job: the same on all its machines, and another one for most other jobs.

    job: what all machines know of the job.
    """
    digest = hashlib.sha256(json.dumps([str(word) for word in job]).encode()).digest()
    return FIRST + int.from_bytes(digest[:4], "big") % PORTS


def gather(
    port: int, facts: Facts, run: str, say: Callable[[str], None], *, patience: float = PATIENCE
) -> None:
    """Machine 0: waits for all others at a port, and tells them the run.

    facts: what must be the same on all machines; `machines` is their number.
    run: id of the run.
    say: takes a line about what is waited for.
    patience: seconds to wait.

    Raises MissingError where the port is taken, a machine does not come, or one does not see the run.
    """
    others, deadline = set(range(1, facts["machines"])), time.monotonic() + patience
    joined: dict[int, socket.socket] = {}
    with _listen(port) as server, ExitStack() as peers:
        say(f"waiting for {_machines(others)} at port {port}")
        while missing := others - set(joined):
            if time.monotonic() > deadline:
                raise MissingError(
                    f"{_machines(missing)} did not come to port {port}",
                    hint="the same command is needed there, with its own `--machine-rank`; is the port open?",
                )
            try:
                peer = peers.enter_context(server.accept()[0])
            except TimeoutError:
                continue
            peer.settimeout(ANSWER)
            hello = _receive(peer) or {}
            rank, theirs = hello.get("rank"), hello.get("facts")
            if not isinstance(rank, int) or rank not in others or not isinstance(theirs, dict):
                continue  # a stranger, or a machine that there should not be
            if problem := _different(facts, theirs):
                _send(peer, {"problem": problem})
                say(f"machine {rank} was turned away: {problem}")
            else:
                joined[rank] = peer  # a machine that comes again has lost its earlier connection
        for peer in joined.values():
            _send(peer, {"run": run})
        for rank, peer in sorted(joined.items()):
            peer.settimeout(LOOKING)
            answer = _receive(peer) or {"problem": "it is gone"}
            if problem := answer.get("problem"):
                raise MissingError(f"machine {rank} cannot take part: {problem}", hint=SHARED)


def join(
    host: str,
    port: int,
    rank: int,
    facts: Facts,
    find: Callable[[str], str | None],
    say: Callable[[str], None],
    *,
    patience: float = PATIENCE,
) -> str:
    """Another machine: comes to machine 0. Returns the id of the run.

    host: address of machine 0.
    port: its port.
    rank: index of this machine.
    facts: what must be the same on all machines.
    find: id of a run → why this machine cannot take part in it, or None.
    say: takes a line about what is waited for.
    patience: seconds to wait.

    Raises UsageError where machine 0 was asked for something else, MissingError where it is not there or its
    run is not seen here.
    """
    say(f"waiting for machine 0 at {host}:{port}")
    deadline = time.monotonic() + patience
    with _connected(host, port, deadline) as server:
        server.settimeout(max(1.0, deadline - time.monotonic()))
        _send(server, {"rank": rank, "facts": dict(facts)})
        answer = _receive(server)
        if answer is None:
            raise MissingError(
                f"machine 0 at {host}:{port} gave up, or has no machine {rank}",
                hint="`--num-machines` and `--main-process-port` must be the same on all machines",
            )
        if problem := answer.get("problem"):
            raise UsageError(f"machine 0 was asked for something else: {problem}", hint=SAME)
        run = str(answer.get("run"))
        problem = find(run)
        _send(server, {"problem": problem})
    if problem:
        raise MissingError(problem, hint=SHARED)
    return run


SHARED = "set `GZ_HOME` to one folder on a disk that all machines share"
SAME = "type the same command on all machines, but for `--machine-rank`"


def interface(host: str) -> str | None:
    """The name of the network interface by which this machine reaches a host; None where that is unknown, or
    only because the host's name means this machine's own loopback."""
    import psutil

    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    if own.startswith("127.") and not host.startswith("127."):
        return None
    found = psutil.net_if_addrs().items()
    return next((name for name, addresses in found if own in (a.address for a in addresses)), None)


def _machines(ranks: set[int]) -> str:
    return f"machine{'s' if len(ranks) > 1 else ''} {', '.join(map(str, sorted(ranks)))}"


def _different(ours: Facts, theirs: Facts) -> str | None:
    """What machine 0 and another one were asked for that is not the same, in words; None: all is the same."""
    keys = (key for key in ours if ours[key] != theirs.get(key))
    return ", ".join(f"{key} {ours[key]} there, {theirs.get(key)} here" for key in keys) or None


def _listen(port: int) -> socket.socket:
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both)
    except OSError as problem:
        raise MissingError(
            f"port {port}, where the machines are to meet, cannot be used: "
            f"{os.strerror(problem.errno or 0).lower()}",
            hint="`--main-process-port P`, on all machines, takes another one",
        ) from problem
    server.settimeout(0.5)
    return server


def _connected(host: str, port: int, deadline: float) -> socket.socket:
    """A connection to machine 0, which is tried until it is there."""
    while True:
        try:
            return socket.create_connection((host, port), timeout=ANSWER)
        except socket.gaierror as problem:
            raise MissingError(
                f"no host is called `{host}`", hint="`--main-process-ip` is the address of machine 0"
            ) from problem
        except OSError as problem:
            if time.monotonic() > deadline:
                raise MissingError(
                    f"machine 0 is not at {host}:{port}: {problem}",
                    hint="start it there with `--machine-rank 0`; is the port open?",
                ) from problem
            time.sleep(0.2)


def _send(peer: socket.socket, message: Facts) -> None:
    """Sends a message, as a line of JSON. One who is gone is noticed where an answer is awaited."""
    try:
        peer.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return


def _receive(peer: socket.socket) -> dict[str, Any] | None:
    """A message; None for anything else, or where the other is gone."""
    try:
        with peer.makefile("rb") as lines:
            found = json.loads(lines.readline(LONGEST))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
