"""The catalogue of models that can be asked for by name: models.toml, and the user's own that extends it."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import swarmcpp
from swarmcpp.errors import BadConfig, BadModel

FILE_NAME = "models.toml"
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}\.gguf")
"""A plain file name: it is joined to a directory, so it must not leave it."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class CatalogueEntry:
    """One model that can be downloaded. `size_hint` is approximate bytes; `sha256` is there only when known."""

    name: str
    title: str
    url: str
    file: str
    quant: str
    size_hint: int
    context: int
    parameters: str
    licence: str
    sha256: str | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Catalogue:
    """Entries in the order of their files; names are unique."""

    entries: tuple[CatalogueEntry, ...]

    def get(self, name: str) -> CatalogueEntry | None:
        """The entry called `name`, in any case."""
        wanted = name.lower()
        return next((entry for entry in self.entries if entry.name == wanted), None)

    def find(self, name: str) -> CatalogueEntry:
        """The entry called `name`. Raises BadModel that suggests names close to it."""
        entry = self.get(name)
        if entry is None:
            raise BadModel(f"no model called {name[:80]!r} in the catalogue; {self.suggest(name)}")
        return entry

    def suggest(self, name: str) -> str:
        """What to try instead of `name`, for an error message."""
        close = difflib.get_close_matches(name.lower()[:80], [entry.name for entry in self.entries], n=3, cutoff=0.5)
        return f"did you mean {' or '.join(close)}?" if close else "`swarmcpp models` lists the known names"


def load_catalogue(user_file: Path | None = None) -> Catalogue:
    """The built-in catalogue, extended by `user_file` when it exists; its entries replace those of the same name.

    Raises BadConfig that names the file, the entry and the key.
    """
    entries = {entry.name: entry for entry in _read(builtin_file())}
    if user_file is not None and user_file.exists():
        entries |= {entry.name: entry for entry in _read(user_file)}
    return Catalogue(tuple(entries.values()))


def builtin_file() -> Path:
    """models.toml beside the package's modules when installed, above them in a source tree."""
    package = Path(swarmcpp.__file__).parent
    installed = package / FILE_NAME
    return installed if installed.exists() else package.parent / FILE_NAME


def _read(path: Path) -> list[CatalogueEntry]:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadConfig(f"{path}: the catalogue cannot be read ({error.strerror}); check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadConfig(f"{path}: is not TOML ({error}); correct it or remove it") from None
    unknown = sorted(document.keys() - {"models"})
    if unknown:
        raise BadConfig(f"{path}: unknown key {unknown[0]!r}; entries are tables [models.NAME]")
    models = document.get("models", {})
    if not isinstance(models, dict):
        raise BadConfig(f"{path}: 'models' must be a table; entries are tables [models.NAME]")
    return [_entry(path, name, fields) for name, fields in models.items()]


_STRINGS = ("title", "url", "file", "quant", "parameters", "licence")
_NUMBERS = ("size_hint", "context")
_OPTIONAL = ("sha256", "note")


def _entry(path: Path, name: str, fields: object) -> CatalogueEntry:
    where = f"{path}: entry {name[:80]!r}"
    if not _NAME.fullmatch(name):
        raise BadConfig(f"{where}: a name is lower-case letters, digits, '.', '_' and '-', at most 64")
    if not isinstance(fields, dict):
        raise BadConfig(f"{where}: must be a table [models.{name}]")
    unknown = sorted(fields.keys() - {*_STRINGS, *_NUMBERS, *_OPTIONAL})
    if unknown:
        raise BadConfig(f"{where}: unknown key {unknown[0]!r}; known are {', '.join(_STRINGS + _NUMBERS + _OPTIONAL)}")
    given = (*_STRINGS, *_NUMBERS, *(key for key in _OPTIONAL if key in fields))
    values = {key: _value(where, fields, key) for key in given}
    url = values["url"]
    if not _is_http(url):
        raise BadConfig(f"{where}: url = {url[:200]!r} must be an http or https URL with a host")
    if not _FILE.fullmatch(values["file"]):
        raise BadConfig(f"{where}: file = {values['file'][:80]!r} must be a plain file name that ends in .gguf")
    if "sha256" in values and not _SHA256.fullmatch(values["sha256"]):
        raise BadConfig(f"{where}: sha256 must be 64 lower-case hexadecimal digits; leave it out when not known")
    return CatalogueEntry(name=name, **values)


def _is_http(url: str) -> bool:
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _value(where: str, fields: Mapping[str, Any], key: str) -> Any:
    value = fields.get(key)
    if value is None:
        raise BadConfig(f"{where}: key {key!r} is missing")
    if key in _NUMBERS:
        sound, form = isinstance(value, int) and not isinstance(value, bool) and value > 0, "a whole number above 0"
    else:
        sound, form = isinstance(value, str) and value != "" and value.isprintable(), "a text of one line"
    if not sound:
        raise BadConfig(f"{where}: {key} = {str(value)[:80]!r} must be {form}")
    return value
