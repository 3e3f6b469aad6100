"""`softvllm serve [MODEL] [any flag of vllm serve]`: vLLM's server with our layer.

Parses the command line with vLLM's own parser, adds what enables the think phase, and hands over to
`vllm serve`. Mistakes that are seen before the engine starts cost one line, not a traceback.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from server import cpu
from server.options import MODES, ServerOptions, load_config, with_flags

PLUGIN = "softvllm"
SERVED_NAME = "smollm2-135m-instruct"
DEBUG = "SOFTVLLM_DEBUG"
"""Environment variable: anything but empty shows tracebacks."""


def own_parser() -> argparse.ArgumentParser:
    """The flags that vLLM does not know."""
    parser = argparse.ArgumentParser(
        prog="softvllm serve",
        usage="softvllm serve [MODEL] [options] [any option of vllm serve]",
        description="Serve a model with vLLM's OpenAI-compatible server; every request may think "
        "hard, soft, fuzzy or mixed. MODEL is a Hugging Face name or a folder (default: "
        "SmolLM2-135M-Instruct, prepared on first use).",
        epilog="All of vLLM's options work, e.g. --host 127.0.0.1 --port 8000 --api-key KEY "
        "--max-model-len 4096 --tensor-parallel-size 2. `softvllm serve --help=all` lists them.",
        allow_abbrev=False,
        add_help=False,
    )
    parser.add_argument(
        "--default-cot-mode",
        choices=MODES,
        help="mode of requests that name none (default: they stay stock vLLM requests)",
    )
    parser.add_argument(
        "--cot-config",
        metavar="FILE.toml",
        help="defaults: default_mode and a table [cot] with fields of CoTParams",
    )
    parser.add_argument(
        "--enable-rl",
        action="store_true",
        help="open vLLM's RL control (pause, weight updates) behind the API key, with the "
        "weight-transfer back-end 'safetensors' unless another one is configured",
    )
    parser.add_argument(
        "--trace-memory-gib",
        type=float,
        metavar="GIB",
        help="host memory that recorded soft inputs may take (default: 8)",
    )
    return parser


def main(argv: Sequence[str]) -> int:
    """Run the server until it is stopped; returns the exit code."""
    if "-h" in argv or "--help" in argv:
        own_parser().print_help()
        return 0
    own, rest = own_parser().parse_known_args(list(argv))
    try:
        options = load_config(own.cot_config) if own.cot_config else ServerOptions()
        options = with_flags(options, default_mode=own.default_cot_mode, enable_rl=own.enable_rl)
        _check_port_early(rest)
        say("loading vLLM (some seconds) ...")
        args = prepare(rest, options, own.trace_memory_gib)
        return _run(args)
    except KeyboardInterrupt:
        return 130
    except Exception as error:  # the user's mistake or the machine's limit: one line
        if os.environ.get(DEBUG):
            raise
        say(f"{_explain(error)} (set {DEBUG}=1 to see where)")
        return 1


def say(text: str) -> None:
    """Progress and errors, on stderr like vLLM's log."""
    print(f"softvllm: {text}", file=sys.stderr, flush=True)


def prepare(rest: Sequence[str], options: ServerOptions, trace_memory: float | None) -> Any:
    """vLLM's parsed arguments with our layer in them; also sets the environment it needs.

    Raises:
        ValueError: an argument is out of range or the model does not exist.
    """
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from softvllm.engine import compat
    from softvllm.engine.keys import WIRE_KEY
    from softvllm.engine.llm import engine_config

    compat.check_version()
    os.environ.update(options.to_env())
    os.environ["VLLM_PLUGINS"] = ",".join(_plugins())
    cli_env_setup()
    parser = FlexibleArgumentParser(prog="softvllm")
    command = ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    # vLLM's parser looks at sys.argv for `--help=...` and the config file.
    sys.argv = ["softvllm", "serve", *rest]
    args = parser.parse_args(["serve", *rest])
    _choose_model(args)
    # vLLM's authentication takes the root path off as text: "/" would leave "v1/models", unguarded.
    args.root_path = (args.root_path or "").rstrip("/") or None
    additional = dict(args.additional_config or {})
    additional[WIRE_KEY] = {**additional.get(WIRE_KEY, {}), **engine_config(trace_memory)[WIRE_KEY]}
    args.additional_config = additional
    if options.enable_rl and args.weight_transfer_config is None:
        from vllm.config.weight_transfer import WeightTransferConfig

        args.weight_transfer_config = WeightTransferConfig(backend="safetensors")
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        cpu.fit(args, rest, say)
    args.dispatch_function = command.cmd
    command.validate(args)
    return args


