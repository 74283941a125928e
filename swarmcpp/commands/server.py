"""Which node a command asks, and with what key."""

from __future__ import annotations

from dataclasses import dataclass

from swarmcpp.commands import terminal
from swarmcpp.config import LoadedConfig, ServerConfig
from swarmcpp.node.whereabouts import Whereabouts, find_nodes

_STRENGTH = ("default", "file", "env", "flag")
"""First words of sources of settings; the later one wins."""


@dataclass(frozen=True, slots=True)
class Server:
    """Which node to ask, and with what key."""

    url: str
    api_key: str | None
    wrote: Whereabouts | None = None
    """What it wrote in its data directory, if it was found there."""


def find_server(loaded: LoadedConfig, url: str | None) -> Server:
    """The server at `url`. Without one: where a flag or a variable says that a server listens, else the node that runs
    with the data directory, else where `serve` would listen.

    Of several nodes with the directory it is the one that listens there, else the first that was started.
    """
    if url is not None:
        return Server(url, key_to_send(loaded, url))
    usual = Server(local_url(loaded.config.server), key_to_send(loaded, None))
    if _names_address(loaded):
        return usual
    data_dir = loaded.config.storage.data_dir
    running, gone = find_nodes(data_dir)
    if not running:
        if gone:
            terminal.note(f"the node of {data_dir} that ran at {gone[-1].url} is gone; asking {usual.url}")
        return usual
    found = next((each for each in running if each.url == usual.url), running[0])
    if len(running) > 1:
        others = ", ".join(each.url for each in running if each is not found)
        terminal.note(f"{len(running)} nodes run with {data_dir}; asking {found.url}, and --url asks another: {others}")
    return Server(found.url, usual.api_key, found)


def _names_address(loaded: LoadedConfig) -> bool:
    """Whether it was said for this very command where to ask, and not more strongly which data directory is meant.

    What a file says is for `serve`, which may have been started with another port; the node itself knows better.
    """
    host, port, data_dir = (
        _STRENGTH.index(loaded.sources[key].partition(" ")[0])
        for key in ("server.host", "server.port", "storage.data_dir")
    )
    return max(host, port) >= max(data_dir, _STRENGTH.index("env"))


def local_url(server: ServerConfig) -> str:
    """Where a server with this configuration is reached from the same machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host).strip("[]")
    return f"http://[{host}]:{server.port}" if ":" in host else f"http://{host}:{server.port}"


def key_to_send(loaded: LoadedConfig, url: str | None) -> str | None:
    """The API key for a request. A key from a file is for this machine's server and goes to no other `url`."""
    if url is not None and loaded.sources["server.api_key"].startswith("file "):
        return None
    return loaded.config.server.api_key
