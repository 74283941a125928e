"""The kernel probe, with child processes of the test's own that crash, hang and lie, and with the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from engine_support import poll

from swarmcpp._native import attention_problem, q8_problem
from swarmcpp.llama import probe as module
from swarmcpp.llama.probe import CANDIDATES, ProbeReport, probe

pytestmark = pytest.mark.e2e

NATIVE, ATTENTION, REPACKED, PLAIN = CANDIDATES
PREAMBLE = """\
import json, os, signal, sys, time
extra = sys.argv[1] != "plain"
with open({log!r}, "a") as log:
    log.write(sys.argv[1] + " " + str(os.getpid()) + "\\n")

def answer(logits):
    print("noise of a library")
    print(json.dumps({{"logits": logits, "seconds": 0.1, "version": "9.9", "system_info": "CPU : FAKE = 1"}}))

GOOD = {{"Q8_0": [0.0, 1.0, 10.0], "Q4_0": [5.0, -5.0, 1.0]}}
"""


class Child:
    """A stand-in for the probe's child; it notes each of its runs."""

    def __init__(self, directory: Path, body: str) -> None:
        self._log = directory / "runs.txt"
        script = directory / "child.py"
        script.write_text(PREAMBLE.format(log=str(self._log)) + body)
        self.command = (sys.executable, "-S", "-E", str(script))

    @property
    def runs(self) -> list[tuple[str, int]]:
        if not self._log.exists():
            return []
        return [(line.split()[0], int(line.split()[1])) for line in self._log.read_text().splitlines()]


@pytest.fixture
def run(tmp_path: Path) -> Callable[[str], ProbeReport]:
    """Probes with a child of the given body."""
    return lambda body: probe(tmp_path / "data", command=Child(tmp_path, body).command)


@pytest.fixture(autouse=True)
def another_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that cannot have this package's own kernels, unless a test says otherwise."""
    for kernel in ("q8_problem", "attention_problem"):
        monkeypatch.setattr(module, kernel, lambda: "needs what this CPU has not")


@pytest.fixture
def capable_cpu(monkeypatch: pytest.MonkeyPatch, another_cpu: None) -> None:
    for kernel in ("q8_problem", "attention_problem"):
        monkeypatch.setattr(module, kernel, str)


@pytest.mark.usefixtures("capable_cpu")
def test_the_own_kernel_comes_first_where_it_can_run(run: Callable[[str], ProbeReport]) -> None:
    report = run("answer(GOOD)")
    assert report.chosen == NATIVE
    assert [result.candidate for result in report.results] == [NATIVE, ATTENTION, REPACKED, PLAIN]


def test_a_cpu_that_can_have_one_of_them_has_it(
    monkeypatch: pytest.MonkeyPatch, run: Callable[[str], ProbeReport]
) -> None:
    monkeypatch.setattr(module, "attention_problem", str)
    report = run("answer(GOOD)")
    assert report.chosen == ATTENTION
    assert [result.candidate for result in report.results] == [ATTENTION, REPACKED, PLAIN]


@pytest.mark.usefixtures("capable_cpu")
@pytest.mark.parametrize(
    "body",
    [
        "sys.argv[1] == 'native' and sys.exit(3)\nanswer(GOOD)",
        "answer(GOOD | {'Q8_0': [0.0, 5.0, 10.0]} if sys.argv[1] == 'native' else GOOD)",
    ],
)
def test_an_own_kernel_that_fails_or_lies_is_not_chosen(run: Callable[[str], ProbeReport], body: str) -> None:
    assert run(body).chosen == ATTENTION


def test_the_fastest_that_agrees_is_chosen(run: Callable[[str], ProbeReport]) -> None:
    report = run("answer(GOOD)")
    assert report.chosen == REPACKED
    assert [(result.candidate, result.ok, result.detail) for result in report.results] == [
        (REPACKED, True, ""),
        (PLAIN, True, ""),
    ]
    assert (report.llama_version, report.system_info, report.cached) == ("9.9", "CPU : FAKE = 1", False)


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("name", ["SIGILL", "SIGSEGV", "SIGABRT"])
def test_a_kernel_that_kills_its_process_is_not_chosen(run: Callable[[str], ProbeReport], name: str) -> None:
    report = run(f"extra and os.kill(os.getpid(), signal.{name})\nanswer(GOOD)")
    assert report.chosen == PLAIN
    assert not report.results[0].ok
    assert report.results[0].detail == f"died of {name}"
    assert report.results[1].ok


def test_the_last_words_of_a_failed_child_are_kept(run: Callable[[str], ProbeReport]) -> None:
    report = run("extra and sys.exit('first\\nggml.c: cannot go on')\nanswer(GOOD)")
    assert report.chosen == PLAIN
    assert report.results[0].detail == "exit code 1 ggml.c: cannot go on"


def test_wrong_logits_are_not_chosen(run: Callable[[str], ProbeReport]) -> None:
    report = run("answer(GOOD | {'Q4_0': [5.0, -5.0, 3.0]} if extra else GOOD)")
    assert report.chosen == PLAIN
    assert report.results[0].detail == "Q4_0: logits differ by 2 of a spread of 10"


def test_rounding_is_no_disagreement(run: Callable[[str], ProbeReport]) -> None:
    assert run("answer(GOOD | {'Q4_0': [5.1, -5.1, 1.1]} if extra else GOOD)").chosen == REPACKED


