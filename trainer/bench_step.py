"""What a training step costs: `python -m trainer.bench_step --out FILE.json [flags of trainer.rl]`.

    python -m trainer.bench_step --rounds 5 --out docs/bench/step_cpu.json \\
        --config configs/smollm2_cpu.toml --model.path FOLDER --rollout-url URL

Everything is measured in turns, round by round, so that a change in the machine's mood hits all
sides; medians and ratios are reported. Rewards are replaced by 0 and 1 in turn, so that no sample
is left out for want of an advantage.

- `loop`: whole steps through the server, seconds by phase, for each mode; and the same work by a
  plain transformers loop (`bench_plain`), which always runs to the think budget; all of its
  tokens count. Ours end where they end, and only generated tokens count.
- `same_tokens`: gradient and update on soft chains against the same tokens taken as hard ones.
- `head`: peak memory of a gradient with the fused head against plain torch (`bench_memory`).
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import torch

from trainer import config_file, records, setup
from trainer.advantages import advantages
from trainer.bench_memory import head_case, prepared_of
from trainer.bench_plain import Asked, PlainLoop
from trainer.collect import Collected
from trainer.config import Config
from trainer.episodes import Episode
from trainer.learn import Learner
from trainer.load import with_folder
from trainer.measure import Clock
from trainer.ranks import Ranks
from trainer.setup import Parties
from trainer.support import Support

MODES = ("hard", "soft", "fuzzy")
PHASES = ("rollout", "prepare", "train", "sync", "step")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the results here as JSON")
    args, rest = parser.parse_known_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        report = measure(with_folder(config_file.parse(rest)), Path(folder), args.rounds, rest)
    text = json.dumps(report, indent=1) + "\n"
    print(text, end="")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(text)


def measure(config: Config, folder: Path, rounds: int, flags: list[str]) -> dict[str, Any]:
    """All three comparisons."""
    think = config.rollout.max_think_tokens
    config = replace(
        config,
        run=str(folder / "run"),
        validation=replace(config.validation, every=0),
        log=replace(config.log, tensorboard=False, track="none"),
    )
    with ExitStack() as stack:
        state = setup.open_run(Path(config.run), config, stack)
        parties = setup.gather(config, Ranks(), state, stack)
        learner = parties.learner
        plain = PlainLoop(
            config.model.path,
            getattr(torch, config.model.dtype),
            learner.device,
            config.optim.lr,
        )
        forced = parties.tokenizer(" The final answer is: \\boxed{", add_special_tokens=False)
        asked = {
            mode: Asked(mode, think, config.rollout.answer_max_tokens, forced["input_ids"], tau)
            for mode, tau in (("hard", 1.0), ("soft", 0.5))
        }
        rows: dict[str, list[dict[str, float]]] = {}
        soft: Collected | None = None
        for step in range(rounds + 1):  # the first one warms up
            for mode in MODES:
                found, collected = one_step(parties, step, mode)
                rows.setdefault(mode, []).append(found)
                soft = collected if mode == "soft" else soft
            prompts = prompts_of(parties, step)
            for mode, wanted in asked.items():
                found = plain.step(
                    prompts, config.rollout.samples, wanted, config.micro_batch_tokens
                )
                rows.setdefault(f"plain_{mode}", []).append(found)
        del plain
        assert soft is not None
        same = same_tokens(learner, soft, rounds)
        records.write(folder / "tape", msgspec.structs.replace(soft.record, step=0))
    heads = {kind: head_case(kind, folder, flags) for kind in ("fused", "plain")}
    loop = {name: summary(some[1:]) for name, some in rows.items()}
    return {
        "what": "training steps; seconds and tokens per second are medians over the rounds",
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {learner.device}",
        "torch": torch.__version__,
        "model": Path(config.model.path).name,
        "dtype": config.model.dtype,
        "rounds": rounds,
        "prompts": config.rollout.prompts,
        "samples": config.rollout.samples,
        "think_tokens": think,
        "answer_tokens_at_most": config.rollout.answer_max_tokens,
        "loop": loop,
        "faster_than_plain": {
            mode: round(
                loop[mode]["tokens_per_second"] / loop[f"plain_{mode}"]["tokens_per_second"], 2
            )
            for mode in asked
        },
        "same_tokens": same,
        "head": heads,
        "head_memory_plain_over_fused": round(
            heads["plain"]["rise_mib"] / max(1e-9, heads["fused"]["rise_mib"]), 2
        ),
    }


def prompts_of(parties: Parties, step: int) -> list[list[int]]:
    collector = parties.collector
    count = collector.config.rollout.prompts
    problems = [collector.problems.order(0, step * count + i) for i in range(count)]
    return [collector.prompt_ids(problem) for problem in problems]


def one_step(parties: Parties, step: int, mode: str) -> tuple[dict[str, float], Collected]:
    """A whole step of the loop; seconds by phase, generated tokens, rows trained on."""
    collector, learner = parties.collector, parties.learner
    version = f"bench-{step}-{mode}"
    parties.sync.push(version, learner.trained)  # the right name for the samples; not timed
    clock, count = Clock(), collector.config.rollout.prompts
    problems = [collector.problems.order(0, step * count + i) for i in range(count)]
    with clock("rollout"):
        got = collector.ask(problems, collector.config.rollout.samples, step, version, mode=mode)
    got.scored = [
        replace(scored, reward=float(sample.sample % 2))
        for sample, scored in zip(got.samples, got.scored)
    ]
    with clock("prepare"):
        prepared = learner.prepare(got)
    with clock("train"):
        learner.gradient(prepared)
        learner.optimiser.step(1e-7)
    with clock("sync"):
        parties.sync.push(f"{version}-after", learner.trained)
    tokens = sum(len(sample.trace) for sample in got.samples)
    return {**clock.times(), "tokens": float(tokens), "rows": float(prepared.tokens)}, got


def summary(rows: list[dict[str, float]]) -> dict[str, float]:
    """Medians by phase, and tokens per second of rollout, training and whole."""
    out = {f"{p}_seconds": round(median(r[p] for r in rows), 3) for p in PHASES if p in rows[0]}
    out["rollout_tokens_per_second"] = round(median(r["tokens"] / r["rollout"] for r in rows), 1)
    if "rows" in rows[0]:
        out["train_tokens_per_second"] = round(median(r["rows"] / r["train"] for r in rows), 1)
    out["tokens_per_second"] = round(median(r["tokens"] / r["step"] for r in rows), 1)
    out["tokens"] = median(r["tokens"] for r in rows)
    return out


# ---- soft against hard on the same tokens --------------------------------------------------------


def same_tokens(learner: Learner, collected: Collected, rounds: int) -> dict[str, Any]:
    """Gradient and update on soft chains, and on the same tokens as if each had been drawn."""
    episodes, kept, _ = learner.read(collected.samples)
    group = torch.tensor([collected.samples[i].prompt for i in kept])
    rewards = torch.tensor([float(collected.samples[i].sample % 2) for i in kept])
    gain = advantages(rewards, group)
    prepared = {
        "soft": prepared_of(learner, episodes, gain),
        "hard": prepared_of(learner, [as_hard(e) for e in episodes], gain),
    }
    times: dict[str, list[float]] = {name: [] for name in prepared}
    for _ in range(rounds + 1):
        for name, data in prepared.items():
            start = time.perf_counter()
            learner.gradient(data)
            learner.optimiser.step(1e-7)
            times[name].append(time.perf_counter() - start)
    ratios = [soft / hard for soft, hard in zip(times["soft"][1:], times["hard"][1:])]
    return {
        "rows": prepared["soft"].tokens,
        "soft_terms": sum(len(e.soft_at) for e in episodes),
        "soft_seconds": round(median(times["soft"][1:]), 3),
        "hard_seconds": round(median(times["hard"][1:]), 3),
        "soft_over_hard": round(median(ratios), 3),
        "soft_over_hard_range": [round(min(ratios), 3), round(max(ratios), 3)],
    }


def as_hard(episode: Episode) -> Episode:
    """The same visible tokens, each with a log-prob term instead of a Gaussian one."""
    n = len(episode.soft_at)
    at, order = torch.cat((episode.soft_at, episode.hard_at)).sort()
    width = episode.hard_ids.shape[1]
    ids = torch.full((n, width), -1)
    ids[:, 0] = episode.token[episode.soft_at]

    def joined(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        return torch.cat((mine, theirs))[order]

    nothing = slice(0, 0)
    support = Support.cat([episode.soft_support, episode.hard_support])
    return replace(
        episode,
        soft_at=episode.soft_at[nothing],
        soft_input=episode.soft_input[nothing],
        soft_tau=episode.soft_tau[nothing],
        soft_sigma=episode.soft_sigma[nothing],
        soft_mix=episode.soft_mix[nothing],
        soft_ids=None,
        soft_support=episode.soft_support[nothing],
        hard_at=at,
        hard_ids=joined(ids, episode.hard_ids),
        hard_tau=joined(torch.ones(n), episode.hard_tau),
        hard_think=joined(torch.ones(n, dtype=torch.bool), episode.hard_think),
        hard_log_prob=joined(torch.full((n,), torch.nan), episode.hard_log_prob),
        hard_support=support[order],
    )


if __name__ == "__main__":
    main()
