"""Network of the nodes: a bridge, a network namespace for each node and a cable between (netns)."""

from __future__ import annotations

import ipaddress
import json
import subprocess
from pathlib import Path

from slurmlab.settings import LabError, Place

INTERFACES = Path("/sys/class/net")
IFF_UP = 1
"""Bit of an interface's flags: set up by its owner."""


def ip(*arguments: str) -> str:
    """Run the program `ip` and return its output.

    Raises:
        LabError: it failed; the text is its own.
    """
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LabError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def taken_networks() -> list[ipaddress.IPv4Network]:
    """Return the networks that this machine has routes to, the default route aside."""
    routes = json.loads(ip("-json", "-4", "route", "show", "table", "all") or "[]")
    names = [route["dst"] for route in routes if route.get("dst", "default") != "default"]
    return [ipaddress.IPv4Network(name, strict=False) for name in names]


def slot_network(slot: int) -> ipaddress.IPv4Network:
    """Return the network of a slot."""
    return ipaddress.IPv4Network(f"10.99.{slot}.0/24")


def make_bridge(place: Place) -> bool:
    """Make the lab's bridge; return False where another lab has this slot.

    The kernel makes a name once, so this also decides between labs that start together.
    """
    if any(network.overlaps(slot_network(place.slot)) for network in taken_networks()):
        return False
    try:
        ip("link", "add", place.bridge, "type", "bridge")
    except LabError as error:
        if "File exists" in str(error):
            return False
        raise
    ip("link", "set", place.bridge, "alias", str(place.folder))
    ip("addr", "add", f"{place.control_address}/24", "dev", place.bridge)
    ip("link", "set", place.bridge, "up")
    return True


def bridges_of(folder: Path) -> list[str]:
    """Return the bridges that belong to the lab in `folder`."""
    found = []
    for path in INTERFACES.glob("slab*/ifalias"):
        try:
            if path.read_text(encoding="utf-8").strip() == str(folder):
                found.append(path.parent.name)
        except OSError:
            continue  # gone between the two looks
    return found


def remove_bridge(bridge: str) -> None:
    """Remove a bridge with all network namespaces and cables that hang on it."""
    for line in ip("netns", "list").splitlines():
        name = line.split()[0]
        if name.startswith(f"{bridge}-n"):
            _remove_namespace(name, f"{bridge}n{name.removeprefix(f'{bridge}-n')}")
    ip("link", "del", bridge)


def plug(place: Place, index: int) -> None:
    """Give node `index` a fresh network namespace with `eth0` plugged into the bridge."""
    name, cable = place.network_name(index), place.cable(index)
    _remove_namespace(name, cable)
    ip("netns", "add", name)
    ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", name)
    ip("link", "set", cable, "master", place.bridge, "up")
    ip("-n", name, "addr", "add", f"{place.node_address(index)}/24", "dev", "eth0")
    ip("-n", name, "link", "set", "eth0", "up")
    ip("-n", name, "link", "set", "lo", "up")


def set_cable(place: Place, index: int, *, up: bool) -> None:
    """Plug the cable of node `index` in or out."""
    ip("link", "set", place.cable(index), "up" if up else "down")


def cable_is_up(place: Place, index: int) -> bool:
    """Return whether the cable of node `index` is plugged in."""
    flags = (INTERFACES / place.cable(index) / "flags").read_text(encoding="ascii")
    return bool(int(flags, 16) & IFF_UP)


def _remove_namespace(name: str, cable: str) -> None:
    # The cable by its own name: deleting the namespace removes it later, at the kernel's leisure.
    if (INTERFACES / cable).exists():
        ip("link", "del", cable)
    if Path("/run/netns", name).exists():
        ip("netns", "del", name)
