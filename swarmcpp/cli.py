"""The command line: flags and their help. What a command does is in swarmcpp/commands, imported when it runs."""

from __future__ import annotations

import inspect
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from swarmcpp import __version__
from swarmcpp.config import Config, LoadedConfig, load_config
from swarmcpp.errors import StartupError, SwarmError
from swarmcpp.settings import describe

if TYPE_CHECKING:
    from swarmcpp.commands.server import Server

Flag = str | bool | None
Command = TypeVar("Command", bound=Callable[..., None])

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

_SETTINGS = {described.flag_key: described for described in describe(Config) if described.flag}
_SERVING = tuple(name for name in _SETTINGS if name != "model")


def _parameter(name: str) -> inspect.Parameter:
    """The option or argument of a setting, with its help. Its text is parsed and checked by `load_config` alone."""
    found = _SETTINGS[name]
    text = f"{found.help[0].upper()}{found.help[1:]}"
    if found.form or (found.limit and found.kind in ("whole number", "number")):
        text += f" ({found.limit})"
    kind: Any = str | None
    if found.kind == "boolean":
        kind = bool | None
        info = typer.Option(f"{found.flag}/--no-{found.flag.removeprefix('--')}", help=text, show_default=False)
    elif found.flag.startswith("--"):
        metavar = {"whole number": "N", "number": "X", "path": "DIR"}.get(found.kind, "TEXT")
        info = typer.Option(found.flag, help=text, metavar=metavar, show_default=False)
    else:
        info = typer.Argument(help=text, metavar=found.flag, show_default=False)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, info])


def _with_settings(*names: str) -> Callable[[Command], Command]:
    """Make a command with `**flags` take the flags of these settings, before its own options."""

    def add(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in own]
        parameters = [*(_parameter(name) for name in names), *own]
        vars(command)["__signature__"] = signature.replace(parameters=parameters)
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return add


