"""Configuration: one frozen slice per component, read from a TOML file < SWARMCPP_* variables < flags.

A field of a slice is the whole definition of a setting: its type, default, range, help and flag live in the
field itself, and the file's keys, the names of the variables, the validation and the `config` command follow
from it.
"""

from __future__ import annotations

import difflib
import ipaddress
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import platformdirs

from swarmcpp.errors import BadConfig
from swarmcpp.settings import ENV_PREFIX, build, describe, parse, setting

FILE_NAME = "swarmcpp.toml"
FILE_VARIABLE = ENV_PREFIX + "CONFIG"

MIB = 1024 * 1024

_SIZE = r"(\d{1,15}(?:\.\d{1,6})?) ?([KMGT]?)(?:i?B)?"


def parse_size(text: str) -> int | None:
    """Bytes of "0", "500M", "2G" or "1.5 GiB" (powers of 1024); None for "auto", and for what is no size."""
    found = re.fullmatch(_SIZE, text, re.IGNORECASE)
    if not found:
        return None
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2].upper()) + 1 if found[2] else 0))


@dataclass(frozen=True, slots=True)
class ServerConfig:
    host: str = setting("127.0.0.1", help="address to listen on", low=1, flag="--host")
    port: int = setting(8080, help="port to listen on; 0: any free one", low=0, high=65535, flag="--port")
    api_key: str | None = setting(
        None, help="key that every request must bring", low=1, high=4096, flag="--api-key", secret=True
    )
    cors_origins: tuple[str, ...] = setting((), help="browser origins that may call the API; '*': all")
    max_body_bytes: int = setting(8 * MIB, help="largest request body, in bytes", low=1024, high=1024 * MIB)
    queue_size: int = setting(512, help="requests that may wait for a slot", low=1, high=65536)
    request_timeout_s: float = setting(
        0.0, help="seconds that one request may take", low=0.001, high=86400, zero="no limit"
    )
    write_timeout_s: float = setting(60.0, help="seconds that a client may take to read", low=0.1, high=86400)
    findable: bool = setting(True, help="commands find this node by its data directory")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    threads: int = setting(
        0, help="threads that compute", low=1, high=1024, zero="one per usable physical core", flag="--threads"
    )
    ctx_size: int = setting(
        0,
        help="context of each slot, in tokens",
        low=64,
        high=2**24,
        zero="what model and memory allow",
        flag="--ctx-size",
    )
    slots: int = setting(
        0, help="requests that run at the same time", low=1, high=256, zero="as many as memory allows", flag="--slots"
    )
    memory: str = setting(
        "auto",
        help="memory that the model and its contexts may take; auto: what is free",
        flag="--memory",
        pattern=f"auto|{_SIZE}",
        form="auto, or a size such as 500M or 2G",
    )
    layers: str = setting(
        "",
        help="layers to run, A-B (B not included), of a model that several machines share; without it what is needed",
        flag="--layers",
        pattern=r"|\d{1,5}-\d{1,5}",
        form="A-B, such as 0-12",
    )

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes; None for "auto"."""
        return parse_size(self.memory)

    @property
    def layer_range(self) -> tuple[int, int] | None:
        """`layers` as numbers; None when none are given."""
        first, _, last = self.layers.partition("-")
        return (int(first), int(last)) if last else None


@dataclass(frozen=True, slots=True)
class InferenceConfig:
    continuous_batching: bool = setting(True, help="new requests join the batch that is running")
    prefill_chunk_tokens: int = setting(128, help="most prompt tokens in one step", low=1, high=4096)
    prefill_budget_ms: int = setting(700, help="time for prompt tokens in one step, in ms", low=10, high=60000)
    batched_prefill_forward: bool = setting(True, help="chunks of several prompts share one step")
    prefix_cache_enabled: bool = setting(True, help="beginnings of prompts that were read are not read again")
    prefix_cache_block_tokens: int = setting(64, help="tokens of a cached block", low=16, high=1024)
    prefix_cache_max_entries: int = setting(
        0, help="chains of blocks that the cache keeps", low=1, high=2**31, zero="as many as fit into --cache-size"
    )
    cross_node_prefix_trust_min: float = setting(
        0.5, help="trust that a peer needs for its blocks to be fetched; 2: no blocks of peers", low=0, high=2
    )
    kv_wire: str = setting(
        "auto",
        help="encoding of blocks between nodes; auto: by the rate of the link",
        pattern="auto|f16|q8_0",
        form="auto, f16 or q8_0",
    )
    activation_compression: str = setting(
        "auto",
        help="8-bit rows between stages; auto: over slow links",
        pattern="auto|on|off",
        form="auto, on or off",
    )
    replicate_kv: str = setting(
        "auto",
        help="KV of requests that run on stages is copied to another node with the same layers; auto: over fast links",
        pattern="auto|on|off",
        form="auto, on or off",
    )
    persistent_pipeline_stream: bool = setting(True, help="passes follow one another through stages without waiting")
    ngram_lookup_enabled: bool = setting(True, help="guess ahead what followed the same words in the prompt or answer")
    draft_model_path: str = setting(
        "",
        help="a smaller model of the same vocabulary that guesses ahead: its file, or its name",
        flag="--draft-model",
    )
    swift_self_speculative: bool = setting(False, help="the model guesses ahead without some of its middle layers")
    swift_skip_ratio: float = setting(0.45, help="layers that are left out of such guesses", low=0.05, high=0.9)
    speculative_gamma: int = setting(
        4, help="most tokens that a draft model guesses at a time; 0: nothing is guessed, by nobody", low=0, high=32
    )
    speculative_distributed: bool = setting(True, help="stages verify guesses, as many in one pass as pay")
    decentralized_spec_decoding: bool = setting(
        True, help="further guesses of a stream go out to the stages before the earlier ones are verified"
    )
    stage_poll_ms: int = setting(
        30,
        help="ms that a stage watches for its next pass before it sleeps, if the last one came as soon; 0 saves power",
        low=0,
        high=1000,
    )


def default_data_dir() -> Path:
    """Where models and caches go when nothing else is said."""
    return Path(platformdirs.user_data_dir("swarmcpp", appauthor=False))


@dataclass(frozen=True, slots=True)
class StorageConfig:
    data_dir: Path = setting(  # noqa: RUF009 - it makes a dataclass field
        factory=default_data_dir, help="directory of models and caches", low=1, flag="--data-dir"
    )

    cache_size: str = setting(
        "auto",
        help="disk for cached blocks; 0: none",
        flag="--cache-size",
        pattern=f"auto|{_SIZE}",
        form="auto, 0, or a size such as 500M or 2G",
    )

    @property
    def cache_bytes(self) -> int | None:
        """`cache_size` in bytes; None for "auto"."""
        return parse_size(self.cache_size)

    @property
    def models_dir(self) -> Path:
        """Where `pull` puts models."""
        return self.data_dir / "models"

    @property
    def catalogue_file(self) -> Path:
        """The user's own catalogue, which need not be there."""
        return self.data_dir / "models.toml"


