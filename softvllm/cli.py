"""The `softvllm` command: `softvllm generate "question" --cot-mode soft`."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from softvllm import __version__
from softvllm.core import policies
from softvllm.core.params import CoTParams, CoTParamsError

MODES = ("hard", "soft", "fuzzy", "mixed")
PASSED_ON = {
    "serve": "OpenAI-compatible server with a think phase per request (--help for its options)",
    "chat": "talk to a running server in the terminal",
}
"""Commands that parse their own arguments; looked up in `main` before argparse sees them."""
QUIET = {
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TQDM_DISABLE": "1",
}
"""Environment of a one-shot command: no log lines between question and answer, a KV cache of
1 GiB, no second process. Anything the user set wins."""


def parser() -> argparse.ArgumentParser:
    """The command line; option names are those of `CoTParams`."""
    top = argparse.ArgumentParser(
        prog="softvllm", description="Soft, fuzzy and mixed chain-of-thought on vLLM."
    )
    top.add_argument("--version", action="version", version=f"softvllm {__version__}")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")
    gen = commands.add_parser(
        "generate", help="think about a question and show each think step, then the answer"
    )
    gen.add_argument("question", help="the question; the model's chat template is applied")
    gen.add_argument(
        "--cot-mode",
        default="soft",
        metavar="MODE[,MODE]",
        help="hard, soft, fuzzy, mixed, or several with commas, or all (default: soft)",
    )
    gen.add_argument("--model", help="Hugging Face name or folder (default: SmolLM2-135M-Instruct)")
    gen.add_argument("--raw", action="store_true", help="send the question without a chat template")
    gen.add_argument("--max-think-tokens", type=int, default=96, metavar="N", help="think budget")
    gen.add_argument("--answer-tokens", type=int, default=48, metavar="N", help="answer limit")
    gen.add_argument("--seed", type=int, default=0, help="seed of noise and sampling (default: 0)")
    gen.add_argument("--cot-temperature", type=float, metavar="TAU", help="tau of the think phase")
    gen.add_argument("--top-k", type=int, default=0, metavar="K", help="mixture of K tokens only")
    gen.add_argument("--noise-scale", type=float, metavar="GAMMA", help="sigma / RMS(E)")
    gen.add_argument(
        "--policy",
        default="blend",
        choices=policies.names(),
        help="policy of mode mixed (default: blend)",
    )
    gen.add_argument(
        "--policy-param",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="a number the policy takes, e.g. weight=0.7 (repeatable)",
    )
    gen.add_argument("--top", type=int, default=4, metavar="N", help="tokens shown per think step")
    gen.add_argument("--dtype", default="auto", help="model dtype (vLLM's --dtype)")
    gen.set_defaults(run=generate)
    for name, text in PASSED_ON.items():
        commands.add_parser(name, help=text, add_help=False)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; user errors are one line on stderr and exit code 2."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0] in PASSED_ON:
        return _pass_on(words[0], words[1:])
    args = parser().parse_args(words)
    try:
        return int(args.run(args))
    except (CoTParamsError, ValueError, RuntimeError, OSError) as error:
        print(f"softvllm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _pass_on(command: str, words: list[str]) -> int:
    """Commands of other packages are imported when asked for: `server` needs vllm."""
    if command == "serve":
        from server.serve import main as serve

        return serve(words)
    from clients.chat import main as chat

    return chat(words)


def generate(args: argparse.Namespace) -> int:
    """Answer one question in one or several modes and print the think steps."""
    modes = _modes(args.cot_mode)
    if args.policy_param and "mixed" not in modes:
        raise ValueError("--policy-param shapes mode mixed only; add mixed to --cot-mode")
    params = [_cot(args, mode) for mode in modes]  # refuse nonsense before the engine starts
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with _quiet():
        from softvllm.models import resolve_model

        model = resolve_model(args.model, progress=_say)
        _say(f"starting the engine on {model} (20 to 30 s on a CPU) ...")
        from softvllm.engine.llm import LLM, soft_params

        length = max(p.max_think_tokens or 0 for p in params) + args.answer_tokens + 64
        llm = LLM(
            model,
            dtype=args.dtype,
            enforce_eager=True,
            max_num_seqs=max(4, len(modes)),
            max_model_len=None,
            disable_log_stats=True,
            use_tqdm_on_load=False,
        )
        tokenizer = llm.get_tokenizer()
        prompt = _prompt(args, tokenizer)
        sampling = [soft_params(p, max_tokens=length) for p in params]
        _say("thinking ...")
        outputs = llm.generate([prompt] * len(modes), sampling, use_tqdm=False)
    for mode, output in zip(modes, outputs):
        _show(mode, output.outputs[0], tokenizer, args.top)
    return 0


def _modes(text: str) -> list[str]:
    modes = list(MODES) if text == "all" else [m.strip() for m in text.split(",")]
    for mode in modes:
        if mode not in MODES:
            raise ValueError(f"--cot-mode takes {', '.join(MODES)} or all, got {mode!r}")
    return modes


def _cot(args: argparse.Namespace, mode: str) -> CoTParams:
    numbers: dict[str, float] = {}
    for item in args.policy_param:
        name, _, value = item.partition("=")
        try:
            numbers[name] = float(value)
        except ValueError:
            raise ValueError(f"--policy-param takes NAME=NUMBER, got {item!r}") from None
    mixed: dict[str, Any] = {}
    if mode == "mixed":
        mixed = {"policy": args.policy, "policy_params": numbers}
    return CoTParams(
        mode=mode,  # type: ignore[arg-type]
        temperature=args.cot_temperature,
        top_k=args.top_k,
        noise_scale=None if mode == "hard" else args.noise_scale,
        seed=args.seed,
        max_think_tokens=args.max_think_tokens,
        answer_max_tokens=args.answer_tokens,
        record="top",
        record_top=args.top,
        **mixed,
    )


def _prompt(args: argparse.Namespace, tokenizer: Any) -> Any:
    if args.raw or not getattr(tokenizer, "chat_template", None):
        return args.question
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": args.question}], tokenize=False, add_generation_prompt=True
    )
    # The template wrote the special tokens already; a second BOS would shift the prompt.
    return {"prompt_token_ids": tokenizer.encode(text, add_special_tokens=False)}


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep library chatter (warnings on stdout) away from the answer."""
    import warnings

    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.simplefilter("ignore")
        yield


