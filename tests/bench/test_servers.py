"""Server command lines, and starting and stopping real processes."""

from __future__ import annotations

import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from bench.reference import Reference
from bench.servers import Launch, ServerDied, llama_server, physical_cores, running, swarmcpp_server

REFERENCE = Reference("0.0", Path("bin"), ())
MODEL = Path("m.gguf")

SERVER = """
import http.server, os, sys
class Ready(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/ready" else 404)
        self.end_headers()
        self.wfile.write(os.environ.get("WORD", "").encode())
if os.fork() == 0:
    os.execlp(sys.executable, sys.executable, "-c", "import time; time.sleep(600)")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Ready).serve_forever()
"""


def option(argv: tuple[str, ...], name: str) -> str:
    return argv[argv.index(name) + 1]


def test_llama_server_gets_the_context_of_all_slots_and_one_stream_each() -> None:
    argv = llama_server(REFERENCE, MODEL, slots=8, ctx_size=1024, threads=2, batch=(256, 128), repack=False).argv
    assert (option(argv, "-np"), option(argv, "-c"), option(argv, "-t")) == ("8", "8192", "2")
    assert (option(argv, "-b"), option(argv, "-ub"), option(argv, "-fa")) == ("256", "128", "on")
    assert {"--no-kv-unified", "--no-repack"} <= set(argv)


def test_defaults_of_llama_server_stay_its_own() -> None:
    argv = llama_server(REFERENCE, MODEL, slots=1, ctx_size=512, threads=1).argv
    assert not {"-b", "-ub", "--no-repack"} & set(argv)


def test_swarmcpp_budget_is_set_only_when_asked_for() -> None:
    launch = swarmcpp_server(MODEL, slots=8, ctx_size=1024, threads=2)
    assert (option(launch.argv, "--slots"), option(launch.argv, "--ctx-size")) == ("8", "1024")
    assert launch.env == {}
    tuned = swarmcpp_server(MODEL, slots=8, ctx_size=1024, threads=2, prefill_budget_ms=100)
    assert tuned.env == {"SWARMCPP_INFERENCE_PREFILL_BUDGET_MS": "100"}
    assert tuned.name != launch.name


def test_threads_never_exceed_the_cpus_given() -> None:
    assert physical_cores([0]) == 1
    assert physical_cores() >= 1


@pytest.mark.e2e
@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in forks")
def test_a_server_is_ready_inside_and_gone_with_its_children_after(tmp_path: Path) -> None:
    launch = Launch("stand-in", (sys.executable, "-c", SERVER, "{port}"), "/ready", {"WORD": "hello"})
    with running(launch, tmp_path) as server:
        with urllib.request.urlopen(server.base_url + "/ready") as response:
            assert response.read() == b"hello"
        port = int(server.base_url.rpartition(":")[2])
        tree = [
            p for p in psutil.Process().children(recursive=True) if str(port) in p.cmdline() or "600" in p.cmdline()[-1]
        ]
        assert len(tree) == 2
        assert server.sample_rss() > 2**20
    # A system without a reaping init keeps a dead orphan's entry.
    assert not [p for p in tree if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]
    assert server.peak_rss > 2**20


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("code", "signal"), [("import sys; print('no model'); sys.exit(2)", None), ("import os; os.abort()", 6)]
)
def test_a_server_that_dies_says_how_and_shows_its_last_words(tmp_path: Path, code: str, signal: int | None) -> None:
    with (
        pytest.raises(ServerDied, match="before it was ready") as caught,
        running(Launch("dying", (sys.executable, "-c", code), "/ready"), tmp_path),
    ):
        pass
    assert caught.value.signal == signal
    assert ("no model" in str(caught.value)) == (signal is None)


def test_swarmcpp_gets_a_data_directory_of_its_own() -> None:
    argv = swarmcpp_server(MODEL, slots=1, ctx_size=512, threads=1).argv
    assert option(argv, "--data-dir") == "{data}"


@pytest.mark.e2e
def test_no_server_sees_what_an_earlier_one_kept_on_disk(tmp_path: Path) -> None:
    """A persistent prefix cache would let the second server answer from the first one's work."""
    code = "import pathlib, sys; d = pathlib.Path(sys.argv[1]); print('FOUND', [*d.iterdir()]); (d / 'kept').touch()"
    launch = Launch("keeper", (sys.executable, "-c", code, "{data}"), "/ready")
    for _ in range(2):
        with pytest.raises(ServerDied, match=r"FOUND \[\]"), running(launch, tmp_path):
            pass
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
