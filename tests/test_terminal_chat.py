"""`softvllm chat`: what a user types and sees, against a server without a model.

Most tests run `main` in this process with a pipe for stdin. Signals and terminals need a process
of their own.
"""

from __future__ import annotations

import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import IO, Any

import pytest
from fake_server import FakeServer
from fake_thoughts import FORCED, WORDS
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from clients.chat import main
from clients.chat_screen import clean
from clients.chat_settings import COT_FIELDS, MODES, OWN_FIELDS, Settings, is_foreign
from softvllm.core.params import CoTParams

CHAT = "/v1/chat/completions"
ESC = "\x1b"


@pytest.fixture
def server() -> Iterator[FakeServer]:
    with FakeServer() as fake:
        yield fake


class Talk:
    """Runs the chat with given lines and looks at what came out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: Any, server: FakeServer) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys
        self._server = server
        self.out = self.err = ""

    def __call__(self, *lines: str, flags: tuple[str, ...] = ()) -> int:
        text = "".join(line + "\n" for line in lines)
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code = main(["--url", self._server.url, *flags])
        self.out, self.err = self._capsys.readouterr()
        return code

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return self._server.bodies(CHAT)


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: Any, server: FakeServer) -> Talk:
    return Talk(monkeypatch, capsys, server)


# ---- asking -------------------------------------------------------------------------------------


def test_a_piped_question_is_answered_with_think_phase_and_answer_told_apart(talk: Talk) -> None:
    assert talk("What is 7 plus 5?") == 0
    think, answer, summary = talk.out.splitlines()
    assert think.startswith("[think] ") and answer.startswith(f"[answer] {FORCED.strip()}")
    assert re.fullmatch(r"\(soft: 4 think tokens, ended by budget, .*seed \d+\)", summary)
    assert ESC not in talk.out and talk.err == ""


def test_the_conversation_remembers_answers_but_no_thoughts(talk: Talk) -> None:
    talk("One?", "Two?", flags=("--system", "Be brief."))
    first, second = (body["messages"] for body in talk.bodies)
    assert first == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One?"},
    ]
    assert second[:2] == first and second[3] == {"role": "user", "content": "Two?"}
    assert second[2]["role"] == "assistant" and second[2]["content"].startswith(FORCED)
    thoughts = re.findall(r"\[think\] (.*)", talk.out)
    assert len(thoughts) == 2 and thoughts[0] not in second[2]["content"]


def test_reset_forgets_all_but_the_system_message(talk: Talk) -> None:
    talk("One?", "/reset", "Two?", flags=("--system", "Be brief."))
    assert [m["content"] for m in talk.bodies[1]["messages"]] == ["Be brief.", "Two?"]


def test_flags_shape_the_first_question(talk: Talk) -> None:
    talk(
        "Hi",
        flags=(
            *("--mode", "mixed", "--seed", "7", "--max-think-tokens", "3", "--max-tokens", "50"),
            *("--set", "policy_params={}", "--set", "answer_temperature=0"),
        ),
    )
    (body,) = talk.bodies
    assert body["cot_mode"] == "mixed" and (body["max_tokens"], body["temperature"]) == (50, 0)
    assert body["cot"] == {
        "seed": 7,
        "max_think_tokens": 3,
        "policy_params": {},
        "record": "top",
    }


def test_mode_off_stays_stock_even_where_the_server_has_a_default(talk: Talk) -> None:
    talk._server.behaviour.default_mode = "soft"
    assert talk("/mode off", "Hi") == 0
    assert "cot" not in talk.bodies[0] and talk.bodies[0]["cot_mode"] == "hard"
    assert "without a think phase" in talk.out and "[think]" not in talk.out


def test_modes_are_switched_between_questions(talk: Talk) -> None:
    talk("Hi", "/mode fuzzy", "Hi", "/mode hard", "Hi")
    assert [b["cot_mode"] for b in talk.bodies] == ["soft", "fuzzy", "hard"]
    assert all(b["cot"] == {"record": "top"} for b in talk.bodies), "hard with an object thinks"
    assert "(fuzzy: 4 think tokens" in talk.out and "(hard: 4 think tokens" in talk.out


# ---- commands -----------------------------------------------------------------------------------


def test_again_repeats_the_answer_exactly_and_does_not_lengthen_the_conversation(
    talk: Talk,
) -> None:
    talk("Hi", "/again", "/again", "Next?")
    assert talk.out.count("(the same text as before)") == 2
    thoughts, answers = (re.findall(rf"\[{part}\] (.*)", talk.out) for part in ("think", "answer"))
    assert len(set(thoughts[:3])) == 1 == len(set(answers[:3]))
    first, again, _, last = talk.bodies
    assert again["messages"] == first["messages"] and "seed" in again["cot"]
    assert len(last["messages"]) == 3 and "seed" not in last["cot"]


def test_again_says_so_when_the_text_changed(talk: Talk) -> None:
    talk._server.behaviour.drift = True
    talk("Hi", "/again")
    assert "not the same text" in talk.out


def test_steps_shows_the_last_think_steps_with_their_numbers(talk: Talk) -> None:
    talk("Hi", "/steps", "/steps 2", flags=("--max-think-tokens", "5", "--set", "record_top=2"))
    rows = [line for line in talk.out.splitlines() if re.match(r" +\d+  soft +0\.50", line)]
    assert [int(row.split()[0]) for row in rows] == [0, 1, 2, 3, 4, 3, 4]
    assert rows[3:5] == rows[5:7]
    assert all(any(f"{word!r} 0.50" in row for word in WORDS) for row in rows)
    assert all(row.count(" 0.25") == 1 and " 0.12" not in row for row in rows)


def test_a_seed_is_kept_shown_and_let_go(talk: Talk) -> None:
    talk("/seed", "/seed 9", "Hi", "Hi", "/seed", "/seed off", "Hi")
    assert [b["cot"].get("seed") for b in talk.bodies] == [9, 9, None]
    assert "a fresh one for each answer" in talk.out
    assert "seed: 9; the last answer had 9" in talk.out


def test_set_is_typed_and_unset_gives_the_field_back(talk: Talk) -> None:
    talk(
        "/set temperature 0.7",
        "/set noise=none",
        '/set end_strings ["a = b", "c"]',
        '/set force_after_end " so: "',
        "/set max_tokens 40",
        "Hi",
        "/unset noise",
        "/unset max_tokens",
        "/set",
        "Hi",
    )
    assert talk.err == ""
    first, second = talk.bodies
    kept = {"temperature": 0.7, "end_strings": ["a = b", "c"], "force_after_end": " so: "}
    assert first["cot"] == {**kept, "noise": "none", "record": "top"}
    assert first["max_tokens"] == 40 and "max_tokens" not in second
    assert second["cot"] == {**kept, "record": "top"}
    assert 'mode soft: temperature=0.7, end_strings=["a = b", "c"]' in talk.out


BAD_LINES = {
    "/nonsense": "unknown command /nonsense; /help",
    "/mode loud": "must be one of soft, hard, fuzzy, mixed, off, got 'loud'",
    "/set temperature": "needs a value",
    "/set temperature warm": "cot.temperature: must be a number",
    "/set speed 5": "cot.speed: unknown field",
    "/set top_k 2000": "cot.top_k: must be an integer in [0, 1024]",
    "/set record dense": "the chat always records the top tokens",
    "/set mode soft": "use /mode",
    "/set policy blend": "only mode mixed takes a policy",
    "/set max_tokens 0": "integer >= 1",
    "/set answer_temperature -1": "number >= 0",
    "/unset top_k": "top_k is not set",
    "/seed x": "cot.seed: must be an integer",
    "/again": "no answer to repeat",
    "/steps": "no think steps",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_mistake_is_explained_at_once_and_the_chat_goes_on(talk: Talk, line: str) -> None:
    assert talk(line, "Hi") == 1, "a script must see that a line failed"
    assert BAD_LINES[line] in talk.err
    assert talk.bodies[0]["cot"] == {"record": "top"}, "nothing of the mistake is sent"
    assert "[answer]" in talk.out


def test_fields_of_mode_mixed_are_dropped_aloud_and_other_conflicts_refused(talk: Talk) -> None:
    talk(
        "/mode mixed",
        "/set policy interleave",
        '/set policy_params {"p": 0.2}',
        "/mode soft",
        "Hi",
        "/set noise_scale 0.5",
        "/mode hard",
        "Hi",
    )
    assert "dropped policy and policy_params" in talk.out
    assert "mode hard feeds sampled tokens" in talk.err
    assert [b["cot_mode"] for b in talk.bodies] == ["soft", "soft"], (
        "the refused switch changes nothing"
    )


def test_a_policy_unknown_here_is_left_to_the_server() -> None:
    settings = Settings()
    settings.choose("mixed")
    settings.set("policy", "of_another_package")
    assert settings.request()["cot"]["policy"] == "of_another_package"
    with pytest.raises(ValueError, match="top_k"):
        settings.set("top_k", "-1")


def test_help_names_every_command_and_quit_leaves(talk: Talk) -> None:
    assert talk("/help", "/quit", "Hi") == 0
    for command in ("/mode", "/set", "/unset", "/seed", "/again", "/steps", "/reset", "/quit"):
        assert f"  {command}" in talk.out
    assert talk.bodies == []


# ---- what goes wrong ----------------------------------------------------------------------------


def test_an_absent_server_ends_the_chat_with_one_line(capsys: Any) -> None:
    assert main(["--url", "127.0.0.1:9"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "http://127.0.0.1:9" in err and "softvllm serve" in err


def test_a_stock_server_chats_in_mode_off_only(talk: Talk) -> None:
    talk._server.behaviour.soft = False
    assert talk("Hi") == 2 and "stock vLLM" in talk.err
    assert talk("Hi", "/mode soft", flags=("--mode", "off")) == 1
    assert "only knows mode off" in talk.err
    (body,) = talk.bodies
    assert "cot_mode" not in body and "cot" not in body


def test_a_bad_flag_is_refused_before_anything_is_sent(talk: Talk) -> None:
    assert talk("Hi", flags=("--set", "top_k=-1")) == 2 and "cot.top_k" in talk.err
    assert talk("Hi", flags=("--set", "top_k")) == 2 and "FIELD=VALUE" in talk.err
    assert talk.bodies == []


def test_a_failed_answer_is_no_turn(talk: Talk) -> None:
    talk._server.behaviour.nan_after = 3
    assert talk("One?", "Two?") == 1
    assert talk.err.count("NaN logits") == 2
    assert [len(b["messages"]) for b in talk.bodies] == [1, 1]


def test_the_model_cannot_steer_the_terminal(talk: Talk) -> None:
    talk._server.behaviour.control_characters = True
    talk("Hi", "/steps")
    assert ESC not in talk.out and "\N{REPLACEMENT CHARACTER}[2J" in talk.out


@given(st.text())
def test_cleaned_text_holds_no_control_characters_and_keeps_the_rest(text: str) -> None:
    shown = clean(text)
    assert len(shown) == len(text)
    for before, after in zip(text, shown):
        control = ord(before) < 32 or 127 <= ord(before) < 160
        assert after == (before if not control or before in "\t\n" else "\N{REPLACEMENT CHARACTER}")


values = st.one_of(
    st.none(), st.booleans(), st.integers(-5, 3000), st.floats(allow_nan=False), st.text(max_size=9)
)
changes = st.lists(
    st.tuples(st.sampled_from([*COT_FIELDS, "/mode", "/unset"]), values, st.sampled_from(MODES))
)


@examples(deadline=None, max_examples=300)
@given(changes)
def test_whatever_is_set_the_next_request_is_valid(steps: list[tuple[str, Any, str]]) -> None:
    import json

    settings = Settings()
    for name, value, mode in steps:
        try:
            if name == "/mode":
                settings.choose(mode)
            elif name == "/unset":
                settings.unset(str(value))
            else:
                settings.set(name, json.dumps(value))
        except ValueError:
            continue
    assert not set(settings.cot) & set(OWN_FIELDS)
    request = settings.request()["cot"]
    if settings.mode == "off":
        assert request == "hard"
    else:
        extra = {"policy": "blend"} if settings.mode == "mixed" else {}
        if is_foreign(request.get("policy")):
            assert isinstance(request.get("policy_params", {}), dict)
            extra, request = {}, {**request, "mode": "soft", "policy": None, "policy_params": {}}
        CoTParams.from_dict({**extra, **request})


# ---- a process of its own: signals and terminals ------------------------------------------------


def heed_ctrl_c() -> None:
    """Programs that a script runs in the background inherit that Ctrl-C is ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(server: FakeServer, stdin: Any, stdout: Any, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "clients.chat", "--url", server.url],
        stdin=stdin,
        stdout=stdout,
        stderr=subprocess.PIPE if stdout is subprocess.PIPE else stdout,
        text=True,
        env={**os.environ, "TERM": "xterm", "SOFTVLLM_API_KEY": "", **env},
        start_new_session=True,  # a real Ctrl-C meant for the tests is not the chat's
        preexec_fn=heed_ctrl_c,
    )


