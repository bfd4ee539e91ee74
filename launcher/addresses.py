"""Addresses of the hosts of a run."""

from __future__ import annotations

import re
import socket

from launcher.commands import Endpoint
from mpotrain.errors import ConfigError

DEFAULT_PORT = 29_500
_ENDPOINT = re.compile(r"(?P<address>\[[0-9A-Fa-f:.%\w]+\]|[A-Za-z0-9_.-]+)(?::(?P<port>\d{1,5}))?")


def parse_endpoint(text: str) -> Endpoint:
    """Read `ADDRESS[:PORT]`; an IPv6 address stands in brackets.

    Raises:
        ConfigError: it is something else.
    """
    match = _ENDPOINT.fullmatch(text)
    port = int(match["port"] or DEFAULT_PORT) if match is not None else 0
    if match is None or text.startswith("-") or not 0 < port < 65_536:
        raise ConfigError(
            [f"command line: --master: {text!r} is not ADDRESS:PORT (or [IPV6]:PORT)"]
        )
    return Endpoint(match["address"].strip("[]"), port)


def own_address(master: Endpoint) -> str | None:
    """Return the address at which hosts on the way to `master` reach this one.

    The kernel is asked which of its addresses it would use; nothing is sent.

    Args:
        master: another host, or this one.

    Returns:
        The address; None where the name cannot be resolved or there is no way.
    """
    try:
        found = socket.getaddrinfo(master.address, master.port, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return str(probe.getsockname()[0])
        except OSError:
            continue
    return None
