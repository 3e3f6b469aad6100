"""`softvllm chat`: talk to a running server and watch it think.

softvllm chat --url http://127.0.0.1:8000 --mode soft
echo "What is 7 plus 5?" | softvllm chat --mode fuzzy
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from clients.chat_screen import BOLD, PLAIN, Screen, wants_colour
from clients.chat_session import Quit, Session
from clients.chat_settings import ANSWER_FIELDS, COT_FIELDS, MODES, OFF, Settings
from clients.client import SoftClient
from clients.connection import url_from_environment
from clients.errors import NotASoftServer, SoftClientError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    out = argparse.ArgumentParser(
        prog="softvllm chat",
        description="Chat in the terminal with a running server (softvllm serve). The think "
        "phase is shown dimmed, the answer plain; /help lists the commands.",
    )
    out.add_argument(
        "--url",
        default=url_from_environment(),
        help="the server's address (default: SOFTVLLM_URL, or %(default)s)",
    )
    out.add_argument(
        "--api-key",
        default=os.environ.get("SOFTVLLM_API_KEY"),
        metavar="KEY",
        help="what the server was given as --api-key (default: SOFTVLLM_API_KEY)",
    )
    out.add_argument("--model", help="served model or adapter (default: the server's first)")
    out.add_argument(
        "--mode", default="soft", choices=MODES, help="how it thinks at first (default: soft)"
    )
    out.add_argument("--seed", type=int, help="seed of every answer (default: a fresh one each)")
    out.add_argument("--max-think-tokens", type=int, metavar="N", help="think budget")
    out.add_argument("--max-tokens", type=int, metavar="N", help="think and answer tokens in all")
    out.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any field of CoTParams, or answer_temperature (repeatable)",
    )
    out.add_argument("--system", metavar="TEXT", help="a system message")
    out.add_argument(
        "--timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="give up after this long without a word from the server (default: 600)",
    )
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the chat. Returns 0; 2 if it cannot start; 1 if a line from a pipe failed."""
    args = parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a model's text may not fit the terminal's encoding
            stream.reconfigure(errors="replace")
    screen = Screen(sys.stdout, sys.stderr, colour=wants_colour(sys.stdout))
    try:
        with SoftClient(args.url, args.api_key, model=args.model, timeout=args.timeout) as client:
            return _chat(client, args, screen)
    except (SoftClientError, ValueError) as error:
        screen.error(f"softvllm chat: {error}")
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # e.g. `| head`: nobody reads on, which is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _chat(client: SoftClient, args: argparse.Namespace, screen: Screen) -> int:
    settings = _settings(args, _can_think(client, args.mode))
    interactive = sys.stdin.isatty()
    session = Session(client, settings, screen, args.system)
    if interactive:
        screen.note(f"{client.model_name()} at {client.url}; {settings.describe()}; /help helps")
    read = _from_terminal(session) if interactive else sys.stdin.readline
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            if not interactive:
                raise
            screen.note("\n(Ctrl-D or /quit leaves)")
            continue
        if not line:
            break
        try:
            session.handle(line)
        except Quit:
            break
    return int(session.failed and not interactive)


def _can_think(client: SoftClient, mode: str) -> bool:
    """Whether the server has a think phase. Raises if it has none and `mode` needs one."""
    try:
        info = client.info()
    except NotASoftServer:
        if mode != OFF:
            raise
        return False
    if info.refusal and mode != OFF:
        raise ValueError(f"this server cannot think: {info.refusal}; --mode off chats anyway")
    return not info.refusal


def _settings(args: argparse.Namespace, thinks: bool) -> Settings:
    settings = Settings(mode=args.mode, thinks=thinks)
    for name in ("seed", "max_think_tokens", "max_tokens"):
        if getattr(args, name) is not None:
            settings.set(name, str(getattr(args, name)))
    for item in args.set:
        name, equals, value = item.partition("=")
        if not equals:
            raise ValueError(f"--set takes FIELD=VALUE, got {item!r}")
        settings.set(name.strip(), value.strip())
    return settings


def _from_terminal(session: Session) -> Callable[[], str]:
    """A reader with line editing and completion; an empty text means the end."""
    marks = ("\x01", "\x02")  # tell readline that a colour has no width
    try:
        import readline
    except ImportError:  # not on Windows
        marks = ("", "")
    else:
        _complete(readline, session)
    start, end = (f"{marks[0]}{style}{marks[1]}" for style in (BOLD, PLAIN))
    colour = wants_colour(sys.stdout)

    def read() -> str:
        prompt = f"{session.settings.mode}> "
        try:
            return input(f"{start}{prompt}{end}" if colour else prompt) + "\n"
        except EOFError:
            print()
            return ""

    return read


def _complete(readline: Any, session: Session) -> None:
    """Tab completes commands, modes and fields."""
    words = {
        "/mode": MODES,
        "/set": (*COT_FIELDS, *ANSWER_FIELDS),
        "/unset": (*COT_FIELDS, *ANSWER_FIELDS),
    }

    def find(text: str, state: int) -> str | None:
        line = readline.get_line_buffer()[: readline.get_begidx()].split()
        choices = words.get(line[0], ()) if len(line) == 1 else () if line else session.commands
        found = [word for word in choices if word.startswith(text)] if text or line else []
        return found[state] + " " if state < len(found) else None

    readline.set_completer_delims(" \t")
    readline.set_completer(find)
    readline.parse_and_bind("tab: complete")


if __name__ == "__main__":
    sys.exit(main())
