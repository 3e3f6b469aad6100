"""The groups of settings; `config.Config` puts them together.

Defaults are the paper's recipe (arXiv 2509.19170v2) where it states one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from trainer.attention import Kernel
from trainer.forward import TableGradient


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What is trained."""

    path: str = ""
    """Folder or hub name of the model, the same that the server was started with; smollm2: the
    default model of `softvllm serve`."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Type of the weights in forward and backward passes. Below float32 the optimiser keeps
    float32 master weights and sums gradients in float32."""
    device: str = "auto"
    """cpu, cuda, cuda:1; auto: cuda if there is one."""
    attention: Kernel | None = None
    """Kernel of the packed attention; absent: flash on CUDA in two-byte types, else sdpa."""
    head_dtype: Literal["float32", "bfloat16"] | None = None
    """Type inside output head and mixture; absent: that of the weights. bfloat16 under float32
    weights makes the trainer see the table that a bfloat16 server sees."""
    checkpointing: bool = False
    """Compute layers again in the backward pass: less memory, about a third more time."""
    table_gradient: TableGradient = "full"
    """full: the embedding learns through every use; no_mixture: not through the mixture pE;
    frozen: not at all (the paper does not say what it did)."""
    lora_rank: int = 0
    """Above 0: train LoRA adapters of this rank on the layers' projections (needs peft), not the
    weights; the adapter alone travels to the server."""
    lora_alpha: int = 32
    """LoRA's scale; the update is multiplied by alpha / rank."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where problems come from."""

    source: Literal["file", "hub", "reasoning_gym"] = "file"
    """file: JSONL or parquet; hub: a data set by name, through `datasets`; reasoning_gym: made on
    the fly."""
    style: Literal["plain", "gsm8k", "math"] = "plain"
    """How the gold is read. gsm8k: what follows ####; math: the last box of the solution; plain:
    the field as it is."""
    path: str | None = None
    """File, folder with SPLIT.jsonl or SPLIT.parquet, or hub name."""
    split: str = "train"
    """Split to train on."""
    validation_path: str | None = None
    """Validation problems; absent: the same path."""
    validation_split: str | None = None
    """Validation split; absent: problems held out from the training split."""
    hub_config: str | None = None
    """Configuration of a hub data set, e.g. main."""
    question_field: str | None = None
    """Name of the question's field; absent: the style's."""
    gold_field: str | None = None
    """Name of the gold's field; absent: the style's."""
    task: str = "chain_sum"
    """reasoning_gym: the task."""
    task_parameters: dict[str, Any] = field(default_factory=dict)
    """reasoning_gym: parameters of the task (TOML table)."""
    size: int = 2000
    """reasoning_gym: problems to make."""
    limit: int | None = None
    """Train on the first so many problems only. Of an evaluation's task: ask so many at most, also
    where the evaluation's own limit is larger."""
    seed: int = 0
    """Shuffles, splits and makes problems."""
    order_seed: int | None = None
    """Order in which problems are trained on; absent: the run's seed. Given, runs of several seeds
    see the same problems in the same order and differ in draws and noise alone."""
    check_golds: bool = True
    """Score every gold once at the start and drop problems whose gold cannot be scored."""
    repeated: Literal["drop", "keep"] = "drop"
    """Training problems that ask, word for word, what a validation problem asks."""


