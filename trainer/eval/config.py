"""Everything an evaluation can be told; the command line lies over a TOML file over defaults."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from trainer import checks
from trainer.config import DataConfig, PromptConfig
from trainer.config_file import base_of, to_mapping
from trainer.eval import paper

SIX = ("hard-greedy", "hard-sample", "fuzzy-greedy", "fuzzy-sample", "soft-greedy", "soft-sample")
"""The paper's inference settings (section 4.1), in the order of its tables."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """One set of problems, `[task.NAME]` in TOML."""

    data: DataConfig = field(default_factory=lambda: DataConfig(split="test"))
    """Where the problems come from, as in training; the split is `test` unless told."""
    unique: bool = True
    """Whether a question that comes twice is used once. A generator of small tasks repeats its
    easy ones; `false` keeps its mixture, at the price of problems that are not independent."""
    reward: str = "math"
    """Who judges: gsm8k, math, reasoning_gym, or module:function."""
    max_think_tokens: int | None = None
    """Think budget; absent: the evaluation's; 0: no thoughts."""
    answer_max_tokens: int | None = None
    """Answer tokens; absent: the evaluation's."""
    stop: list[str] | None = None
    """Texts that end the answer; absent: the evaluation's."""


@dataclass(frozen=True, kw_only=True)
class SettingConfig:
    """One way of thinking, `[setting.NAME]` in TOML."""

    mode: Literal["hard", "soft", "fuzzy", "mixed"] = "soft"
    """Thinking mode."""
    greedy: bool = False
    """Whether nothing is left to chance: one sample a problem then. Sets no field itself."""
    cot: dict[str, Any] = field(default_factory=dict)
    """Fields of the request's `cot` object (docs/parameters.md): temperature, top_p, policy ..."""
    sampling: dict[str, Any] = field(default_factory=dict)
    """Fields of the request's `sampling` object (docs/server.md) for the answer; its temperature is
    0 unless told."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model."""

    path: str | None = None
    """Folder or hub name that the server was started with: tokenizer, reference of KL, and what
    `served` means for likelihoods. Absent: KL is measured from a folder tagged `none`; the
    tokenizer, and nothing else, may also come from another checkpoint."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type in which likelihoods are computed."""
    device: str = "auto"
    """Where: cpu, cuda, cuda:1; auto: cuda if there is one."""


@dataclass(frozen=True, kw_only=True)
class ChoiceConfig:
    """Multiple choice: accuracy and NLL per token of the correct answer (the paper's table 2)."""

    sets: tuple[str, ...] = ()
    """hellaswag, arc_challenge, arc_easy, mmlu (through `datasets`), or NAME=FILE for JSONL."""
    limit: int | None = None
    """Items of each set, chosen by the seed."""


