"""What one request may ask of its think phase: the typed, validated `CoTParams`.

Everything is refused here, at the front end, before anything is scheduled: unknown
fields, values out of range and combinations that contradict each other. An error names
the field, the value it got and the allowed range.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from softvllm.core import policies

Mode = Literal["hard", "soft", "fuzzy", "mixed"]
Noise = Literal["gaussian", "none"]
Record = Literal["steps", "top", "sparse", "dense"]

DEFAULT_TEMPERATURE = {"hard": 1.0, "soft": 0.5, "fuzzy": 1e-4, "mixed": 0.5}
"""CoT temperature tau of each mode (paper section 1.1)."""
DEFAULT_NOISE_SCALE = 0.33
"""sigma as a share of the embedding's RMS (paper section 1.1, appendix D)."""
PAPER_END_STRING = "The final answer is:"
PAPER_AFTER_END = " \\boxed{"
PAPER_AFTER_CUT = " The final answer is: \\boxed{"

DEFAULT_MAX_THINK = 512
ANSWER_RESERVE = 32
"""Answer tokens that a derived think budget leaves room for (paper, appendix C)."""
MAX_SEED = 2**53
"""Seeds stay below 2**53, so that a JSON client in any language can send one back exactly."""
MIN_TEMPERATURE, MIN_TOP_P = 1e-6, 1e-6
"""Below these, float32 on the device turns logits / tau into infinities and top_p into nothing."""
MAX_TOP_K = 1024
MAX_TEXT_LENGTH = 256
"""Characters of an end string or forced text: each costs the front end hundreds of encodings."""
MAX_RECORD_TOP = 64
MAX_END_SEQUENCES = 32
MAX_END_LENGTH = 16
MAX_FORCED_LENGTH = 64
MAX_STOP_IDS = 32


class CoTParamsError(ValueError):
    """A CoT parameter is unknown, out of range or contradicts another one."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"cot.{field}: {message}" if field else f"cot: {message}")
        self.field = field


@dataclass(frozen=True, kw_only=True, slots=True)
class CoTParams:
    """How one request thinks. Defaults are the paper's recipe (section 1.1, appendix C)."""

    mode: Mode = "soft"
    """hard: sampled tokens; soft: mixture at tau 0.5 + noise; fuzzy: the same at tau 1e-4;
    mixed: `policy` decides step by step."""
    temperature: float | None = None
    """tau of softmax(logits / tau), in [1e-6, 100]; None: the mode's default."""
    top_k: int = 0
    """Support of the mixture: the k most likely tokens, 1 to 1024; 0: the whole vocabulary."""
    top_p: float = 1.0
    """Support: the fewest most likely tokens whose probability at tau reaches top_p, [1e-6, 1]."""
    min_p: float = 0.0
    """Support: tokens at least min_p times as likely at tau as the most likely one, [0, 1)."""
    noise: Noise | None = None
    """gaussian: h~ = pE + sigma N(0, I) (eq. 6); none: no noise. None: gaussian wherever a
    mixture can be fed, none in mode hard."""
    noise_scale: float | None = None
    """sigma / RMS(E), in [0, 100]; 0 is "soft greedy". None: 0.33."""
    seed: int | None = None
    """Seed of noise and sampling, 0 <= seed < 2**53. None: the request's own sampling seed, or
    a fresh random one; the seed used is always reported."""
    max_think_tokens: int | None = None
    """Think budget in tokens; 0 starts with the forced text at once. None: 512 (paper, section
    4), or what max_tokens leaves after the forced text and 32 answer tokens, if that is less (half
    of what is left, where max_tokens is short)."""
    min_think_tokens: int = 0
    """No end of any kind before this many think tokens; stop tokens are masked until then."""
    end_strings: tuple[str, ...] = (PAPER_END_STRING,)
    """Texts whose appearance in the shadow sequence ends thinking; every tokenisation is tried."""
    end_token_ids: tuple[tuple[int, ...], ...] = ()
    """Token sequences that end thinking, matched on the shadow sequence."""
    force_after_end: str | tuple[int, ...] = PAPER_AFTER_END
    """Hard tokens (text or ids) fed after an end sequence, before the answer."""
    force_after_cut: str | tuple[int, ...] = PAPER_AFTER_CUT
    """Hard tokens fed when thinking was cut short: budget, end-of-sequence or cold stop."""
    cold_stop_entropy: float | None = None
    """Stop thinking once the entropy (nats, of the unscaled distribution) stayed below this
    for `cold_stop_steps` steps (Soft Thinking's cold stop); None: off."""
    cold_stop_steps: int = 256
    """Consecutive low-entropy steps that trigger the cold stop, >= 1."""
    policy: str | None = None
    """mode mixed only: blend, interleave, entropy or any registered policy."""
    policy_params: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Numbers the policy takes, e.g. {"weight": 0.5} for blend."""
    record: Record = "steps"
    """steps: kind, id, log-prob, entropy of every position; top: plus each think step's top
    tokens; sparse: plus ids and weights that reproduce h~ (needs top_k); dense: plus h~ itself
    in the model's dtype."""
    record_top: int = 8
    """record="top": tokens kept per think step, 1 to 64."""
    answer_greedy: bool = False
    """Decode the answer greedily although the request's temperature is above 0: vLLM refuses
    n > 1 at temperature 0, but n noisy chains with greedy answers are a sensible group."""
    answer_max_tokens: int | None = None
    """Tokens of the answer phase at most, on top of the request's max_tokens; None: no limit
    of its own."""

    def __post_init__(self) -> None:
        _normalise(self)
        _check_ranges(self)
        _check_contradictions(self)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> CoTParams:
        """Build from plain data (JSON); raises `CoTParamsError` on unknown fields."""
        if not isinstance(raw, Mapping):
            raise CoTParamsError("", f"must be an object of fields, got {type(raw).__name__}")
        known = {f.name for f in dataclasses.fields(cls)}
        for name in raw:
            if name not in known:
                raise CoTParamsError(
                    str(name), f"unknown field; known fields: {', '.join(sorted(known))}"
                )
        return cls(**dict(raw))

    def to_dict(self) -> dict[str, Any]:
        """Plain data that `from_dict` takes back; tuples become lists."""
        out: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                value = [list(v) if isinstance(v, tuple) else v for v in value]
            elif isinstance(value, Mapping):
                value = dict(value)
            out[field.name] = value
        return out

    @property
    def tau(self) -> float:
        """The CoT temperature in force."""
        return DEFAULT_TEMPERATURE[self.mode] if self.temperature is None else self.temperature

    @property
    def gamma(self) -> float:
        """sigma / RMS(E) in force; 0 where no noise is drawn."""
        if self.noise == "none" or self.mode == "hard":
            return 0.0
        return DEFAULT_NOISE_SCALE if self.noise_scale is None else self.noise_scale

    @property
    def policy_name(self) -> str:
        """The step policy in force: the two pure modes are policies, too."""
        if self.mode == "hard":
            return "hard"
        return "soft" if self.mode in ("soft", "fuzzy") else str(self.policy)

    @property
    def is_sparse(self) -> bool:
        """Whether a mixture has at most `top_k` tokens, so that ids and weights reproduce it."""
        return self.top_k > 0