def _show(mode: str, completion: Any, tokenizer: Any, top: int) -> None:
    from softvllm.core.phases import Phase
    from softvllm.core.trace import Kind, is_soft

    trace = completion.cot.trace
    summary = trace.summary()
    tau, sigma, seed = summary["tau"], summary["sigma"], summary["seed"]
    print(f"\n=== {mode}  (tau {tau:g}, sigma {sigma:.4g}, seed {seed})")
    print(f"{'step':>4}  {'fed':<5} {'entropy':>7}  {'shadow':<14} top tokens")
    soft = is_soft(trace.kind)
    row = 0
    for t in range(len(trace)):
        if trace.phase[t] != Phase.THINK:
            continue
        tokens = ""
        if trace.top_ids is not None and trace.top_weights is not None:
            pairs = zip(trace.top_ids[row][:top], trace.top_weights[row][:top])
            tokens = "  ".join(f"{_word(tokenizer, i)} {w:.2f}" for i, w in pairs if w >= 0.005)
        fed = "soft" if soft[t] else "hard"
        shadow = _word(tokenizer, trace.token[t])
        print(f"{t:>4}  {fed:<5} {trace.entropy[t]:>7.2f}  {shadow:<14} {tokens}")
        row += 1
    forced = tokenizer.decode(trace.token[trace.kind == Kind.FORCED].tolist())
    answer = tokenizer.decode(
        trace.token[trace.phase == Phase.ANSWER].tolist(), skip_special_tokens=True
    )
    think = tokenizer.decode(trace.token[trace.phase == Phase.THINK].tolist())
    print(f"thought {summary['think_tokens']} tokens, ended by {summary['end_cause']}")
    print(f"think:  {think!r}\nforced: {forced!r}\nanswer: {answer!r}")


def _word(tokenizer: Any, token: int) -> str:
    return repr(tokenizer.decode([int(token)]))


if __name__ == "__main__":
    sys.exit(main())
