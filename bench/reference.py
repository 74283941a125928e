"""Builds llama.cpp's own programs from the source that the installed llama-cpp-python carries.

A comparison is fair only when both sides run the same kernels, so the source is the sdist of the installed version
and the flags are those of the package's own build. Standard library only: `python bench/reference.py` prints where
the programs are, building them first when they are not there yet.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

BENCH = Path(__file__).resolve().parent
BUILD = BENCH / "build"
TARGETS = ("llama-server", "llama-bench", "llama-batched-bench", "ggml-rpc-server")

# The UI would be fetched from the network at build time; without OpenSSL and curl the build needs nothing but a
# compiler. Everything that reaches a kernel (GGML_*) stays at llama.cpp's default, as in llama-cpp-python's build.
CMAKE_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_CURL=OFF",
    "-DLLAMA_OPENSSL=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",
    "-DLLAMA_BUILD_COMMON=ON",
    "-DLLAMA_BUILD_TOOLS=ON",
    "-DLLAMA_BUILD_SERVER=ON",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DGGML_RPC=ON",
)


@dataclass(frozen=True, slots=True)
class Reference:
    """llama.cpp's programs, built. `version` is llama-cpp-python's, `flags` the cmake arguments."""

    version: str
    bin: Path
    flags: tuple[str, ...]

    @property
    def server(self) -> Path:
        return self.bin / "llama-server"

    @property
    def bench(self) -> Path:
        return self.bin / "llama-bench"

    @property
    def batched_bench(self) -> Path:
        return self.bin / "llama-batched-bench"

    @property
    def rpc_server(self) -> Path:
        return self.bin / "ggml-rpc-server"

    def environment(self) -> dict[str, str]:
        """The caller's environment, able to find the programs' shared libraries."""
        key = "DYLD_LIBRARY_PATH" if sys.platform == "darwin" else "LD_LIBRARY_PATH"
        return {**os.environ, key: os.pathsep.join(filter(None, (str(self.bin), os.environ.get(key))))}


def machine_flags() -> tuple[str, ...]:
    """What native/cmake-args.sh prints for this machine, plus the user's CMAKE_ARGS, split as a shell would."""
    script = BENCH.parent / "native" / "cmake-args.sh"
    printed = subprocess.run(["sh", str(script)], check=True, capture_output=True, text=True).stdout
    return (*shlex.split(printed), *shlex.split(os.environ.get("CMAKE_ARGS", "")))


def fetch_source(version: str, into: Path) -> Path:
    """The unpacked llama.cpp source of llama-cpp-python `version`, downloaded through pip when it is missing."""
    sources = into / "source"
    tree = sources / f"llama_cpp_python-{version}" / "vendor" / "llama.cpp"
    if (tree / "CMakeLists.txt").is_file():
        return tree
    into.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    # pip prepares metadata of an sdist, which needs its build backend and nothing else.
    what = ["--no-deps", "--no-binary", "llama-cpp-python", f"llama-cpp-python=={version}"]
    subprocess.run([*pip, *what, "--dest", str(into)], check=True)
    partial = into / "source.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(sources, ignore_errors=True)
    with tarfile.open(into / f"llama_cpp_python-{version}.tar.gz") as archive:
        archive.extractall(partial, filter="data")
    partial.rename(sources)
    return tree


def _cmake(source: Path, build: Path, flags: tuple[str, ...], jobs: int, log: Path) -> None:
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    configure = ["cmake", "-S", str(source), "-B", str(build), *generator, *flags]
    compile_ = ["cmake", "--build", str(build), "--config", "Release", "-j", str(jobs), "--target", *TARGETS]
    with log.open("w") as output:
        for command in (configure, compile_):
            output.write(shlex.join(command) + "\n")
            output.flush()
            done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, check=False)
            if done.returncode != 0:
                tail = "".join(log.read_text(errors="replace").splitlines(keepends=True)[-15:])
                raise SystemExit(f"building llama.cpp failed, full log in {log}; its end:\n{tail}")


def ensure(*, jobs: int | None = None) -> Reference:
    """The reference programs, built once per llama-cpp-python version and set of flags.

    Raises SystemExit with the end of the build log when the build fails, CalledProcessError when pip does.
    """
    version = metadata.version("llama-cpp-python")
    root = BUILD / f"llama-cpp-python-{version}"
    build = root / "build"
    flags = (*CMAKE_FLAGS, *machine_flags())
    reference = Reference(version=version, bin=build / "bin", flags=flags)
    # Written last, so a build that was interrupted is continued and never taken for a finished one.
    stamp = root / "built"
    wanted = "\n".join((version, *flags))
    missing = [target for target in TARGETS if not (reference.bin / target).is_file()]
    if not missing and stamp.is_file() and stamp.read_text() == wanted:
        return reference
    print(f"building {', '.join(TARGETS)} in {build} (some minutes, once)", file=sys.stderr)
    source = fetch_source(version, root)
    _cmake(source, build, flags, jobs or os.cpu_count() or 1, root / "build.log")
    stamp.write_text(wanted)
    return reference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=int, help="compile jobs at once (default: all cores)")
    built = ensure(jobs=parser.parse_args().jobs)
    for target in TARGETS:
        print(built.bin / target)


if __name__ == "__main__":
    main()