def _normalise(p: CoTParams) -> None:
    """JSON gives lists where the type says tuple."""

    def put(name: str, value: object) -> None:
        object.__setattr__(p, name, value)

    for name in ("force_after_end", "force_after_cut"):
        value = getattr(p, name)
        if isinstance(value, str):
            _check_text(name, value)
        else:
            put(name, _id_tuple(name, value, "a text or a list of token ids"))
    if isinstance(p.end_strings, (str, bytes)) or not isinstance(p.end_strings, Sequence):
        raise CoTParamsError("end_strings", "must be a list of texts")
    for text in p.end_strings:
        if not isinstance(text, str) or not text:
            raise CoTParamsError("end_strings", f"must hold non-empty texts, got {text!r}")
        _check_text("end_strings", text)
    if len(p.end_strings) > MAX_END_SEQUENCES:
        raise CoTParamsError(
            "end_strings", f"at most {MAX_END_SEQUENCES} texts, got {len(p.end_strings)}"
        )
    put("end_strings", tuple(p.end_strings))
    if isinstance(p.end_token_ids, (str, bytes)) or not isinstance(p.end_token_ids, Sequence):
        raise CoTParamsError("end_token_ids", "must be a list of lists of token ids")
    put("end_token_ids", tuple(_id_tuple("end_token_ids", s) for s in p.end_token_ids))
    if not isinstance(p.policy_params, Mapping):
        raise CoTParamsError("policy_params", "must be an object of numbers")
    put("policy_params", dict(p.policy_params))


def _check_text(field: str, text: str) -> None:
    if len(text) > MAX_TEXT_LENGTH:
        raise CoTParamsError(
            field, f"a text may have {MAX_TEXT_LENGTH} characters, got {len(text)}; give token ids"
        )
    try:
        text.encode()
    except UnicodeEncodeError:
        raise CoTParamsError(field, f"{text!r} is not valid Unicode text") from None


