"""`swarmcpp status`: the swarm as a running node sees it, live on a terminal, once elsewhere."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from swarmcpp import tui
from swarmcpp.commands import terminal
from swarmcpp.commands.chat_client import ChatClient
from swarmcpp.commands.server import Server
from swarmcpp.errors import SwarmError, UnknownRoute, WireError
from swarmcpp.status import SwarmStatus, from_json, to_json

REFRESH_S = 1.0
ANSWER_TIMEOUT_S = 5.0
MAX_ANSWER_BYTES = 8 << 20
"""1,024 nodes take 1 MB."""


class StatusClient(ChatClient):
    """A session with one node; used with `async with`."""

    async def status(self) -> SwarmStatus:
        """The swarm now. Raises as `document`."""
        return from_json(await self.document("/swarm/status", ANSWER_TIMEOUT_S))

    async def document(self, path: str, timeout_s: float) -> dict[str, Any]:
        """What the node answers. Raises StartupError when there is no server, WireError when it is slow or no swarmcpp,
        and the error that it reports."""
        try:
            async with asyncio.timeout(timeout_s):
                async with await self._request("GET", path) as response:
                    body = bytearray()
                    async for chunk in response.content.iter_any():
                        body += chunk
                        if len(body) > MAX_ANSWER_BYTES:
                            raise WireError(f"{self.url} answered more than {MAX_ANSWER_BYTES} bytes")
            document = json.loads(body)
        except TimeoutError as error:
            raise WireError(f"no answer from {self.url} within {timeout_s:.0f} s; is it overloaded?") from error
        except (aiohttp.ClientError, OSError) as error:
            raise WireError(f"{self.url} broke off in the middle of its answer") from error
        except (UnknownRoute, ValueError, RecursionError) as error:
            raise self._no_node() from error
        if not isinstance(document, dict):
            raise self._no_node()
        return document

    def _no_node(self) -> WireError:
        return WireError(f"{self.url} does not tell of a swarm; start a swarmcpp of this version there")


def ask(server: Server) -> SwarmStatus:
    """The swarm as `server` sees it now. Raises as StatusClient.status, and BadConfig for a URL that is none."""

    async def once() -> SwarmStatus:
        async with StatusClient(server.url, server.api_key) as client:
            return await client.status()

    return asyncio.run(once())


def run(server: Server, *, once: bool, as_json: bool) -> None:
    """Show the swarm until Ctrl-C, or once. Raises SwarmError when the node cannot be asked at the beginning."""
    console = terminal.stdout()
    if as_json:
        terminal.print_json(to_json(ask(server)))
    elif once or not console.is_terminal or console.is_dumb_terminal:
        console.print(tui.render(ask(server), console.width, ascii_only=console.options.ascii_only))
    else:
        try:
            asyncio.run(watch(server, console))
        except KeyboardInterrupt:
            return


async def watch(server: Server, console: Console, *, refresh_s: float = REFRESH_S) -> None:
    """Show the swarm for ever. A node that goes away is asked again until it is back; its last answer stays in view.

    Raises SwarmError when the first question has no answer.
    """
    async with StatusClient(server.url, server.api_key) as client:
        status = await client.status()
        problem = ""
        shown: tuple[list[Text], int] | None = None
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                (width, height), ascii_only = console.size, console.options.ascii_only
                view = tui.lines(status, width, ascii_only=ascii_only)
                if problem:
                    view.insert(0, tui.notice(problem, width, ascii_only=ascii_only))
                # Drawing is what costs: over ssh in bytes, here in time.
                if (view, height) != shown:
                    live.update(Group(*view), refresh=True)
                    shown = view, height
                await asyncio.sleep(refresh_s)
                try:
                    status, problem = await client.status(), ""
                except SwarmError as error:
                    problem = f"still trying: {terminal.one_line(error)}"
