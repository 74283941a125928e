"""The command line: flags and their help. What a command does is in swarmcpp/commands, imported when it runs."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from swarmcpp import __version__
from swarmcpp.config import Config, LoadedConfig, load_config
from swarmcpp.errors import StartupError, SwarmError
from swarmcpp.settings import describe

app = typer.Typer(
    name="swarmcpp",
    help="Serve large language models on CPUs, with an OpenAI API.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # rich's help would double the time that every command takes to start.
    rich_markup_mode=None,
)

EXIT_INTERRUPTED = 130


def _flag(key: str) -> Any:
    """The option or argument of a setting, with its help. Its text is parsed and checked by `load_config` alone."""
    found = next(described for described in describe(Config) if described.key == key)
    text = f"{found.help[0].upper()}{found.help[1:]}"
    if found.form or (found.limit and found.kind in ("whole number", "number")):
        text += f" ({found.limit})"
    metavar = {"whole number": "N", "number": "X", "path": "DIR"}.get(found.kind, "TEXT")
    if not found.flag.startswith("--"):
        return typer.Argument(help=text, metavar=found.flag, show_default=False)
    return typer.Option(found.flag, help=text, metavar=metavar, show_default=False)


ModelArgument = Annotated[str | None, _flag("model")]
Host = Annotated[str | None, _flag("server.host")]
Port = Annotated[str | None, _flag("server.port")]
ApiKey = Annotated[str | None, _flag("server.api_key")]
Threads = Annotated[str | None, _flag("engine.threads")]
CtxSize = Annotated[str | None, _flag("engine.ctx_size")]
Slots = Annotated[str | None, _flag("engine.slots")]
DataDir = Annotated[str | None, _flag("storage.data_dir")]
CacheSize = Annotated[str | None, _flag("storage.cache_size")]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file to read instead of swarmcpp.toml.", show_default=False)
]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="Say what happens; -vv: everything.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _load(file: Path | None, verbosity: int = 0, **flags: str | None) -> LoadedConfig:
    from swarmcpp.commands.terminal import stderr
    from swarmcpp.telemetry import setup_logging

    setup_logging(verbosity, stderr())
    return load_config(flags, os.environ, file)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"swarmcpp {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Serve large language models on CPUs, with an OpenAI API."""


@app.command()
def serve(
    model: ModelArgument = None,
    host: Host = None,
    port: Port = None,
    api_key: ApiKey = None,
    threads: Threads = None,
    ctx_size: CtxSize = None,
    slots: Slots = None,
    data_dir: DataDir = None,
    cache_size: CacheSize = None,
    config: ConfigFile = None,
    verbose: Verbose = 0,
) -> None:
    """Serve a model over an OpenAI API.

    MODEL is a GGUF file, or a name that `swarmcpp models` lists; that is downloaded when it is not here yet.
    """
    flags = {"model": model, "host": host, "port": port, "api_key": api_key, "data_dir": data_dir}
    loaded = _load(config, verbose, **flags, threads=threads, ctx_size=ctx_size, slots=slots, cache_size=cache_size)
    from swarmcpp.commands import serve as command

    command.run(loaded)


@app.command()
def chat(
    url: Annotated[str | None, typer.Option(help="Server to talk to.", show_default="http://127.0.0.1:8080")] = None,
    model: Annotated[str | None, typer.Option(help="Model to talk to.", show_default="the server's first")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    api_key: ApiKey = None,
    temperature: Annotated[float | None, typer.Option(help="Temperature of the sampling.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens in one answer.")] = None,
    config: ConfigFile = None,
) -> None:
    """Talk to a running server.

    Input that is not a terminal is read as one message per line.
    """
    from swarmcpp.commands import chat as command

    loaded = _load(config, api_key=api_key)
    options = command.ChatOptions(
        url=url or command.local_url(loaded.config.server),
        api_key=command.key_to_send(loaded, url),
        model=model,
        system=system,
        temperature=temperature,
        max_tokens=max_tokens,
    )
    raise typer.Exit(command.run(options))


@app.command()
def models(data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """List the models that have a name."""
    from swarmcpp.commands import models as command

    command.run(_load(config, data_dir=data_dir).config.storage, as_json=as_json)


@app.command()
def pull(
    name: Annotated[str, typer.Argument(help="Name in the catalogue (`swarmcpp models`).", show_default=False)],
    data_dir: DataDir = None,
    config: ConfigFile = None,
) -> None:
    """Download a model.

    An interrupted download goes on where it stopped.
    """
    from swarmcpp.commands import pull as command

    command.run(name, _load(config, data_dir=data_dir).config.storage)


@app.command()
def doctor(
    host: Host = None,
    port: Port = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Check this machine, with a remedy for each finding."""
    from swarmcpp.commands import doctor as command

    raise typer.Exit(command.run(_load(config, host=host, port=port, data_dir=data_dir).config, as_json=as_json))


@app.command("config")
def show_config(
    model: ModelArgument = None,
    host: Host = None,
    port: Port = None,
    api_key: ApiKey = None,
    threads: Threads = None,
    ctx_size: CtxSize = None,
    slots: Slots = None,
    data_dir: DataDir = None,
    cache_size: CacheSize = None,
    config: ConfigFile = None,
    as_json: AsJson = False,
) -> None:
    """Show each setting and where it came from."""
    flags = {"model": model, "host": host, "port": port, "api_key": api_key, "data_dir": data_dir}
    loaded = _load(config, 0, **flags, threads=threads, ctx_size=ctx_size, slots=slots, cache_size=cache_size)
    from swarmcpp.commands import show_config as command

    command.run(loaded, as_json=as_json)


cache_app = typer.Typer(help="Look after the prefixes that are cached on disk.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


@cache_app.command("ls")
def cache_ls(data_dir: DataDir = None, config: ConfigFile = None, as_json: AsJson = False) -> None:
    """List what is cached, by model."""
    loaded = _load(config, data_dir=data_dir)
    from swarmcpp.commands import cache as command

    command.ls(loaded, as_json=as_json)


@cache_app.command("clear")
def cache_clear(data_dir: DataDir = None, config: ConfigFile = None) -> None:
    """Remove everything that no running node uses."""
    loaded = _load(config, data_dir=data_dir)
    from swarmcpp.commands import cache as command

    command.clear(loaded)


@cache_app.command("verify")
def cache_verify(data_dir: DataDir = None, config: ConfigFile = None) -> None:
    """Read every block and drop what is damaged."""
    loaded = _load(config, data_dir=data_dir)
    from swarmcpp.commands import cache as command

    command.check(loaded)


@app.command()
def bench(
    model: ModelArgument = None,
    threads: Threads = None,
    data_dir: DataDir = None,
    config: ConfigFile = None,
    verbose: Verbose = 0,
) -> None:
    """Measure how fast this machine runs a model."""
    loaded = _load(config, verbose, model=model, threads=threads, data_dir=data_dir)
    from swarmcpp.commands import bench as command

    command.run(loaded)


def main() -> None:
    """The program. An error that swarmcpp raises on purpose is one line on standard error and exit code 2."""
    if sys.stdin is not None and sys.stdin.isatty():
        # A parent that ignores Ctrl-C (nohup, a background job) hands that down; at a terminal it is meant for us.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app()
    except SwarmError as error:
        from swarmcpp.commands.terminal import one_line

        sys.stderr.write(f"error: {one_line(error)}\n")
        raise SystemExit(error.exit_code if isinstance(error, StartupError) else 2) from None
    except KeyboardInterrupt:
        raise SystemExit(EXIT_INTERRUPTED) from None


if __name__ == "__main__":
    main()