def _id_tuple(field: str, value: Any, kind: str = "a list of token ids") -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise CoTParamsError(field, f"must be {kind}, got {value!r}")
    for item in value:
        if not isinstance(item, int) or isinstance(item, bool) or item < 0:
            raise CoTParamsError(field, f"token ids must be integers >= 0, got {item!r}")
    return tuple(value)


def _number(
    p: CoTParams,
    field: str,
    low: float,
    high: float,
    *,
    open_low: bool = False,
    open_high: bool = False,
    whole: bool = False,
) -> None:
    value = getattr(p, field)
    kind = "an integer" if whole else "a number"
    bounds = f"{low}, {high}" if whole else f"{low:g}, {high:g}"
    allowed = f"{kind} in {'(' if open_low else '['}{bounds}{')' if open_high else ']'}"
    ok = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    # Also False for NaN.
    ok = ok and low <= value <= high
    if not ok or (open_low and value == low) or (open_high and value == high):
        raise CoTParamsError(field, f"must be {allowed}, got {value!r}")


def _choice(p: CoTParams, field: str, allowed: tuple[str, ...]) -> None:
    value = getattr(p, field)
    if value not in allowed:
        raise CoTParamsError(field, f"must be one of {', '.join(allowed)}, got {value!r}")


def _check_ranges(p: CoTParams) -> None:
    _choice(p, "mode", get_args(Mode))
    _choice(p, "record", get_args(Record))
    if not isinstance(p.answer_greedy, bool):
        raise CoTParamsError("answer_greedy", f"must be true or false, got {p.answer_greedy!r}")
    if p.noise is not None:
        _choice(p, "noise", get_args(Noise))
    if p.temperature is not None:
        _number(p, "temperature", MIN_TEMPERATURE, 100.0)
    if p.noise_scale is not None:
        _number(p, "noise_scale", 0.0, 100.0)
    if p.seed is not None:
        _number(p, "seed", 0, MAX_SEED - 1, whole=True)
    if p.cold_stop_entropy is not None:
        _number(p, "cold_stop_entropy", 0.0, 1e3, open_low=True)
    if p.answer_max_tokens is not None:
        _number(p, "answer_max_tokens", 1, 2**31 - 1, whole=True)
    _number(p, "top_k", 0, MAX_TOP_K, whole=True)
    _number(p, "top_p", MIN_TOP_P, 1.0)
    _number(p, "min_p", 0.0, 1.0, open_high=True)
    if p.max_think_tokens is not None:
        _number(p, "max_think_tokens", 0, 2**31 - 1, whole=True)
    _number(p, "min_think_tokens", 0, 2**31 - 1, whole=True)
    _number(p, "cold_stop_steps", 1, 2**31 - 1, whole=True)
    _number(p, "record_top", 1, MAX_RECORD_TOP, whole=True)
    for ids in p.end_token_ids:
        if not 1 <= len(ids) <= MAX_END_LENGTH:
            raise CoTParamsError(
                "end_token_ids", f"a sequence must have 1 to {MAX_END_LENGTH} ids, got {len(ids)}"
            )


def _check_contradictions(p: CoTParams) -> None:
    if p.mode == "mixed":
        policies.validate(p.policy, p.policy_params, CoTParamsError)
    else:
        if p.policy is not None:
            raise CoTParamsError("policy", f"only mode mixed takes a policy, mode is {p.mode}")
        if p.policy_params:
            raise CoTParamsError("policy_params", f"only mode mixed takes them, mode is {p.mode}")
    if p.mode == "hard":
        if p.noise == "gaussian" or (p.noise_scale is not None and p.noise_scale > 0):
            raise CoTParamsError(
                "noise",
                "mode hard feeds sampled tokens and adds no noise; use soft, fuzzy or mixed",
            )
        if p.record in ("sparse", "dense"):
            raise CoTParamsError(
                "record", f"mode hard feeds no mixture to record; use steps or top, got {p.record}"
            )
    if p.noise == "none" and p.noise_scale:
        raise CoTParamsError("noise_scale", "noise is none, so the scale must be 0 or absent")
    if p.max_think_tokens is not None and p.min_think_tokens > p.max_think_tokens:
        raise CoTParamsError(
            "min_think_tokens",
            f"must not exceed max_think_tokens ({p.max_think_tokens}), got {p.min_think_tokens}",
        )
    if p.record == "sparse" and not p.is_sparse:
        raise CoTParamsError(
            "record", "sparse needs a bounded support: set top_k (1 to 1024), or record dense"
        )