@dataclass(frozen=True, slots=True)
class SwarmConfig:
    enabled: bool = setting(False, help="let other machines of the network join this one", flag="--swarm")
    host: str = setting(
        "", help="address of the swarm port (without it: those of the local networks)", high=253, flag="--swarm-host"
    )
    port: int = setting(
        17610,
        help="port for other nodes, beside that of the API; 0: any free one",
        low=0,
        high=65535,
        flag="--swarm-port",
    )
    name: str = setting("", help="name of this node in the swarm (without it: the machine's)", high=64, flag="--name")
    discovery: bool = setting(True, help="find and be found on the local network by mDNS")


@dataclass(frozen=True, slots=True)
class Config:
    server: ServerConfig = field(default_factory=ServerConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    inference: InferenceConfig = field(default_factory=InferenceConfig)
    storage: StorageConfig = field(default_factory=StorageConfig)
    swarm: SwarmConfig = field(default_factory=SwarmConfig)
    model: str | None = setting(None, help="GGUF file, or a name of the catalogue", low=1, flag="MODEL")


@dataclass(frozen=True, slots=True)
class LoadedConfig:
    """A valid configuration and where each value came from.

    `sources` maps every key ("server.port") to "default", "file PATH", "env NAME" or "flag --port".
    """

    config: Config
    sources: Mapping[str, str]
    file: Path | None

    def shown(self) -> dict[str, str | int | float | bool | list[str] | None]:
        """Every value by key, for people to read: paths as text, secrets masked."""
        found: dict[str, str | int | float | bool | list[str] | None] = {}
        for described in describe(Config):
            value = described.value_in(self.config)
            if described.secret and value is not None:
                value = "***"
            found[described.key] = str(value) if isinstance(value, Path) else _as_list(value)
        return found


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def find_file(env: Mapping[str, str]) -> Path | None:
    """The file that is read without `--config`: SWARMCPP_CONFIG, else here, else the user's own."""
    if env.get(FILE_VARIABLE):
        return Path(env[FILE_VARIABLE]).expanduser()
    user = Path(platformdirs.user_config_dir("swarmcpp", appauthor=False))
    return next((path for path in (Path(FILE_NAME), user / FILE_NAME) if path.is_file()), None)


def load_config(flags: Mapping[str, object], env: Mapping[str, str], file: Path | None) -> LoadedConfig:
    """The configuration from all layers; the later of file, environment and flags wins, key by key.

    `flags` maps a flag's Python name (`ctx_size`) to its value, as text or already typed; None means not given.
    An empty variable counts as not set. Raises BadConfig, which names the key, the value, its source and the
    limit, for a file that cannot be read, an unknown key, a wrong type or range, and values that do not go together.
    """
    path = file if file is not None else find_file(env)
    raw: dict[str, tuple[object, str]] = {}
    if path is not None:
        raw.update(_file_layer(path))
    raw.update(_env_layer(env))
    raw.update(_flag_layer(flags))

    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    for described in describe(Config):
        if described.key in raw:
            value, sources[described.key] = raw[described.key]
            values[described.key] = parse(described, value, sources[described.key])
        else:
            values[described.key], sources[described.key] = described.default(), "default"
    config: Config = build(Config, values)
    _check_together(config, sources)
    return LoadedConfig(config, sources, path)


def _file_layer(path: Path) -> dict[str, tuple[object, str]]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise BadConfig(f"{path} is not valid TOML: {error}") from error
    except UnicodeDecodeError as error:
        raise BadConfig(f"{path} is not valid TOML: byte {error.start} is not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadConfig(f"{path} is not valid TOML: a number is too long or brackets are too deep") from error
    except OSError as error:
        raise BadConfig(f"cannot read the configuration {path}: {error.strerror or error}") from error
    keys = {described.key for described in describe(Config)}
    sections = {key.split(".")[0] for key in keys if "." in key}
    found: dict[str, tuple[object, str]] = {}
    for name, value in data.items():
        if name in sections and not isinstance(value, dict):
            raise BadConfig(f"{name} in {path} must be a section: write [{name}] on a line of its own")
        entries = (
            {f"{name}.{inner}": each for inner, each in value.items()} if isinstance(value, dict) else {name: value}
        )
        for key, each in entries.items():
            if key not in keys:
                raise BadConfig(f"unknown key {key} in {path}{_close(key, keys)}")
            found[key] = (each, f"file {path}")
    return found


def _env_layer(env: Mapping[str, str]) -> dict[str, tuple[object, str]]:
    by_name = {name: described for described in describe(Config) for name in described.env_names}
    for name in env:
        if name.startswith(ENV_PREFIX) and name not in by_name and name != FILE_VARIABLE:
            raise BadConfig(f"unknown variable {name} in the environment{_close(name, by_name)}")
    found: dict[str, tuple[object, str]] = {}
    for name, described in by_name.items():
        if env.get(name):
            found.setdefault(described.key, (env[name], f"env {name}"))
    return found


def _flag_layer(flags: Mapping[str, object]) -> dict[str, tuple[object, str]]:
    by_key = {described.flag_key: described for described in describe(Config) if described.flag}
    found: dict[str, tuple[object, str]] = {}
    for name, value in flags.items():
        if name not in by_key:
            raise BadConfig(f"unknown flag {name}{_close(name, by_key)}")
        if value is not None:
            found[by_key[name].key] = (value, f"flag {by_key[name].flag}")
    return found


def _close(name: str, known: Mapping[str, object] | set[str]) -> str:
    """'; did you mean ...?', or the way to see all keys."""
    last = name.rpartition(".")[2]
    # Many who leave out the section write a right name at a wrong place: compare last parts too.
    near = [key for key in sorted(known) if key.rpartition(".")[2] == last]
    near += difflib.get_close_matches(name, sorted(known), n=2)
    near = list(dict.fromkeys(near))[:3]
    return f"; did you mean {' or '.join(near)}?" if near else "; `swarmcpp config` lists all keys"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`. A name other than localhost counts as reachable."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _check_together(config: Config, sources: Mapping[str, str]) -> None:
    server = config.server
    if not is_loopback(server.host) and server.api_key is None:
        raise BadConfig(
            f"server.host = {server.host!r} ({sources['server.host']}) lets other machines in, so an API key is"
            " required: set SWARMCPP_API_KEY or --api-key, or listen on 127.0.0.1"
        )