def read_until(stream: IO[str], wanted: str) -> str:
    seen = ""
    while wanted not in seen:
        letter = stream.read(1)
        assert letter, f"the chat ended; so far: {seen!r}"
        seen += letter
    return seen


def test_ctrl_c_stops_the_running_answer_only(server: FakeServer) -> None:
    server.behaviour.hold_after = 4
    chat = start(server, subprocess.PIPE, subprocess.PIPE)
    assert chat.stdin is not None and chat.stdout is not None
    try:
        chat.stdin.write("One?\n")
        chat.stdin.flush()
        read_until(chat.stdout, "[think] ")
        chat.send_signal(signal.SIGINT)
        assert server.hung_up.wait(30), "the server learns of it"
        read_until(chat.stdout, "stopped; this turn is not part of the conversation")
        server.behaviour.hold_after = None
        out, err = chat.communicate("Two?\n", timeout=60)
        assert "[answer]" in out and err == "" and chat.returncode == 0
        second = server.bodies(CHAT)[1]["messages"]
        assert [m["content"] for m in second] == ["Two?"]
    finally:
        chat.kill()
        chat.wait()


class Terminal:
    """The chat on a pseudo-terminal."""

    def __init__(self, server: FakeServer, **env: str) -> None:
        self._master, slave = pty.openpty()
        self.process = start(server, slave, slave, **env)
        os.close(slave)
        self.seen = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def interrupt_until(self, wanted: str) -> None:
        """Ctrl-C at the prompt, again each second: one that comes while readline works on a key is
        heeded by CPython at the next key or signal only."""
        while wanted not in self.seen:
            self.process.send_signal(signal.SIGINT)
            if select.select([self._master], [], [], 1)[0]:
                self.seen += os.read(self._master, 4096).decode(errors="replace")
        self.until(wanted)

    def until(self, wanted: str) -> str:
        """What is shown up to a text, since the last call."""
        while wanted not in self.seen:
            ready, _, _ = select.select([self._master], [], [], 60)
            assert ready, f"the terminal is silent; so far: {self.seen!r}"
            try:
                self.seen += os.read(self._master, 4096).decode(errors="replace")
            except OSError:
                raise AssertionError(f"the chat ended; so far: {self.seen!r}") from None
        before, _, self.seen = self.seen.partition(wanted)
        return before + wanted


