"""Everything that touches llama.cpp: owners of its objects, text, samplers, and the CPU probe."""

import sys
from importlib.util import find_spec
from types import ModuleType


def _without_its_package() -> None:
    """Let `llama_cpp.llama_cpp`, the ctypes tier, be imported without llama_cpp/__init__.py, which imports all that is
    not used here: chat formats, caches on disk, SQLite. That is 7 MiB of each process, and most of the import's time.
    """
    spec = find_spec("llama_cpp")
    if spec is None or spec.submodule_search_locations is None or "llama_cpp" in sys.modules:
        return
    package = ModuleType(spec.name)
    package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
    sys.modules[spec.name] = package


_without_its_package()
