"""`swarmcpp chat`: a conversation with a running server, on a terminal or from a pipe (one message per line)."""

from __future__ import annotations

import asyncio
import contextlib
import io
import socket
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from swarmcpp.commands import terminal
from swarmcpp.commands.chat_client import CONNECT_TIMEOUT_S, ChatClient, base_url
from swarmcpp.commands.own_server import own_server
from swarmcpp.core import Clock
from swarmcpp.errors import SwarmError, WireError
from swarmcpp.models import embedded
from swarmcpp.telemetry import printable

HELP = """\
/clear          forget the conversation, keep the system message
/system TEXT    set the system message; without TEXT, show it
/help           this list
/exit           leave (also Ctrl-D, or Ctrl-C twice)
Ctrl-C          stop the answer"""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What the user asked for; None leaves it to the server."""

    url: str
    api_key: str | None = None
    model: str | None = None
    system: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    data_dir: Path | None = None
    """Of a server that may be started when there is none at `url`; None: none may."""


@dataclass(slots=True)
class Conversation:
    """The messages so far. An exchange enters it only once there is an answer, so that it stays well-formed."""

    system: str | None = None
    messages: list[dict[str, str]] = field(default_factory=list)

    def with_question(self, question: str) -> list[dict[str, str]]:
        """What to send for `question`; nothing is remembered yet."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.messages, {"role": "user", "content": question}]

    def remember(self, question: str, answer: str) -> None:
        """Add an exchange."""
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@dataclass(slots=True)
class Answer:
    """One answer as it comes in; moments in seconds of `clock`."""

    clock: Clock = time.monotonic
    text: str = ""
    pieces: int = 0
    tokens: int | None = None
    finish_reason: str | None = None
    stopped: bool = False
    started: float = 0.0
    first: float | None = None
    last: float = 0.0

    def add(self, text: str) -> None:
        """Text arrived now."""
        self.last = self.clock()
        if self.first is None:
            self.first = self.last
        self.text += text
        self.pieces += 1

    def summary(self) -> str:
        """Tokens, tokens/s after the first one, and time to the first token."""
        count = self.tokens if self.tokens is not None else self.pieces
        parts = [f"{count} token{'' if count == 1 else 's'}"]
        if self.first is not None:
            # The first token's time is TTFT: the rate is that of the others.
            if count > 1 and self.last > self.first:
                parts.append(f"{(count - 1) / (self.last - self.first):.1f} tok/s")
            parts.append(f"TTFT {self.first - self.started:.2f} s")
        if self.finish_reason == "length":
            parts.append("cut at the length limit")
        if self.stopped:
            parts.append("stopped")
        return ", ".join(parts)