def test_on_a_terminal_thoughts_are_dimmed_and_the_prompt_names_the_mode(
    server: FakeServer,
) -> None:
    with Terminal(server, NO_COLOR="") as terminal:
        assert server.url in terminal.until("/help helps")
        assert ESC in terminal.until("soft> ")
        terminal.type("Hi\n")
        shown = terminal.until("seed ")
        assert f"{ESC}[2m" in shown and "[think]" not in shown
        assert f"{ESC}[2m{FORCED.strip()}" not in shown and FORCED.strip() in shown
        terminal.until("soft> ")
        terminal.type("/mode fuzzy\n")
        terminal.until("fuzzy> ")
        terminal.type("/se\t\x15/set record_t\t5\n")
        terminal.until("record_top=5")
        terminal.until("fuzzy> ")
        terminal.type("half a line")
        terminal.until("half a line")
        terminal.interrupt_until("leaves)")
        terminal.until("fuzzy> ")
        server.behaviour.hold_after = 3
        terminal.type("Hold?\n")
        terminal.until("Hold?")
        terminal.until(f"{ESC}[2m")
        terminal.process.send_signal(signal.SIGINT)
        terminal.until("stopped; this turn")
        assert server.hung_up.wait(30)
        terminal.until("fuzzy> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    assert len(server.bodies(CHAT)) == 2, "the half line was not sent"


def test_no_color_is_obeyed_on_a_terminal(server: FakeServer) -> None:
    with Terminal(server, NO_COLOR="1") as terminal:
        terminal.until("soft> ")
        terminal.type("Hi\n")
        shown = terminal.until("seed ")
        assert "[think] " in shown and "[answer] " in shown
        assert not re.search(r"\x1b\[\d*m", shown)
        terminal.type("/quit\n")
        assert terminal.process.wait(30) == 0