@dataclass(frozen=True, kw_only=True)
class KlConfig:
    """KL divergence from the base model (model.path) on held-out text."""

    texts: str | None = None
    """File: JSONL with `text`, or with `question` and `answer`; else plain text, documents apart by
    blank lines."""
    limit: int = 50
    """Texts, chosen by the seed."""
    max_tokens: int = 256
    """Tokens of each text."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What is written for people."""

    transcripts: int = 3
    """Problems of each cell whose first sample is shown with its think steps."""
    replicates: int = 2000
    """Bootstrap replicates."""
    plots: bool = True
    """Draw plots (needs matplotlib)."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """One evaluation."""

    config: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    """TOML file below the command line; the only place for `[task.NAME]` and `[setting.NAME]`.
    Given several times, each lies over the one before."""
    rollout_url: str | None = None
    """The server, `softvllm serve MODEL --enable-rl`; not needed for likelihoods alone."""
    out: str = "runs/eval"
    """Folder of the evaluation. The same command again goes on with what is there."""
    checkpoints: tuple[str, ...] = ("none=served",)
    """TRAINING[:SEED]=FOLDER each, e.g. soft:1=runs/soft1/best. A folder alone inside a trainer's
    run takes mode and seed from there. FOLDER `served`: the weights in service, as they are."""
    restore: str | None = None
    """Folder whose weights are put into service at the end."""
    tasks: tuple[str, ...] = ()
    """gsm8k, math500, olympiadbench (through `datasets`), NAME=PATH for a local copy of one of
    these or any file of problems, rg:TASK of reasoning-gym, or a `[task.NAME]`."""
    settings: tuple[str, ...] = SIX
    """Named settings; further ones come from `[setting.NAME]`."""
    samples: int = 32
    """Samples a problem, n, in settings that leave something to chance."""
    limit: int | None = None
    """Problems of each task at most, chosen by the seed of its data; of a `[task.NAME]` with a
    smaller `data.limit` only so many, which the command says."""
    seed: int = 0
    """Of noise, sampling, bootstrap and choice of items."""
    max_think_tokens: int = 512
    """Think budget (section 4: 512 at test time); 0: no thoughts, the answer at once."""
    answer_max_tokens: int = 32
    """Answer tokens (appendix C)."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer; `}` saves time where answers are plain numbers."""
    trained_on: tuple[str, ...] = ()
    """Trainer configurations whose problems count as seen: problems of a task that occur there are
    reported apart."""
    drop_seen: bool = False
    """Leave such problems out."""
    compare: Literal["none", "paper"] = "none"
    """paper: print the paper's cells beside ours."""
    paper_model: Literal["L3B", "L8B", "Q3B"] = "L3B"
    """Llama-3.2-3B-Instruct, Llama-3.1-8B-Instruct or Qwen2.5-3B-Instruct."""
    paper_data: Literal["gsm8k", "math", "deepscaler"] = "gsm8k"
    """Training set of the paper's rows."""
    prompt: PromptConfig = field(default_factory=PromptConfig)
    """Paper prompt or chat template, as in training."""
    workers: int = 2
    """Processes that verify answers."""
    judge_timeout: float = 10.0
    """Seconds a verification may take before its process is killed; counted, and wrong until the
    next run of the command judges the answer again."""
    max_failure_rate: float = 0.01
    """Share of samples that may lack a result or a verdict; counted over all files, and over the
    last 500 verifications, before the run stops."""
    timeout: float = 600.0
    """Seconds without a byte before a request counts as lost."""
    retry_for: float = 300.0
    """Seconds to go on trying while the server is away; 0: not at all."""
    api_key: str | None = None
    """Key of the server; absent: $SOFTVLLM_API_KEY."""
    model: ModelConfig = field(default_factory=ModelConfig)
    choice: ChoiceConfig = field(default_factory=ChoiceConfig)
    kl: KlConfig = field(default_factory=KlConfig)
    report: ReportConfig = field(default_factory=ReportConfig)
    task: tyro.conf.Suppress[dict[str, dict[str, Any]]] = field(default_factory=dict)
    setting: tyro.conf.Suppress[dict[str, dict[str, Any]]] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError for what cannot be done, naming the remedy."""
        if not self.tasks and not self.choice.sets and not self.kl.texts:
            raise ValueError(
                "nothing to evaluate: give --tasks (e.g. gsm8k=FILE.jsonl or rg:chain_sum), "
                "--choice.sets or --kl.texts"
            )
        if not self.checkpoints:
            raise ValueError("no checkpoint to evaluate: give --checkpoints TRAINING=FOLDER ...")
        if self.compare == "paper":
            paper.require_training(self.paper_model, self.paper_data)
        if self.tasks and not self.rollout_url:
            raise ValueError(
                "tasks need samples: give --rollout-url (a server started with "
                "`softvllm serve MODEL --enable-rl`)"
            )
        if self.drop_seen and not self.trained_on:
            raise ValueError(
                "drop_seen needs trained_on to know what was seen: give the trained runs' folders, "
                "--trained-on runs/soft, or --no-drop-seen"
            )
        if self.restore == "served":
            raise ValueError(
                "restore needs a folder: `served` means the weights before any push, which only "
                "the server had. Give the folder of the model that it was started with"
            )
        if self.restore and not self.tasks:
            raise ValueError("restore has a meaning only with --tasks; likelihoods push no weights")
        if self.tasks and not self.settings:
            raise ValueError(f"tasks need at least one of the settings {', '.join(SIX)}")
        for name, value, least in (
            ("seed", self.seed, 0),
            ("max_think_tokens", self.max_think_tokens, 0),
            ("report.transcripts", self.report.transcripts, 0),
            ("samples", self.samples, 1),
            ("answer_max_tokens", self.answer_max_tokens, 1),
            ("workers", self.workers, 1),
            ("report.replicates", self.report.replicates, 1),
        ):
            checks.at_least(name, value, least)
        checks.rate("max_failure_rate", self.max_failure_rate)
        checks.seconds("judge_timeout", self.judge_timeout)
        checks.seconds("timeout", self.timeout)
        checks.seconds("retry_for", self.retry_for, zero=True)
        likelihoods = bool(self.choice.sets or self.kl.texts)
        checks.device("model.device", self.model.device, used=likelihoods)
        for name, limit in (("limit", self.limit), ("choice.limit", self.choice.limit)):
            if limit is not None and limit < 1:
                raise ValueError(f"{name} must be at least 1, got {limit}; leave it out for all")
        if self.kl.limit < 1 or self.kl.max_tokens < 2:
            raise ValueError("kl.limit must be at least 1 and kl.max_tokens at least 2")
        for name, given in (("tasks", self.tasks), ("settings", self.settings)):
            if len(set(given)) < len(given):
                raise ValueError(f"{name} names one twice: {', '.join(given)}")
        checks.plain(to_mapping(self))


def parse(arguments: Sequence[str] | None = None) -> EvalConfig:
    """Command line over TOML over defaults. Exits with usage on a wrong command line.

    Raises:
        ValueError: the file is missing or wrong, or there is nothing to do.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    config = tyro.cli(
        EvalConfig,
        args=arguments,
        default=base_of(arguments, EvalConfig),
        prog="python -m trainer.eval",
        description="The paper's grid for any checkpoint; manual: docs/evaluation.md.",
    )
    config.check()
    return config


def with_split(data: DataConfig, given: dict[str, Any]) -> DataConfig:
    """The split is `test` where the TOML table does not say another."""
    return data if "split" in given else dataclasses.replace(data, split="test")
