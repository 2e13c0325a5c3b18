"""A host and a port that are wished for in, a listening socket and its name to others out."""

from __future__ import annotations

import errno
import ipaddress
import logging
import socket
from collections.abc import Mapping, Sequence

from gradwatch.saying import say

__all__ = [
    "PORTS_TRIED", "is_loopback", "listen_near", "listening", "local_rank", "local_size",
    "reachable",
]  # fmt: skip

PORTS_TRIED = 16
BACKLOG = 64
HIGHEST = 65535
LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID")
LOCAL_SIZES = ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE")
"""Set by torchrun, and by SLURM; the first one holds where SLURM has started torchrun."""

MOST_DIGITS = 5


def local_rank(environment: Mapping[str, str]) -> int:
    """Which process of its machine this one is, from 0; 0 where nobody says."""
    return _number(environment, LOCAL_RANKS, 0)


def local_size(environment: Mapping[str, str]) -> int:
    """How many processes its machine has; 1 where nobody says."""
    return _number(environment, LOCAL_SIZES, 1)


def _number(environment: Mapping[str, str], names: Sequence[str], otherwise: int) -> int:
    said = (environment.get(name, "") for name in names)
    return next(
        (int(one) for one in said if one.isdecimal() and len(one) <= MOST_DIGITS), otherwise
    )


def listen_near(host: str, first: int, offset: int = 0, siblings: int = 1) -> socket.socket | None:
    """Listens on `first + offset`, or on a free one of the 16 from `first` on.

    One warning where that is another port, or where there is none; a `first` of 0 takes any free
    port.

    Args:
        siblings: processes of which each has a port from `first` on; theirs are tried last.
    """
    port = first + offset if first else 0
    last = min(first + max(offset, PORTS_TRIED - 1), HIGHEST) if first else 0
    theirs = min(max(first + siblings, port + 1), last + 1)
    others = (*range(theirs, last + 1), *range(port + 1, theirs), *range(first, port))
    for candidate in (port, *others) if port <= HIGHEST else others:
        try:
            listener = listening(host, candidate)
        except (OSError, OverflowError, UnicodeError) as error:
            if getattr(error, "errno", None) == errno.EADDRINUSE:
                continue
            say(
                logging.WARNING,
                "metrics are not served: cannot listen on %s:%d (%s)", host, port, error,
            )  # fmt: skip
            return None
        if candidate != port and port:
            say(
                logging.WARNING,
                "port %d %s, metrics are served on port %d instead; choose one with port=",
                port, "is taken" if port <= HIGHEST else "does not exist", candidate,
            )  # fmt: skip
        return listener
    say(
        logging.WARNING,
        "metrics are not served: the ports %d to %d of %s are all taken; choose one with port=",
        first, last, host,
    )  # fmt: skip
    return None


def reachable(address: str, port: int) -> str:
    """`host:port` of a bound address as others reach it: a name where all are listened on."""
    bound = ipaddress.ip_address(address.partition("%")[0])
    host = _own_name() if bound.is_unspecified else address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def listening(host: str, port: int) -> socket.socket:
    """Listens on that port and no other; 0 takes any free one.

    Raises:
        OSError: no such host, or the port is taken or not allowed.
    """
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    families = {family: address for family, _, _, _, address in reversed(found)}
    # Where a name stands for both, as localhost does, most clients try IPv4.
    family = socket.AF_INET if socket.AF_INET in families else found[0][0]
    address = families[family]
    everywhere = family == socket.AF_INET6 and ipaddress.ip_address(address[0]).is_unspecified
    return socket.create_server(
        (str(address[0]), int(address[1])),
        family=family,
        backlog=BACKLOG,
        dualstack_ipv6=everywhere and socket.has_dualstack_ipv6(),
    )


def _own_name() -> str:
    """Of this machine; the domain is asked for only where the name has none."""
    name = socket.gethostname()
    full = name if "." in name else socket.getfqdn()
    return name if full.startswith("localhost") or full.endswith(".arpa") else full
