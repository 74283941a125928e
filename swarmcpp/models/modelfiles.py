"""A manifest's files on this disk: copies that are there, and parts that a transfer fills chunk by chunk. Blocking."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from swarmcpp.errors import BadModel
from swarmcpp.files import write_at
from swarmcpp.models.manifest import SUFFIX, Manifest, ManifestFile, chunk_digests, manifest_of
from swarmcpp.models.partial import PartialFile

_SPLIT_END = re.compile(r"-\d{5}-of-\d{5}$")


def find_local(manifest: Manifest, directories: Sequence[Path], cache_dir: Path) -> tuple[Path, ...] | None:
    """The files of this model in one of `directories`, under any name, or None. Hashes only what has its sizes."""
    sizes = [file.size for file in manifest.files]
    for directory in directories:
        for first in sorted(directory.glob("*" + SUFFIX)):
            stem = first.name.removesuffix(SUFFIX)
            files = tuple(first.with_name(name) for name in _file_names(_SPLIT_END.sub("", stem), stem, len(sizes)))
            try:
                if [path.stat().st_size for path in files] == sizes and (
                    manifest_of(files, cache_dir).fingerprint == manifest.fingerprint
                ):
                    return files
            except (OSError, BadModel):
                # Gone, or not to be read: not the copy that is looked for.
                continue
    return None


def stored_paths(manifest: Manifest, directory: Path, tag: str) -> tuple[Path, ...]:
    """Where a model's files are kept; `tag` tells it from another of its name. All of a split are found by the first:
    of the names that a peer gave, only the first one's beginning counts."""
    stem = manifest.files[0].name.removesuffix(SUFFIX)
    names = _file_names(_SPLIT_END.sub("", stem) + tag, stem + tag, len(manifest.files))
    return tuple(directory / name for name in names)


def _file_names(split_stem: str, stem: str, count: int) -> list[str]:
    """llama.cpp's names of a model's files."""
    if count == 1:
        return [stem + SUFFIX]
    return [f"{split_stem}-{number:05d}-of-{count:05d}{SUFFIX}" for number in range(1, count + 1)]


@dataclass(frozen=True, slots=True)
class ModelParts:
    """Files that are not there yet, by their number; `clash` when another file has one of their names.

    The caller holds the lock of the first file. Methods raise OSError.
    """

    manifest: Manifest
    parts: dict[int, PartialFile]
    clash: bool

    @classmethod
    def look(cls, manifest: Manifest, finals: Sequence[Path]) -> ModelParts:
        """Which of a model's files are missing or other ones; changes nothing."""
        parts: dict[int, PartialFile] = {}
        clash = False
        for number, (file, final) in enumerate(zip(manifest.files, finals, strict=True)):
            same_size = final.is_file() and final.stat().st_size == file.size
            if not same_size or _wrong_chunks(final, file):
                parts[number] = PartialFile(final)
                clash = clash or final.exists()
        return cls(manifest, parts, clash)

    def prepare(self) -> set[int]:
        """Make the parts ready to be written; the chunks that they lack, counted over all files."""
        missing: set[int] = set()
        first = 0
        for number, file in enumerate(self.manifest.files):
            part = self.parts.get(number)
            if part is not None:
                # A sidecar says that the bytes are without gaps, so that a download could go on at their end.
                part.path.with_name(part.path.name + ".json").unlink(missing_ok=True)
                with part.path.open("ab") as target:
                    if target.tell() > file.size:
                        target.truncate(file.size)
                missing |= {first + chunk for chunk in _wrong_chunks(part.path, file)}
            first += len(file.digests)
        return missing

    def store(self, index: int, data: memoryview) -> bool:
        """Write chunk `index`; False when these are not its bytes.

        Opens the part anew: a write that outlives its cancelled transfer has no descriptor that became another file.
        """
        chunk = self.manifest.chunk(index)
        if len(data) != chunk.size or blake3(data).digest() != chunk.digest:
            return False
        with self.parts[chunk.file].path.open("rb+") as target:
            write_at(target.fileno(), data, chunk.offset)
        return True

    def commit(self) -> None:
        """Give the parts, which are whole, their names."""
        for part in self.parts.values():
            part.commit()


def _wrong_chunks(path: Path, file: ManifestFile) -> list[int]:
    """Numbers of the chunks of `file` that `path` does not have."""
    found = chunk_digests(path, file.size)
    return [number for number, digest in enumerate(file.digests) if found[number] != digest]
