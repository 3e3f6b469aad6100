"""What the server tells about a think phase, typed: the `cot` block, replies and stream events.

The wire is described in docs/server.md. Fields that a newer server adds are ignored.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

if TYPE_CHECKING:
    from openai.types import CompletionUsage

    from softvllm.core.trace import Trace


class TopToken(msgspec.Struct, frozen=True, array_like=True):
    """One candidate of a think step; on the wire [token, id, weight]."""

    token: str
    id: int
    weight: float
    """Probability at tau on the mixture's support."""


class ThinkStep(msgspec.Struct, frozen=True):
    """One position of the think phase (`record` "top")."""

    token: str
    """The visible (shadow or sampled) token's text."""
    id: int
    soft: bool
    """Whether a mixture was fed instead of the token's embedding."""
    entropy: float
    """Of the unscaled distribution, in nats."""
    top: tuple[TopToken, ...] = ()
    """The likeliest tokens, in falling order."""


class CoTBlock(msgspec.Struct, frozen=True, kw_only=True):
    """The `cot` block of a choice: what its think phase was."""

    mode: str
    policy: str
    think_tokens: int
    soft_steps: int
    hard_steps: int
    forced_tokens: int
    answer_tokens: int
    end_cause: str
    """end_sequence, budget, eos, cold_stop or unfinished."""
    mean_entropy: float | None
    """Over the think steps, in nats; None without any."""
    tau: float
    sigma: float
    """Standard deviation of the noise that was added, in units of the embedding table."""
    seed: int
    """Repeats this sample with n = 1 (`SoftReply.again`)."""
    weight_version: str | None = None
    answer_start: int | None = None
    """Completions: character of the text where forced text and answer begin."""
    steps: tuple[ThinkStep, ...] | None = None
    """Every think step, if asked for with `record` "top"."""
    trace_base64: str | None = msgspec.field(default=None, name="trace")
    """The binary trace, if asked for with `record` "trace", "sparse" or "dense"."""

    def __repr__(self) -> str:
        """Steps and trace only by size: they may have megabytes."""
        facts = msgspec.structs.asdict(self)
        for name in ("steps", "trace_base64"):
            if facts[name] is not None:
                facts[name] = f"<{len(facts[name])}>"
        return f"CoTBlock({', '.join(f'{k}={v!r}' for k, v in facts.items())})"

    @property
    def trace(self) -> Trace:
        """The decoded trace (docs/wire.md). Raises ValueError if none was asked for."""
        if self.trace_base64 is None:
            raise ValueError('the reply holds no trace; ask with cot={"record": "trace", ...}')
        from softvllm.core.trace import decode

        return decode(base64.b64decode(self.trace_base64))


class ServerLimits(msgspec.Struct, frozen=True, kw_only=True):
    """The largest values the server takes."""

    max_think_tokens: int
    max_model_len: int
    """Prompt and output tokens of one sample."""
    max_num_seqs: int
    """Samples that run at once; more wait."""
    top_k: int
    record_top: int
    seed: int


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `GET /v1/cot/info`."""

    softvllm: str
    """Version of softvllm."""
    vllm: str
    """Version of vLLM."""
    model: str
    dtype: str
    modes: tuple[str, ...]
    """Empty if the engine cannot think at all; `refusal` says why."""
    refusal: str | None
    default_mode: str | None
    """Mode of requests that name none; None: they stay stock vLLM requests."""
    reasoning_model: bool
    """Whether the tokenizer has `</think>`, where thinking then ends."""
    recipe: dict[str, Any]
    """Fields of `CoTParams` that requests get unless they say otherwise."""
    defaults: dict[str, dict[str, Any]]
    """By mode: temperature, noise_scale and so on."""
    policies: dict[str, dict[str, Any]]
    """Policies of mode mixed and their parameters' bounds."""
    limits: ServerLimits
    embedding: dict[str, Any]
    """Facts of the embedding table, sigma among them."""
    enable_rl: bool
    weight_version: str | None
    weights_at_start: str | None = None
    """Fingerprint of the weights that the server was started with, or `name@commit`."""
    held: dict[str, int]
    """Requests and bytes of traces in memory."""


class SoftChoice(msgspec.Struct, frozen=True, kw_only=True):
    """One of a reply's n samples."""

    index: int
    content: str
    """Forced text and answer."""
    reasoning: str | None
    """Shadow text of the think phase; None without one."""
    cot: CoTBlock | None
    """None for a request that stayed stock vLLM."""
    finish_reason: str | None
    stop_reason: int | str | None = None
    tool_calls: tuple[dict[str, Any], ...] = ()
    """In OpenAI's format."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SoftReply:
    """A whole answer. `content`, `reasoning`, `cot`, `finish_reason` are the first choice's."""

    choices: tuple[SoftChoice, ...]
    usage: CompletionUsage | None
    raw: Any = field(repr=False)
    """openai's response object; of a stream the list of its chunks."""
    kind: Literal["chat", "complete"]
    """The client method that made it."""
    request: dict[str, Any] = field(repr=False)
    """That method's arguments."""

    @property
    def content(self) -> str:
        return self.choices[0].content

    @property
    def reasoning(self) -> str | None:
        return self.choices[0].reasoning

    @property
    def cot(self) -> CoTBlock | None:
        return self.choices[0].cot

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason

    def again(self, index: int = 0) -> dict[str, Any]:
        """Arguments that repeat choice `index` on the same server and weights: same noise, same
        draws. On an idle server a sample with n = 1 comes back bit for bit; in half precision
        other requests in the batch change the rounding, and a close draw may fall elsewhere.

        They go to the method named by `kind`, or to `stream` for a chat. Raises ValueError for a
        reply without a think phase: stock vLLM does not report the seed it used.
        """
        from clients.request import repeat_arguments

        return repeat_arguments(self, index)


class ReasoningDelta(msgspec.Struct, frozen=True):
    """More shadow text of the think phase."""

    text: str
    index: int = 0
    """The choice it belongs to."""


class ContentDelta(msgspec.Struct, frozen=True):
    """More forced text or answer."""

    text: str
    index: int = 0


class ThinkStepEvent(msgspec.Struct, frozen=True):
    """One think step with its top tokens (`record` "top"), before the text it gave."""

    step: ThinkStep
    index: int = 0


class ToolCallDelta(msgspec.Struct, frozen=True):
    """A piece of a tool call, in OpenAI's format."""

    call: dict[str, Any]
    index: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """The last event."""

    reply: SoftReply


Event = ReasoningDelta | ContentDelta | ThinkStepEvent | ToolCallDelta | Done