@pytest.mark.parametrize("index", [0, 1, 2])
def test_nan_is_a_disagreement_wherever_it_is(run: Callable[[str], ProbeReport], index: int) -> None:
    wrong = f"logits = list(GOOD['Q8_0'])\nlogits[{index}] = float('nan')\n"
    report = run(wrong + "answer(GOOD | {'Q8_0': logits} if extra else GOOD)")
    assert report.chosen == PLAIN
    assert report.results[0].detail == "Q8_0: logits are not numbers"


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        ("extra and (print('[1, 2]'), sys.exit(0))\nanswer(GOOD)", "answered nonsense"),
        ("extra and sys.exit(0)\nanswer(GOOD)", "answered nonsense"),
        ("answer({} if extra else GOOD)", "Q8_0: 0 logits instead of 3"),
        ("answer(GOOD | {'Q4_0': [1.0]} if extra else GOOD)", "Q4_0: 1 logits instead of 3"),
    ],
)
def test_an_answer_that_is_none(run: Callable[[str], ProbeReport], body: str, detail: str) -> None:
    report = run(body)
    assert (report.chosen, report.results[0].detail) == (PLAIN, detail)


def test_when_nothing_works_the_plain_kernels_are_left(run: Callable[[str], ProbeReport]) -> None:
    report = run("sys.exit(7)")
    assert report.chosen == PLAIN
    assert [result.detail for result in report.results] == ["exit code 7"] * 2


def test_a_crash_of_the_reference_does_not_condemn_the_others(run: Callable[[str], ProbeReport]) -> None:
    report = run("extra or sys.exit(7)\nanswer(GOOD)")
    assert report.chosen == REPACKED
    assert [result.ok for result in report.results] == [True, False]


def test_a_child_that_hangs_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TIMEOUT_S", 3.0)
    child = Child(tmp_path, "extra and time.sleep(600)\nanswer(GOOD)")
    report = probe(tmp_path / "data", command=child.command)
    assert report.chosen == PLAIN
    assert report.results[0].detail == "did not finish within 3 s"
    [(_, pid)] = [one for one in child.runs if one[0] == "repacked"]
    poll(lambda: not psutil.pid_exists(pid), "the child is gone")


def test_a_command_that_does_not_exist_is_a_failed_candidate(tmp_path: Path) -> None:
    report = probe(tmp_path, command=(str(tmp_path / "absent"),))
    assert report.chosen == PLAIN
    assert not any(result.ok for result in report.results)


def test_the_answer_is_remembered(tmp_path: Path) -> None:
    child = Child(tmp_path, "extra and sys.exit(3)\nanswer(GOOD)")
    first = probe(tmp_path / "data", command=child.command)
    assert [kind for kind, _ in child.runs] == ["repacked", "plain"]
    second = probe(tmp_path / "data", command=child.command)
    assert len(child.runs) == 2
    assert (first.cached, second.cached) == (False, True)
    assert (second.chosen, second.results, second.cpu) == (first.chosen, first.results, first.cpu)
    assert not probe(tmp_path / "data", command=child.command, force=True).cached
    assert len(child.runs) == 4


@pytest.mark.parametrize("damage", [b"", b"{}", b"[]", b"null", b"\xff\xfe", b'{"chosen": {"name": "x"}}', b"[1"])
def test_a_damaged_cache_is_probed_again(tmp_path: Path, damage: bytes) -> None:
    child = Child(tmp_path, "answer(GOOD)")
    probe(tmp_path / "data", command=child.command)
    [cache] = (tmp_path / "data" / "probe").iterdir()
    cache.write_bytes(damage)
    assert not probe(tmp_path / "data", command=child.command).cached
    assert len(child.runs) == 4
    assert json.loads(cache.read_text())["chosen"]["name"] == "repacked"


def test_another_boot_library_or_cpu_is_probed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(tmp_path, "answer(GOOD)")
    probe(tmp_path / "data", command=child.command)
    monkeypatch.setattr(module, "_library_id", lambda: "another build")
    assert not probe(tmp_path / "data", command=child.command).cached
    assert probe(tmp_path / "data", command=child.command).cached


def test_a_data_directory_that_cannot_be_written_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    child = Child(tmp_path, "answer(GOOD)")
    for runs in (2, 4):
        assert probe(tmp_path / "file", command=child.command).chosen == REPACKED
        assert len(child.runs) == runs


def test_the_real_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On any machine it ends with kernels that work; here a crash of the faster ones is an answer, not an error."""
    monkeypatch.setattr(module, "q8_problem", q8_problem)
    monkeypatch.setattr(module, "attention_problem", attention_problem)
    report = probe(tmp_path)
    chosen = next(result for result in report.results if result.candidate == report.chosen)
    assert chosen.ok, chosen.detail
    assert report.llama_version
    assert "=" in report.system_info
    assert probe(tmp_path).cached
    if not attention_problem():
        assert report.chosen == (ATTENTION if q8_problem() else NATIVE), report.results[0].detail


def test_the_real_child_answers_on_its_own() -> None:
    """`python -m swarmcpp.llama.probe plain` prints one line of JSON at the end."""
    child = subprocess.run(
        (sys.executable, "-m", "swarmcpp.llama.probe", "plain"), capture_output=True, check=True, env=dict(os.environ)
    )
    answer = json.loads(child.stdout.splitlines()[-1])
    assert set(answer["logits"]) == {"Q8_0", "Q4_0"}
    assert all(len(logits) == 1024 for logits in answer["logits"].values())