class Chat:
    """The read-answer loop. `run` returns the exit code."""

    def __init__(self, options: ChatOptions) -> None:
        self.options = options
        self.conversation = Conversation(options.system)
        self.model = options.model
        self.out = terminal.stdout()
        self.notes = terminal.stderr()
        self.interactive = sys.stdin.isatty()
        self.prompt = "> " if self.interactive and sys.stdout.isatty() else ""
        self.failed = False
        self._interrupts = 0

    def run(self) -> int:
        """Talk until the input ends. Raises SwarmError when the conversation cannot begin, or StartupError from a
        pipe when the server is gone."""
        client = ChatClient(self.options.url, self.options.api_key)
        with asyncio.Runner() as runner:
            runner.run(client.__aenter__())
            try:
                models = runner.run(client.models())
                self.model = self.model or next(iter(models), None)
                if self.model is None:
                    raise WireError(f"{client.url} has no model to talk to")
                if self.interactive:
                    self.notes.print(f"{self.model} at {client.url}; /help lists what you can do", style="dim")
                while (line := self._read_line()) is not None:
                    if line and not self._command(line):
                        self._exchange(runner, client, line)
            finally:
                runner.run(client.__aexit__(None, None, None))
        return 1 if self.failed else 0

    def _read_line(self) -> str | None:
        """The next line without spaces around it; None at the end of the input, /exit or the second Ctrl-C."""
        while True:
            try:
                # Within the try: the second one may come while this is printed.
                if self._interrupts:
                    self.out.print()
                    self.notes.print("Ctrl-C again leaves", style="dim")
                line = input(self.prompt).strip()
            except EOFError:
                if self.prompt:
                    self.out.print()
                return None
            except KeyboardInterrupt:
                self._interrupts += 1
                if self._interrupts > 1 or not self.interactive:
                    self.out.print()
                    return None
                continue
            self._interrupts = 0
            return None if line == "/exit" else line

    def _command(self, line: str) -> bool:
        """Whether `line` was a command, which is then done."""
        name, _, rest = line.partition(" ")
        if not name.startswith("/"):
            return False
        if name == "/clear":
            self.conversation.messages.clear()
            self._note("the conversation is forgotten")
        elif name == "/system" and rest.strip():
            self.conversation.system = rest.strip()
            self._note("the system message is set")
        elif name == "/system":
            self._note(self.conversation.system or "there is no system message")
        elif name == "/help":
            self._note(HELP)
        else:
            self._note(f"{name} is not a command; /help lists them")
        return True

    def _note(self, text: str) -> None:
        self.notes.print(printable(text), style="dim", soft_wrap=True)

    def _exchange(self, runner: asyncio.Runner, client: ChatClient, question: str) -> None:
        answer = Answer()
        try:
            # The runner turns Ctrl-C into the cancellation of this one coroutine, which drops the connection.
            runner.run(self._ask(client, self.conversation.with_question(question), answer))
        except KeyboardInterrupt:
            self._interrupts += 1
            answer.stopped = True
        except SwarmError as error:
            self._end_text(answer)
            self._report(error)
            return
        self._end_text(answer)
        if answer.text:
            self.conversation.remember(question, answer.text)
        self._note(answer.summary())

    async def _ask(self, client: ChatClient, messages: list[dict[str, str]], answer: Answer) -> None:
        body: dict[str, object] = {"model": self.model, "messages": messages}
        if self.options.temperature is not None:
            body["temperature"] = self.options.temperature
        if self.options.max_tokens is not None:
            body["max_tokens"] = self.options.max_tokens
        answer.started = answer.clock()
        async with contextlib.aclosing(client.stream(body)) as deltas:
            async for delta in deltas:
                if delta.text:
                    answer.add(delta.text)
                    # Past the console's rendering, which would turn the tabs of code into spaces.
                    self.out.file.write(printable(delta.text))
                    self.out.file.flush()
                answer.finish_reason = delta.finish_reason or answer.finish_reason
                answer.tokens = delta.completion_tokens if delta.completion_tokens is not None else answer.tokens

    def _end_text(self, answer: Answer) -> None:
        if answer.text and not answer.text.endswith("\n"):
            self.out.print()

    def _report(self, error: SwarmError) -> None:
        """Print the error and go on, but not from a pipe into a server that is gone."""
        if not self.interactive and hasattr(error, "exit_code"):
            raise error
        self.failed = self.failed or not self.interactive
        self.notes.print(f"error: {terminal.one_line(error)}", style="red", soft_wrap=True)


def run(options: ChatOptions) -> int:
    """Hold a conversation and return the exit code: 1 when a piped message had no answer.

    Raises what Chat.run does, and StartupError when a server of its own cannot be started.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        # A byte that is not UTF-8 must not end the conversation.
        sys.stdin.reconfigure(errors="replace")
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 - gives input() its editing and history; not there on Windows
    if options.data_dir is None or _listens(options.url):
        return Chat(options).run()
    notes = terminal.stderr()
    notes.print(f"no server runs at {options.url}; {embedded.ABOUT}", soft_wrap=True, highlight=False)
    with own_server(options.data_dir, notes) as url:
        # It has no key: nobody else reaches it.
        return Chat(replace(options, url=url, api_key=None)).run()


def _listens(url: str) -> bool:
    """Whether anything takes connections there; what it is shows when it is asked."""
    parts = urlsplit(base_url(url))
    try:
        with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=CONNECT_TIMEOUT_S):
            return True
    except ConnectionRefusedError:
        return False
    except OSError:
        return True