@dataclass(frozen=True, kw_only=True)
class PromptConfig:
    """How a question becomes a prompt."""

    template: Literal["paper", "chat", "raw"] = "paper"
    """paper: its zero-shot raw text (appendix B); chat: the model's chat template; raw: `text`."""
    text: str = "{question}"
    """chat: the user's message; raw: the whole prompt. {question} stands for the question."""
    system: str | None = None
    """chat: system message; absent: the template's own."""
    begin: str = ""
    """chat: text the assistant's turn begins with."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """chat: arguments of the template, e.g. enable_thinking (TOML table)."""
    max_tokens: int = 1024
    """Longer prompts are dropped and counted."""


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """What the server is asked for."""

    mode: Literal["hard", "soft", "fuzzy", "mixed"] = "soft"
    """Thinking mode (paper, sections 3 and 4)."""
    prompts: int = 2
    """Prompts a step, B (paper, section 4)."""
    samples: int = 32
    """Samples a prompt, G (paper, section 4)."""
    max_think_tokens: int = 128
    """Think budget: the paper has 128 on GSM8K, 512 elsewhere (section 4)."""
    answer_max_tokens: int = 32
    """Answer tokens (paper, appendix C)."""
    answer_temperature: float = 1.0
    """Temperature of the answer in training; 0 is greedy. The paper does not state it."""
    cot: dict[str, Any] = field(default_factory=dict)
    """Further fields of the request's `cot` object (docs/parameters.md; TOML table)."""
    stop: list[str] = field(default_factory=list)
    """Texts that end the answer."""
    greedy_answer: Literal["count", "mask"] = "count"
    """Loss terms of greedy answers, see `trainer.episodes.Asked`."""
    timeout: float = 600.0
    """Seconds without a byte from the server before a request counts as lost."""
    retry_for: float = 300.0
    """Seconds to go on trying while the server is away or gives 5xx, before the run stops."""
    max_failure_rate: float = 0.05
    """Share of samples that may fail (NaN, engine errors, unreadable traces) in a step."""
    max_staleness: Literal[0, 1] = 0
    """0: strictly on-policy. 1: the next batch is generated while this one trains; needs
    objective.ratio plain or clip."""
    api_key: str | None = None
    """Key of the server; absent: $SOFTVLLM_API_KEY. Never saved."""


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """Who judges."""

    function: str = "gsm8k"
    """gsm8k, math, reasoning_gym, or a function as module:function (trainer/rewards/base.py)."""
    workers: int = 2
    """Processes."""
    timeout: float = 10.0
    """Seconds an answer may take; then its process is killed and the reward is 0."""
    max_failure_rate: float = 0.05
    """Share of failed rewards (of the last 500) above which the run stops."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its schedule."""

    lr: float = 6e-6
    """Peak learning rate; 6e-6 is the paper's for Llama-3.2-3B (paper, section 4)."""
    warmup: int = 20
    """Steps of linear warm-up (paper, section 4)."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """After the warm-up (paper, section 4: cosine)."""
    min_lr_ratio: float = 0.0
    """Where the cosine ends, as a share of lr; the paper does not state it."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas; not stated by the paper."""
    eps: float = 1e-8
    """AdamW's eps. Gradients scale with rewards (up to 100), so it hardly ever matters."""
    weight_decay: float = 0.0
    """AdamW's decay; not stated by the paper."""
    max_grad_norm: float | None = None
    """Gradients longer than this are shortened; absent: never (with rewards of 100, a limit of 1
    would be a different algorithm)."""


@dataclass(frozen=True, kw_only=True)
class SyncConfig:
    """How weights reach the server."""

    method: Literal["safetensors", "lora", "nccl", "none"] = "safetensors"
    """safetensors: a folder both can read (docs/weights.md); lora: an adapter folder; nccl: vLLM's
    broadcast; none: the server keeps its weights."""
    folder: str | None = None
    """Where folders are written; absent: RUN/weights. A memory disk is fastest."""
    checksums: bool = False
    """Also have the server check SHA-256 sums: for folders on unreliable file systems."""
    timeout: float = 600.0
    """Seconds one call may take."""
    nccl_address: str = "127.0.0.1"
    """nccl: address of this process that the server's workers can reach."""
    nccl_port: int = 29517
    """nccl: a free port at that address."""


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    """The comparison of trainer and server before the first step."""

    samples: int = 4
    """Samples to compare; 0: no probe."""
    max_distance_error: float = 0.05
    """Limit of |gaussian_distance - 1|; healthy 0.02."""
    max_mean_gap: float | None = None
    """Limit of the mean gap beyond its rounding floor, in sigmas. Absent: 0.2 if server and trainer
    compute in float32, else 0.12 sqrt(d), see `trainer.probe.gap_limit`."""
    max_mismatch: float = 0.02
    """Limit of the mean KL at hard tokens; healthy 1e-3, in float32 1e-6."""


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Greedy accuracy on held-out problems, which chooses the checkpoint (paper, section 4)."""

    every: int = 50
    """Steps between validations; 0: never."""
    problems: int = 200
    """Held-out problems."""
    max_think_tokens: int | None = None
    """Think budget; absent: the training one (the paper tests with 512)."""
    hard: bool = False
    """Also validate with hard greedy thinking, the paper's best way to use the trained model."""


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written down; metrics.jsonl always is."""

    tensorboard: bool = True
    """Write TensorBoard events."""
    track: Literal["none", "wandb", "trackio"] = "none"
    """Also send metrics to a tracker (its package must be installed)."""
    project: str = "softvllm"
    """The tracker's project."""
    plots: bool = True
    """Draw plots.png at the end."""
    transcripts: int = 4
    """Samples of a step to write to transcripts.jsonl."""
    gradient_parts_every: int = 0
    """Steps between measurements of the gradient norm of soft, think and answer part apart (the
    step then costs three times as much); 0: never."""
    gap_samples: int = 256
    """Soft steps of a batch for which the mean gap is computed."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """What survives."""

    every: int = 50
    """Steps between checkpoints; the last step always gets one. 0: only the last."""
    keep: int = 2
    """Checkpoints to keep."""
