"""`swarmcpp chat` against a real server: from a pipe, and on a terminal with real signals."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_process import DEADLINE_S, PROGRAM, swarmcpp, wait_for
from fake_openai import PIECES, FakeOpenAI
from typer.testing import CliRunner

from swarmcpp.cli import app
from swarmcpp.commands.chat import Answer
from swarmcpp.commands.chat_client import base_url
from swarmcpp.commands.server import key_to_send, local_url
from swarmcpp.config import ServerConfig, load_config
from swarmcpp.errors import BadConfig, StartupError, Unauthorized
from swarmcpp.testing import FakeClock

TEXT = "".join(PIECES).replace("\x1b", "")


@pytest.fixture
def server() -> Iterator[FakeOpenAI]:
    with FakeOpenAI() as running:
        yield running


def chat(server: FakeOpenAI, lines: str, *arguments: str) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["chat", "--url", server.url, *arguments], input=lines)
    if isinstance(result.exception, Exception):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_one_message_per_line(server: FakeOpenAI) -> None:
    code, out, notes = chat(server, "one\n\n  two  \n", "--temperature", "0.5", "--max-tokens", "9")
    assert (code, out) == (0, f"{TEXT}\n{TEXT}\n")
    assert notes.count("7 tokens") == 2 and "TTFT" in notes
    first, second = server.bodies
    assert first == {
        "model": "tiny",
        "messages": [{"role": "user", "content": "one"}],
        "temperature": 0.5,
        "max_tokens": 9,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    assert [message["role"] for message in second["messages"]] == ["user", "assistant", "user"]
    # What goes back is what the model said, control characters too.
    assert second["messages"][1]["content"] == "".join(PIECES)
    assert second["messages"][2]["content"] == "two"


def test_commands(server: FakeOpenAI) -> None:
    lines = "/system Be brief.\none\n/clear\n/system\ntwo\n/help\n/nonsense\n/exit\nnever\n"
    code, _, notes = chat(server, lines, "--system", "first", "--model", "big")
    assert code == 0
    assert [body["messages"] for body in server.bodies] == [
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": text}] for text in ("one", "two")
    ]
    assert {body["model"] for body in server.bodies} == {"big"}
    assert "\nBe brief.\n" in notes and "/clear" in notes and "/nonsense is not a command" in notes


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ("refuse", "error: the prompt is too long: 9 tokens, 8 fit\n"),
        ("html", "answered 502 and no error message"),
        ("fail", "error: the engine died\n"),
        ("break", "broke in the middle of the answer"),
        ("short", "ended too early"),
    ],
)
def test_an_error_of_the_server_is_printed_and_forgotten(server: FakeOpenAI, wish: str, says: str) -> None:
    code, out, notes = chat(server, f"{wish}\nnext\n")
    assert code == 1
    assert says in notes and "Traceback" not in notes
    assert out.endswith(f"{TEXT}\n")
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "next"}]


def test_a_cut_answer_says_so(server: FakeOpenAI) -> None:
    assert "cut at the length limit" in chat(server, "cut\n")[2]


def test_the_key_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeOpenAI(api_key="sesame") as server:
        with pytest.raises(Unauthorized, match="needs an API key"):
            chat(server, "one\n")
        assert chat(server, "one\n", "--api-key", "sesame")[0] == 0
        monkeypatch.setenv("SWARMCPP_API_KEY", "sesame")
        assert chat(server, "one\n")[0] == 0


def test_a_key_from_a_file_stays_with_its_own_server(home: Path) -> None:
    (home / "swarmcpp.toml").write_text("[server]\napi_key = 'sesame'\nport = 9999\nhost = '0.0.0.0'\n")
    from_file = load_config({}, {}, None)
    assert key_to_send(from_file, None) == "sesame"
    assert key_to_send(from_file, "http://elsewhere") is None
    assert key_to_send(load_config({"api_key": "x"}, {}, None), "http://elsewhere") == "x"
    assert local_url(from_file.config.server) == "http://127.0.0.1:9999"
    assert local_url(ServerConfig(host="::1")) == "http://[::1]:8080"


def test_a_server_that_goes_away_ends_a_pipe(server: FakeOpenAI) -> None:
    server.stop()
    with pytest.raises(StartupError, match=r"no server at .*connection refused.*swarmcpp serve MODEL.*--url"):
        chat(server, "one\n")


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ("localhost:1", "http://localhost:1"),
        ("http://h/v1/", "http://h"),
        ("https://h:2/v1", "https://h:2"),
        ("http://h/api", "http://h/api"),
    ],
)
def test_addresses(given: str, used: str) -> None:
    assert base_url(given) == used


@pytest.mark.parametrize("given", ["", "ftp://h", "http://", "http://a b"])
def test_what_is_no_address(given: str) -> None:
    with pytest.raises(BadConfig, match="http://HOST:PORT"):
        base_url(given)


def test_the_rate_leaves_out_the_first_token() -> None:
    clock = FakeClock(100.0)
    answer = Answer(clock=clock, started=100.0)
    assert answer.summary() == "0 tokens"
    clock.advance(2.0)
    answer.add("a")
    assert answer.summary() == "1 token, TTFT 2.00 s"
    clock.advance(1.0)
    answer.add("b")
    answer.tokens = 11
    assert answer.summary() == "11 tokens, 10.0 tok/s, TTFT 2.00 s"


@pytest.mark.e2e
def test_bytes_that_are_not_utf8_go_through(server: FakeOpenAI) -> None:
    done = subprocess.run(
        [*PROGRAM, "chat", "--url", server.url], input=b"caf\xe9\n", capture_output=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.decode()) == (0, f"{TEXT}\n")
    assert server.bodies[0]["messages"][0]["content"] == "caf\ufffd"


@pytest.mark.e2e
def test_no_server_is_exit_code_2() -> None:
    done = swarmcpp("chat", "--url", "http://127.0.0.1:1", stdin="hello\n")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


class Terminal:
    """The program on a terminal of its own; `seen` is everything that it wrote."""

    def __init__(self, *arguments: str) -> None:
        self.master, slave = pty.openpty()
        os.set_blocking(self.master, False)
        self.process = subprocess.Popen(
            [*PROGRAM, *arguments], stdin=slave, stdout=slave, stderr=slave, start_new_session=True
        )
        os.close(slave)
        self.text = ""

    def seen(self) -> str:
        try:
            while chunk := os.read(self.master, 65536):
                self.text += chunk.decode("utf-8", "replace")
        except OSError:
            # Nothing there now, or the program has ended.
            pass
        return self.text

    def wait_text(self, text: str, count: int = 1) -> None:
        wait_for(lambda: self.seen().count(text) >= count or self.process.poll() is not None, repr(text))
        assert self.seen().count(text) >= count, self.text

    def type(self, line: str) -> None:
        os.write(self.master, f"{line}\n".encode())

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)

    def wait_exit(self) -> int:
        try:
            wait_for(lambda: bool(self.seen()) and self.process.poll() is not None, "the end")
        finally:
            self.close()
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(DEADLINE_S)
        os.close(self.master)


@pytest.mark.e2e
def test_ctrl_c_stops_the_answer_and_not_the_program(server: FakeOpenAI) -> None:
    terminal = Terminal("chat", "--url", server.url)
    terminal.wait_text("> ")
    terminal.type("hang")
    terminal.wait_text("friend")
    terminal.interrupt()
    terminal.wait_text("stopped")
    wait_for(server.left.is_set, "the server to see the client leave")
    terminal.wait_text("> ", 2)
    terminal.type("two")
    terminal.wait_text("7 tokens")
    # What was said before the interruption stays in the conversation.
    assert [message["role"] for message in server.bodies[1]["messages"]] == ["user", "assistant", "user"]
    assert server.bodies[1]["messages"][1]["content"] == "".join(PIECES)
    terminal.wait_text("> ", 3)
    terminal.interrupt()
    terminal.wait_text("Ctrl-C again leaves")
    terminal.wait_text("> ", 4)
    terminal.interrupt()
    assert terminal.wait_exit() == 0
    assert "Traceback" not in terminal.text and "\x1b[31m" not in terminal.text


@pytest.mark.e2e
def test_ctrl_c_twice_in_a_row_leaves_from_an_answer(server: FakeOpenAI) -> None:
    terminal = Terminal("chat", "--url", server.url)
    terminal.wait_text("> ")
    terminal.type("hang")
    terminal.wait_text("friend")
    terminal.interrupt()
    terminal.wait_text("> ", 2)
    terminal.interrupt()
    assert terminal.wait_exit() == 0


@pytest.mark.e2e
def test_a_line_between_two_ctrl_c_keeps_the_program(server: FakeOpenAI) -> None:
    terminal = Terminal("chat", "--url", server.url)
    terminal.wait_text("> ")
    terminal.interrupt()
    terminal.wait_text("again leaves")
    terminal.type("refuse")
    terminal.wait_text("9 tokens, 8 fit")
    terminal.interrupt()
    terminal.wait_text("again leaves", 2)
    os.write(terminal.master, b"\x04")
    assert terminal.wait_exit() == 0