ConfigFile = Annotated[
    Path | None, typer.Option("--config", help="TOML file to read instead of swarmcpp.toml.", show_default=False)
]
Verbose = Annotated[
    int, typer.Option("--verbose", "-v", count=True, help="Say what happens; -vv: everything.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Url = Annotated[
    str | None,
    typer.Option("--url", help="Server to talk to.", show_default="the node of --data-dir, or http://127.0.0.1:8080"),
]


def _load(file: Path | None, verbosity: int = 0, /, **flags: Flag) -> LoadedConfig:
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
@_with_settings("model", *_SERVING)
def serve(config: ConfigFile = None, verbose: Verbose = 0, **flags: Flag) -> None:
    """Serve a model over an OpenAI API.

    MODEL is a GGUF file, or a name that `swarmcpp models` lists; that is downloaded when it is not here yet. Without
    MODEL a small one that comes with swarmcpp is served.
    """
    loaded = _load(config, verbose, **flags)
    from swarmcpp.commands import serve as command

    command.run(loaded)


@app.command()
@_with_settings(*_SERVING)
def join(
    token: Annotated[
        str | None,
        typer.Argument(
            help="What `swarmcpp token` shows; without it: the swarm of last time.", metavar="TOKEN", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Local copy of a model of the swarm, which is fetched otherwise.", metavar="FILE"),
    ] = None,
    config: ConfigFile = None,
    verbose: Verbose = 0,
    **flags: Flag,
) -> None:
    """Join a swarm and serve what it serves."""
    loaded = _load(config, verbose, model=model, **flags)
    from swarmcpp.commands import join as command

    command.run(loaded, token)


@app.command()
@_with_settings("api_key", "data_dir")
def chat(
    url: Url = None,
    model: Annotated[str | None, typer.Option(help="Model to talk to.", show_default="the server's first")] = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Temperature of the sampling.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens in one answer.")] = None,
    config: ConfigFile = None,
    **flags: Flag,
) -> None:
    """Talk to a running server.

    Without --url, and when no node runs with the data directory or at the usual address, one is started with the small
    model that comes with swarmcpp, for as long as the conversation lasts. Input that is not a terminal is read as one
    message per line.
    """
    from swarmcpp.commands import chat as command

    loaded = _load(config, **flags)
    server = _server(loaded, url)
    options = command.ChatOptions(
        url=server.url,
        api_key=server.api_key,
        model=model,
        system=system,
        temperature=temperature,
        max_tokens=max_tokens,
        # Never another model than one that was named.
        data_dir=loaded.config.storage.data_dir if url is None and model is None else None,
    )
    raise typer.Exit(command.run(options))


def _server(loaded: LoadedConfig, url: str | None) -> Server:
    from swarmcpp.commands.server import find_server

    return find_server(loaded, url)


@app.command()
@_with_settings("api_key", "data_dir")
def status(
    url: Url = None,
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    as_json: AsJson = False,
    config: ConfigFile = None,
    **flags: Flag,
) -> None:
    """Watch the swarm as a running node sees it."""
    loaded = _load(config, **flags)
    from swarmcpp.commands import status as command

    command.run(_server(loaded, url), once=once, as_json=as_json)


@app.command()
@_with_settings("api_key", "data_dir")
def plan(
    url: Url = None,
    added: Annotated[
        list[str] | None,
        typer.Option(
            "--with",
            help="A machine to add: its memory (16G), NAME=16G, or a node that serves nothing yet; may be repeated.",
            metavar="NODE",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    config: ConfigFile = None,
    **flags: Flag,
) -> None:
    """Tell which machine would hold what of the model, how fast answers would be, and what another machine changes."""
    loaded = _load(config, **flags)
    from swarmcpp.commands import plan as command

    command.run(_server(loaded, url), added or [], as_json=as_json)


@app.command()
@_with_settings("api_key", "data_dir")
def peers(url: Url = None, config: ConfigFile = None, as_json: AsJson = False, **flags: Flag) -> None:
    """List the other nodes of the swarm.

    When no node runs here: the addresses that are remembered.
    """
    loaded = _load(config, **flags)
    from swarmcpp.commands import peers as command

    data_dir = loaded.config.storage.data_dir
    command.run(_server(loaded, url), data_dir, may_remember=url is None, as_json=as_json)


@app.command()
@_with_settings("api_key", "data_dir")
def token(
    url: Url = None,
    rotate: Annotated[bool, typer.Option("--rotate", help="Make a new key; every machine has to join again.")] = False,
    config: ConfigFile = None,
    **flags: Flag,
) -> None:
    """Show the command that joins this machine's swarm. It is a secret: who has it can join."""
    loaded = _load(config, **flags)
    from swarmcpp.commands import token as command

    act = command.rotate if rotate else command.show
    act(_server(loaded, url), loaded.config.storage.data_dir)


@app.command()
@_with_settings("data_dir")
def leave(config: ConfigFile = None, **flags: Flag) -> None:
    """Forget the swarm of this machine."""
    loaded = _load(config, **flags)
    from swarmcpp.commands import leave as command

    command.run(loaded.config.storage.data_dir)


@app.command()
@_with_settings("data_dir")
def models(config: ConfigFile = None, as_json: AsJson = False, **flags: Flag) -> None:
    """List the models that have a name."""
    from swarmcpp.commands import models as command

    command.run(_load(config, **flags).config.storage, as_json=as_json)


@app.command()
@_with_settings("data_dir")
def pull(
    name: Annotated[str, typer.Argument(help="Name in the catalogue (`swarmcpp models`).", show_default=False)],
    config: ConfigFile = None,
    **flags: Flag,
) -> None:
    """Download a model.

    An interrupted download goes on where it stopped.
    """
    from swarmcpp.commands import pull as command

    command.run(name, _load(config, **flags).config.storage)


@app.command("slice")
@_with_settings("data_dir")
def slice_model(
    model: Annotated[Path, typer.Argument(help="GGUF file of the whole model.", metavar="MODEL", show_default=False)],
    first: Annotated[int, typer.Argument(help="First layer, from 0.", metavar="A", show_default=False)],
    last: Annotated[int, typer.Argument(help="Layer after the last.", metavar="B", show_default=False)],
    out: Annotated[Path, typer.Argument(help="GGUF file to write.", metavar="OUT", show_default=False)],
    config: ConfigFile = None,
    **flags: Flag,
) -> None:
    """Write layers A to B (without B) of a model as a GGUF of their own."""
    from swarmcpp.commands import slice as command

    command.run(model, first, last, out, _load(config, **flags).config.storage.data_dir)


@app.command()
@_with_settings("host", "port", "data_dir")
def doctor(config: ConfigFile = None, as_json: AsJson = False, **flags: Flag) -> None:
    """Check this machine, with a remedy for each finding."""
    from swarmcpp.commands import doctor as command

    raise typer.Exit(command.run(_load(config, **flags).config, as_json=as_json))


@app.command("config")
@_with_settings("model", *_SERVING)
def show_config(config: ConfigFile = None, as_json: AsJson = False, **flags: Flag) -> None:
    """Show each setting and where it came from."""
    loaded = _load(config, **flags)
    from swarmcpp.commands import show_config as command

    command.run(loaded, as_json=as_json)


cache_app = typer.Typer(help="Look after the prefixes that are cached on disk.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")


@cache_app.command("ls")
@_with_settings("data_dir")
def cache_ls(config: ConfigFile = None, as_json: AsJson = False, **flags: Flag) -> None:
    """List what is cached, by model."""
    loaded = _load(config, **flags)
    from swarmcpp.commands import cache as command

    command.ls(loaded, as_json=as_json)


@cache_app.command("clear")
@_with_settings("data_dir")
def cache_clear(config: ConfigFile = None, **flags: Flag) -> None:
    """Remove everything that no running node uses."""
    loaded = _load(config, **flags)
    from swarmcpp.commands import cache as command

    command.clear(loaded)


@cache_app.command("verify")
@_with_settings("data_dir")
def cache_verify(config: ConfigFile = None, **flags: Flag) -> None:
    """Read every block and drop what is damaged."""
    loaded = _load(config, **flags)
    from swarmcpp.commands import cache as command

    command.check(loaded)


@app.command()
@_with_settings("model", "threads", "data_dir")
def bench(config: ConfigFile = None, verbose: Verbose = 0, **flags: Flag) -> None:
    """Measure how fast this machine runs a model."""
    loaded = _load(config, verbose, **flags)
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
