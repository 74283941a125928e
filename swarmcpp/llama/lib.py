"""llama.cpp's C functions (the ctypes tier of llama-cpp-python) and its log.

`Llama` and `_internals` of that package are not used: they turn every return code of decode into one error, start every
batch at position 0, and print from a log callback.
"""

from __future__ import annotations

import ctypes
import logging
import re
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import llama_cpp.llama_cpp as c
from llama_cpp._ctypes_extensions import load_shared_library
from llama_cpp._ggml import libggml_base_path

from swarmcpp._native import register_kernels
from swarmcpp.errors import BadModel, SwarmError
from swarmcpp.llama.residency import forget_pages, take_out
from swarmcpp.models.gguf_header import read_header
from swarmcpp.models.inspect import inspect

logger = logging.getLogger(__name__)

PINNED: Final = "0.3.36"
"""The llama-cpp-python of pyproject.toml, whose structs, states and functions are known here."""

_GGML_LOG_WARN = 3
_GGML_LOG_ERROR = 4
_recent: deque[str] = deque(maxlen=20)


def _on_log(level: int, text: bytes, _user_data: Any) -> None:
    line = text.decode("utf-8", "replace").strip()
    if not line:
        return
    if level == _GGML_LOG_ERROR:
        _recent.append(line)
    logger.log(logging.INFO if level >= _GGML_LOG_WARN else logging.DEBUG, "llama.cpp: %s", line)


# Kept for the life of the process: llama.cpp holds the pointer.
_log_callback = c.llama_log_callback(_on_log)
_started = False


def start() -> None:
    """Initialise llama.cpp's backends once per process, with its log going to `logging`."""
    global _started
    if not _started:
        if (found := version()) != PINNED:
            logger.warning("llama-cpp-python is %s, and swarmcpp was tried with %s only", found or "unknown", PINNED)
        c.llama_log_set(_log_callback, ctypes.c_void_p(0))
        c.llama_backend_init()
        _started = True


GGML_FUNCTIONS = (
    "ggml_backend_buft_is_host",
    "ggml_backend_cpu_buffer_from_ptr",
    "ggml_backend_cpu_buffer_type",
    "ggml_backend_dev_backend_reg",
    "ggml_backend_dev_by_type",
    "ggml_backend_dev_name",
    "ggml_backend_reg_name",
    "ggml_backend_register",
    "ggml_flash_attn_ext",
    "ggml_free",
    "ggml_graph_n_nodes",
    "ggml_graph_node",
    "ggml_init",
    "ggml_mul_mat",
    "ggml_new_tensor_2d",
    "ggml_new_tensor_4d",
)
"""What a backend of our own calls (native/ggml_backend.cpp)."""


def address(function: str) -> int:
    """Where a function of ggml is; 0 for one that the library does not have.

    Of the ggml that libllama is linked with: where a package has its libraries as copies instead of links,
    `llama_cpp._ggml` loads another one, which has its own register of backends.
    """
    found = getattr(c._lib, function, None)
    return 0 if found is None else ctypes.cast(found, ctypes.c_void_p).value or 0


def ggml_library(name: str) -> Any:
    """One of ggml's libraries by name, such as "ggml-base", maybe as a copy of its own (see `address`)."""
    return load_shared_library(name, libggml_base_path)


def fill(struct: Any, **values: Any) -> Any:
    """Set fields of a struct, and return it. Raises SwarmError for one that it does not have: ctypes would make it an
    attribute that only Python sees."""
    known = {name for name, *_ in struct._fields_}
    for name, value in values.items():
        if name not in known:
            raise SwarmError(f"{type(struct).__name__} has no {name} here; install llama-cpp-python {PINNED}")
        setattr(struct, name, value)
    return struct


def tensor_function(name: str) -> int:
    """Where a function of ggml is that only looks at what it is given. Raises SwarmError when there is none.

    Any copy of the library will do; Windows finds in llama.dll only what llama.cpp itself exports.
    """
    if found := address(name):
        return found
    try:
        function = ggml_library("ggml-base")[name]
    except AttributeError:
        raise SwarmError(f"this llama.cpp has no {name}; install the pinned llama-cpp-python") from None
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def use_kernels(*, q8: bool, attention: bool) -> None:
    """Let llama.cpp multiply Q8_0 matrices with the kernel of native/q8_matmul.cpp, and compute attention of fewer than
    64 rows with that of native/attention.cpp, in all contexts made from now on.

    Raises SwarmError where that is not possible.
    """
    start()
    wanted = {name: address(name) for name in GGML_FUNCTIONS}
    if (q8 or attention) and (problem := register_kernels(wanted, q8=q8, attention=attention)):
        raise SwarmError(f"a kernel of this package {problem}")


def recent_errors() -> str:
    """llama.cpp's own last error lines since the last call, as one line; what a failed load has to say."""
    text = "; ".join(dict.fromkeys(_recent))
    _recent.clear()
    return text


def version() -> str:
    """Version of the llama-cpp-python package whose llama.cpp is loaded; empty when it does not say."""
    # Not of importlib.metadata, which is 1.4 MB of each engine.
    found = re.search(r'^__version__ = "(.+)"', Path(c.__file__).with_name("__init__.py").read_text("utf-8"), re.M)
    return found[1] if found else ""


def system_info() -> str:
    """llama.cpp's one-line description of the CPU features that it was compiled for."""
    return bytes(c.llama_print_system_info()).decode("utf-8", "replace").strip()


FORGET_STEP = 0.02
"""Of the weights, after which pages of the file are given back while it is loaded."""


def load_model(path: Path, *, use_extra_bufts: bool, vocab_only: bool, progress: Any = None) -> Any:
    """A llama_model pointer. `progress` is a callable of one float in 0..1, called while the weights load.

    Raises BadModel with llama.cpp's own words when it cannot load the file.
    """
    start()
    forgotten = 0.0

    def on_progress(fraction: float, _user_data: Any) -> bool:
        nonlocal forgotten
        if use_extra_bufts and fraction >= forgotten + FORGET_STEP:
            # Weights that are repacked are copies: without this all would be there twice, at the end and before.
            forgotten = fraction
            forget_pages(path)
        if progress is not None:
            progress(fraction)
        return True

    keep = c.llama_progress_callback(on_progress)
    params = fill(
        c.llama_model_default_params(),
        n_gpu_layers=0,
        use_extra_bufts=use_extra_bufts,
        vocab_only=vocab_only,
        progress_callback=keep,
    )
    recent_errors()
    pointer = c.llama_model_load_from_file(str(path).encode(), params)
    del keep
    if not pointer:
        reason = recent_errors() or "llama.cpp gave no reason"
        raise BadModel(f"{path}: llama.cpp cannot load this model: {reason}")
    if use_extra_bufts and not vocab_only:
        _forget_repacked(path)
    return pointer


def _forget_repacked(path: Path) -> None:
    """Keep of a loaded file's pages only what is used there."""
    # What llama.cpp could load and these cannot read costs memory, no more.
    with suppress(BadModel):
        for part in inspect(path).files:
            # Norms and biases, which are never repacked.
            small = [tensor for tensor in read_header(part).tensors if len(tensor.shape) == 1]
            take_out(part, [(tensor.offset, tensor.offset + tensor.n_bytes) for tensor in small])
    forget_pages(path)