def _plugins() -> list[str]:
    """`VLLM_PLUGINS`: what the user allowed, or everything, and in any case ours.

    vLLM loads endpoint plugins only when this variable names them, and setting it restricts all
    other groups to the named ones; so all of them are named.
    """
    if not entry_points(group="vllm.endpoint_plugins", name=PLUGIN):
        raise RuntimeError(
            "vLLM cannot find the server's routes: the installed package is older than this code "
            "or incomplete; install it again (make install, or pip install -e . in a checkout)"
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None:
        names = [name for name in allowed.split(",") if name]
    else:
        names = [
            entry.name
            for group in entry_points().groups
            if group.startswith("vllm.") and group != "vllm.endpoint_plugins"
            for entry in entry_points(group=group)
        ]
    return list(dict.fromkeys([*names, PLUGIN]))


def _choose_model(args: Any) -> None:
    from softvllm.models import DEFAULT_MODEL, resolve_model

    model = args.model_tag
    if model == DEFAULT_MODEL or (model is None and args.config is None):
        args.model_tag = resolve_model(None, progress=say)
        if args.served_model_name is None:
            args.served_model_name = [SERVED_NAME]
    elif model is not None and model.startswith(("/", ".", "~")):
        folder = Path(model).expanduser()
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{model} is no model folder (it has no config.json); give a folder that "
                "save_pretrained wrote, or a Hugging Face name"
            )
        args.model_tag = str(folder)


def _check_port_early(rest: Sequence[str]) -> None:
    """A taken port costs a second, not a model load."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--host")
    parser.add_argument("--port")
    parser.add_argument("--uds")
    parser.add_argument("--config")
    parser.add_argument("--headless", action="store_true")
    known, _ = parser.parse_known_args(list(rest))
    if known.uds is not None or known.headless:
        return
    if known.config is not None and known.port is None:
        return  # vLLM's file may name one
    try:
        port = int("8000" if known.port is None else known.port)
    except ValueError:
        raise ValueError(f"--port takes a number, got {known.port!r}") from None
    if not 0 <= port <= 65535:
        raise ValueError(f"--port must be in [0, 65535], got {port}")
    host = known.host or "0.0.0.0"
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ValueError(
                f"cannot listen on {host}:{port} ({error.strerror}); stop what uses it or choose "
                "another --port"
            ) from None


def _run(args: Any) -> int:
    where = f"http://{args.host or '127.0.0.1'}:{args.port}"
    say(
        f"starting the engine on {args.model_tag or args.config} (20 s to minutes); then "
        f"{where}/v1 answers, {where}/playground shows modes side by side"
    )
    start = time.monotonic()
    args.dispatch_function(args)
    say(f"stopped after {time.monotonic() - start:.0f} s")
    return 0


def _explain(error: Exception) -> str:
    """One line that says what to do, for what goes wrong most."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "Engine core initialization failed" in text:
        return "the engine could not start; the reason is in the log above, where it says ERROR"
    if "does not appear to have a file named config.json" in text or "is not a valid model" in text:
        return f"{text[:300]} ... check the model's name, your network, or give a folder"
    return text[:1000]
