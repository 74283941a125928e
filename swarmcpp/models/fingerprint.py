"""What a model is, by its bytes: two files with one fingerprint give the same KV for the same tokens."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from blake3 import blake3

from swarmcpp.errors import BadModel


def fingerprint(files: Sequence[Path], cache_dir: Path) -> bytes:
    """BLAKE3 over the files of a model, 32 bytes. Remembered by path, size and time of change: hashing takes seconds.

    Raises BadModel when a file cannot be read.
    """
    try:
        facts = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
    except OSError as error:
        raise BadModel(f"{files[0]}: cannot read it: {error.strerror}") from error
    memo = cache_dir / "fingerprints" / (blake3(json.dumps(facts).encode()).hexdigest()[:32] + ".json")
    try:
        known = json.loads(memo.read_text())
        remembered = bytes.fromhex(known["fingerprint"])
        if known["files"] == facts and len(remembered) == blake3.digest_size:
            return remembered
    except (OSError, ValueError, KeyError, TypeError):
        pass
    digest = _hash(files)
    try:
        memo.parent.mkdir(parents=True, exist_ok=True)
        scratch = memo.with_suffix(f".{os.getpid()}")
        scratch.write_text(json.dumps({"files": facts, "fingerprint": digest.hex()}))
        scratch.replace(memo)
    except OSError:
        # Without a memo the next start hashes again, no more.
        pass
    return digest


def _hash(files: Sequence[Path]) -> bytes:
    whole = blake3()
    for path in files:
        hasher = blake3(max_threads=blake3.AUTO)
        try:
            hasher.update_mmap(path)
        except OSError as error:
            raise BadModel(f"{path}: cannot read it: {error.strerror}") from error
        whole.update(hasher.digest())
    return whole.digest()
