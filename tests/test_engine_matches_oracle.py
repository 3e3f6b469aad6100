"""Engine = oracle, step by step, in float32.

Two comparisons. *Following*: the oracle is fed the inputs the engine recorded and must arrive,
at every position, at the engine's token, kind, phase, end cause, entropy, log-prob and next
input. That is complete: had the engine fed anything but what it recorded, its next step would
differ. *Running free*: both decode on their own. The tiny random models are chaotic (one soft
step multiplies a difference up to tenfold, so float32 rounding reaches the size of sigma after
a dozen), so only a trained model runs free, in the modes it is not chaotic in.

Ties: where a decision hangs on less than float32 can tell (two logits, a draw at the edge of a
token's interval, a token at the edge of a top-p support), two correct programs may part. The
margins below are checked on the oracle's side alone; a request that has such a step is
repeated with another seed and prompt, and a case that stays undecided fails. Nothing else is
forgiven.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from engine_harness import Engine, Sample

from softvllm import CoTParams
from softvllm.core import noise
from softvllm.core.oracle import Oracle, OracleResult, shaped
from softvllm.core.params import DEFAULT_NOISE_SCALE
from softvllm.core.phases import EndCause, Phase
from softvllm.core.resolve import ResolvedCoT, resolve
from softvllm.core.trace import Kind, is_soft, reconstruct
from softvllm.models import resolve_model

pytestmark = pytest.mark.engine

BOUND = 1e-3  # max |h~ - h~_oracle| / sigma
CLOSE = 2e-4  # nats: entropy and log-prob
# A float32 softmax over 49,152 tokens sums to 1 within 2e-5; times the logits' size in an entropy.
CLOSE_LARGE = 1e-3

# Margins. Logits of the two programs agree to about 1e-5, probabilities to about 1e-6.
LOGIT_GAP = 1e-4
FUZZY_GAP = 1e-3  # at tau = 1e-4 the runner-up then weighs at most e^-10
CDF_GAP = 1e-5
MIN_P_GAP = 1e-4  # of a probability relative to min-p's threshold
ENTROPY_GAP = 1e-3
ATTEMPTS = 8

CHUNK = 64
PROMPT = 150  # tokens, more than two chunks
THINK, MAX_TOKENS = 12, 28


@dataclass(frozen=True)
class Case:
    """One request: CoT fields, and what shapes the answer."""

    name: str
    cot: dict[str, Any]
    answer: dict[str, Any] = field(default_factory=dict)
    learn: str = ""
    """ends or stops: make two tokens (one) of the oracle's own path an end sequence (a stop)."""
    attempt: int = 0

    @property
    def params(self) -> CoTParams:
        record = "steps" if self.cot["mode"] == "hard" else "dense"
        seed = 1000 * self.attempt + sum(self.name.encode())
        return CoTParams(**{"seed": seed, "max_think_tokens": THINK, "record": record, **self.cot})

    @property
    def prompt(self) -> list[int]:
        """Ids of a prompt of its own; no special tokens."""
        seed = 100_000 + 1000 * self.attempt + sum(self.name.encode())
        draws = np.random.default_rng(seed).integers(4, tiny_models.VOCAB_SIZE, PROMPT)
        return draws.tolist()

    @property
    def sampling(self) -> Any:
        from softvllm import soft_params

        return soft_params(self.params, max_tokens=MAX_TOKENS, **self.answer)

    def again(self) -> Case:
        return replace(self, attempt=self.attempt + 1)

    def learned(self, oracle: Oracle) -> Case:
        """With ends that are sure to come, as modes that are not chaotic allow to foresee."""
        if not self.learn:
            return self
        ids = oracle.decode(self.prompt, self.params, max_tokens=MAX_TOKENS).token_ids
        if self.learn == "ends":
            return replace(self, cot={**self.cot, "end_token_ids": [ids[4:6]]})
        return replace(self, answer={**self.answer, "stop_token_ids": [ids[5]]})


MANY = list(range(10, 310, 10))  # ids of which one soon comes by chance
ENDS = [[i] for i in MANY]
SAMPLED = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
MIXED = {"mode": "mixed"}
SUPPORT = {"top_k": 16, "top_p": 0.9, "min_p": 0.02}
BY_ENTROPY = {"policy": "entropy", "policy_params": {"low": 3.4, "high": 3.8}}

CASES = [
    Case("hard", {"mode": "hard"}),
    Case("hard, support, sampled answer", {"mode": "hard", **SUPPORT}, SAMPLED),
    Case("soft", {"mode": "soft"}),
    Case("soft greedy", {"mode": "soft", "noise_scale": 0}),
    Case("soft top-k", {"mode": "soft", "top_k": 8}, SAMPLED),
    Case("soft top-p", {"mode": "soft", "top_p": 0.8}),
    Case("soft min-p, no noise", {"mode": "soft", "min_p": 0.05, "noise": "none"}),
    Case("soft, all three supports", {"mode": "soft", **SUPPORT}),
    Case("fuzzy", {"mode": "fuzzy"}, SAMPLED),
    Case("fuzzy greedy", {"mode": "fuzzy", "noise_scale": 0}),
    Case("fuzzy top-k", {"mode": "fuzzy", "top_k": 4}),
    Case("blend", {**MIXED, "policy": "blend", "policy_params": {"weight": 0.6}}),
    Case("blend, support, no noise", {**MIXED, "policy": "blend", "noise": "none", **SUPPORT}),
    Case("interleave", {**MIXED, "policy": "interleave", "policy_params": {"p": 0.5}}),
    Case("interleave top-k", {**MIXED, "policy": "interleave", "top_k": 8}, SAMPLED),
    Case("entropy", {**MIXED, **BY_ENTROPY}),
    Case(
        "entropy, soft below, top-k",
        {
            **MIXED,
            "policy": "entropy",
            "policy_params": {"low": 3.4, "high": 3.8, "soft_above": 0},
            "top_k": 32,
        },
    ),
]

# All modes, all ways thinking ends; the same rows beside and between stock requests.
BATCH = [
    Case("hard, ends", {"mode": "hard", "end_strings": ()}, SAMPLED, learn="ends"),
    Case("soft", {"mode": "soft"}),
    Case("soft, stops", {"mode": "soft", "min_think_tokens": 3}, {"stop_token_ids": MANY}),
    Case("soft, ends", {"mode": "soft", "end_strings": (), "end_token_ids": ENDS, "top_p": 0.8}),
    Case(
        "soft top-k", {"mode": "soft", "cold_stop_entropy": 4.0, "cold_stop_steps": 2, "top_k": 8}
    ),
    Case("fuzzy", {"mode": "fuzzy"}, SAMPLED),
    Case(
        "fuzzy, stop, nothing forced",
        {"mode": "fuzzy", "noise": "none", "force_after_cut": "", "force_after_end": ""},
        learn="stops",
    ),
    Case("blend", {**MIXED, "policy": "blend", **SUPPORT}),
    Case("interleave", {**MIXED, "policy": "interleave", "answer_max_tokens": 2}),
    Case("entropy", {**MIXED, **BY_ENTROPY, "top_k": 32}, SAMPLED),
    # ln 509 = 6.23: always colder than 6.1.
    Case(
        "soft greedy, min-p, cold",
        {"mode": "soft", "noise": "none", "min_p": 0.05}
        | {"cold_stop_entropy": 6.1, "cold_stop_steps": 7},
    ),
    Case("no thoughts", {"mode": "soft", "max_think_tokens": 0}),
]
# Requests without a CoT object, written as one whose answer starts at once.
STOCK = [
    Case(f"stock {i}", {"mode": "hard", "max_think_tokens": 0, "force_after_cut": ""})
    for i in range(4)
]

MODELS = {
    "llama": tiny_models.tiny_llama,
    "llama-untied": lambda path: tiny_models.tiny_llama(path, tied=False),
    "qwen3": tiny_models.tiny_qwen3,
    "gemma": tiny_models.tiny_gemma,
}
V1, V2, V2_ASYNC = ("v1", False), ("v2", False), ("v2", True)
ENGINES = [(V1, model) for model in MODELS]
ENGINES += [(V2, "llama"), (V2_ASYNC, "llama"), (V2_ASYNC, "gemma")]


def _name(value: Any) -> str:
    (runner, is_async), model = value
    return f"{runner}{'-async' if is_async else ''}-{model}"


@dataclass
class Pair:
    """An engine and the oracle of the same model."""

    name: str
    engine: Engine
    oracle: Oracle
    is_v2: bool


@pytest.fixture(scope="module")
def oracles(tmp_path_factory) -> dict[str, tuple[Path, Oracle]]:
    torch.set_num_threads(1)
    found = {}
    for name, make in MODELS.items():
        path = make(tmp_path_factory.mktemp(name))
        found[name] = path, Oracle.load(str(path), dtype=torch.float32)
    return found


OPTIONS = {"max_num_batched_tokens": CHUNK, "max_num_seqs": 16, "enable_chunked_prefill": True}
Start = Callable[[Any], Engine]


@pytest.fixture(scope="module")
def start(request, oracles) -> Iterator[Start]:
    """Gives engines, and starts the next one meanwhile: a start outlasts most tests."""
    params = [getattr(item, "callspec", None) for item in request.session.items]
    wanted = list(dict.fromkeys(p.params["pair"] for p in params if p and "pair" in p.params))
    pool = ThreadPoolExecutor(max_workers=1)
    starting: dict[Any, Future[Engine]] = {}

    def make(param: Any) -> Engine:
        (runner, is_async), model = param
        return Engine(oracles[model][0], runner=runner, async_scheduling=is_async, **OPTIONS)

    def get(param: Any) -> Engine:
        at = wanted.index(param)
        for ahead in wanted[at : at + 2]:
            if ahead not in starting:
                starting[ahead] = pool.submit(make, ahead)
        return starting[param].result()

    yield get
    pool.shutdown()
    for future in starting.values():
        if future.exception() is None and future.result().process.poll() is None:
            future.result().close()


@pytest.fixture(scope="module", params=ENGINES, ids=_name)
def pair(request, oracles, start) -> Iterator[Pair]:
    engine = start(request.param)
    (runner, _), model = request.param
    yield Pair(_name(request.param), engine, oracles[model][1], runner == "v2")
    # Shutting down takes seconds, too.
    threading.Thread(target=engine.close).start()


# ---- margins, from the oracle's logits alone ---------------------------------------------


def ties(oracle: Oracle, result: OracleResult, cot: ResolvedCoT, answer: dict) -> list[str]:
    """Positions whose outcome hangs on less than float32 can tell, and why."""
    assert result.logits is not None
    steps, found = result.trace.steps, []
    temperature = answer.get("temperature", 0.0)
    for t, logits in enumerate(result.logits):
        before = steps["cause"][t - 1] if t else EndCause.BUDGET if not cot.max_think else 0
        why: list[str] = []
        if before == EndCause.UNFINISHED:  # a think step, even if a stop token then ended it
            if cot.policy in ("soft", "interleave", "entropy"):
                why += _top_two(logits, FUZZY_GAP if cot.tau < 1e-2 else LOGIT_GAP)
            support = (cot.tau, cot.top_k, cot.top_p, cot.min_p)
            why += _at_edge(logits, *support)
            if cot.policy != "soft":
                why += _near_draw(logits, shaped(logits, *support), cot.seed, t, cot.top_k > 0)
            entropy = float(torch.special.entr(logits.softmax(-1)).sum())
            limits = [cot.cold_entropy]
            if cot.policy == "entropy":
                limits += cot.policy_values[:2]
            why += ["entropy" for limit in limits if abs(entropy - limit) < ENTROPY_GAP]
        if steps["phase"][t] == Phase.ANSWER:
            if temperature == 0.0:
                why += _top_two(logits, LOGIT_GAP)
            else:
                support = tuple(answer.get(k, d) for k, d in (("top_k", 0), ("top_p", 1.0)))
                support = (temperature, *support, answer.get("min_p", 0.0))
                why += _at_edge(logits, *support)
                why += _near_draw(logits, shaped(logits, *support), cot.seed, t, False)
        found += [f"{t}: {reason}" for reason in why]
    return found


def _top_two(logits: torch.Tensor, gap: float) -> list[str]:
    first, second = logits.topk(2).values.tolist()
    return ["argmax"] if first - second < gap else []


def _at_edge(logits: torch.Tensor, tau: float, top_k: int, top_p: float, min_p: float) -> list[str]:
    """Whether some token is barely inside or outside the support."""
    found = []
    values, order = logits.sort(descending=True)
    kept = int((shaped(logits, tau, top_k, top_p, min_p) > 0).sum())
    if kept < len(values) and values[kept - 1] - values[kept] < LOGIT_GAP:
        found.append("support")
    if min_p:
        ratio = torch.exp((values - values[0]) / tau)
        found += ["min-p"] if (ratio / min_p - 1).abs().min() < MIN_P_GAP else []
    if top_p < 1.0:
        probs = shaped(logits, tau, top_k, 1.0, min_p)[order]
        edge = (probs.double().cumsum(0) - top_p).abs().min()
        found += ["top-p"] if edge < CDF_GAP else []
    return found


def _near_draw(
    logits: torch.Tensor, probs: torch.Tensor, seed: int, t: int, by_rank: bool
) -> list[str]:
    """Whether the uniform draw lies at the edge of its token's interval."""
    order = probs.argsort(descending=True) if by_rank else torch.arange(len(probs))
    cdf = probs[order].double().cumsum(0)
    u = float(noise.uniform(torch.tensor([seed]), torch.tensor([t])))
    edges = cdf[probs[order] > 0][:-1]
    if len(edges) and (edges - u).abs().min() < CDF_GAP:
        return ["draw"]
    rank = int((cdf <= u).sum())
    around = logits[order][max(rank - 1, 0) : rank + 2]
    if by_rank and (around.diff().abs() < LOGIT_GAP).any():
        return ["rank"]
    return []


# ---- the comparison ----------------------------------------------------------------------


MAXIMA: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
"""Largest differences seen, by mode."""


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    """Prints what was measured (pytest -s), and appends it to $SOFTVLLM_MEASURED if set."""
    yield
    lines = [f"{k}: " + ", ".join(f"{n} {v:.1e}" for n, v in MAXIMA[k].items()) for k in MAXIMA]
    print("\n" + "\n".join(lines))
    if target := os.environ.get("SOFTVLLM_MEASURED"):
        with open(target, "a") as out:
            out.write("\n".join(lines) + "\n")


def follow(
    oracle: Oracle, case: Case, sample: Sample, prompt: list[int] | None = None
) -> tuple[OracleResult, list[str]]:
    """The oracle's steps on the inputs the engine recorded, and the ties among them."""
    fed = reconstruct(sample.trace, oracle.table)
    feed = torch.nn.functional.pad(fed, (0, 0, 0, MAX_TOKENS - len(fed)))
    return run(oracle, case, prompt, feed)


def run(
    oracle: Oracle, case: Case, prompt: list[int] | None = None, feed: torch.Tensor | None = None
) -> tuple[OracleResult, list[str]]:
    """The oracle's steps, free unless fed, and the ties among them."""
    result = oracle.decode(
        case.prompt if prompt is None else prompt,
        case.params,
        max_tokens=MAX_TOKENS,
        feed=feed,
        keep_logits=True,
        **case.answer,
    )
    return result, ties(oracle, result, oracle_cot(oracle, case), case.answer)


def oracle_cot(oracle: Oracle, case: Case) -> ResolvedCoT:
    return resolve(
        case.params,
        oracle.tokenizer,
        stop_ids=oracle.stop_ids() | set(case.answer.get("stop_token_ids", ())),
        vocab_size=oracle.vocab_size,
        greedy_answer=case.answer.get("temperature", 0.0) == 0.0,
        max_tokens=MAX_TOKENS,
    )


def assert_same(
    label: str, mode: str, result: OracleResult, sample: Sample, close: float = CLOSE
) -> None:
    """Every field of every step, and every soft input."""
    ours, theirs = result.trace, sample.trace
    assert result.token_ids == sample.token_ids, label
    for name in ("token", "kind", "phase"):
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist(), (label, name)
    assert ours.steps["cause"].tolist() == theirs.steps["cause"].tolist(), label
    for name in ("entropy", "log_prob"):
        off = np.abs(getattr(ours, name) - getattr(theirs, name))
        assert (off < close).all(), (label, name, off)  # NaN is not below
        MAXIMA[mode][name] = max(MAXIMA[mode][name], float(off.max()))
    assert theirs.meta["sigma"] == ours.meta["sigma"], label
    if not is_soft(ours.kind).any():
        return
    sigma = ours.meta["sigma"] or DEFAULT_NOISE_SCALE * ours.meta["rms"]
    off = (ours.dense_tensor() - theirs.dense_tensor()).abs().amax(1) / sigma
    assert off.max() < BOUND, (label, off)
    MAXIMA[mode]["h~/sigma"] = max(MAXIMA[mode]["h~/sigma"], float(off.max()))


def mode_of(case: Case) -> str:
    return case.cot.get("policy", case.cot["mode"]) + (" sparse" if case.cot.get("top_k") else "")


def subset(is_v2: bool) -> list[Case]:
    """V2 runs under an interpreter: one case per mode."""
    names = ("hard", "soft", "fuzzy", "blend", "entropy")
    return [case for case in CASES if not is_v2 or case.name in names]


def test_alone_every_step_is_the_oracles(pair):
    for case in subset(pair.is_v2):
        for _ in range(ATTEMPTS):
            sample = pair.engine.one(case.prompt, case.sampling)
            result, tied = follow(pair.oracle, case, sample)
            if not tied:
                break
            case = case.again()
        assert not tied, (case.name, tied)
        assert_same(f"{pair.name}, {case.name}", mode_of(case), result, sample)


def test_in_a_mixed_batch_of_16_every_step_is_the_oracles(pair):
    cases = list(itertools.chain(*zip(BATCH[::3], BATCH[1::3], BATCH[2::3], STOCK)))
    assert len(cases) == 16
    pending = set(range(16))
    causes: Counter[int] = Counter()
    kinds: Counter[int] = Counter()
    for _ in range(ATTEMPTS):
        batch = [case.learned(pair.oracle) for case in cases]
        out = pair.engine.generate([c.prompt for c in batch], [_params(c) for c in batch])
        for row in sorted(pending):
            case, sample = batch[row], out[row][0]
            label = f"{pair.name}, {case.name}, row {row}"
            if case.name.startswith("stock"):
                tied = check_stock(pair.oracle, case, sample, label)
            else:
                result, tied = follow(pair.oracle, case, sample)
                if not tied:
                    assert_same(label, mode_of(case), result, sample)
                    causes[sample.trace.end_cause] += 1
                    kinds.update(sample.trace.kind.tolist())
            if tied:
                cases[row] = cases[row].again()
            else:
                pending.discard(row)
        if not pending:
            break
    assert not pending, [(cases[row].name, cases[row].attempt) for row in pending]
    # The batch was worth running: all kinds of steps and all ends of thinking were in it.
    assert set(kinds) == set(Kind)
    assert set(causes) == set(EndCause) - {EndCause.UNFINISHED}


def _params(case: Case) -> Any:
    if case.name.startswith("stock"):
        from vllm import SamplingParams

        return SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS)
    return case.sampling


def check_stock(oracle: Oracle, case: Case, sample: Sample, label: str) -> list[str]:
    """A request without a CoT object is plain greedy decoding; returns its ties."""
    assert sample.trace_bytes is None
    result, tied = run(oracle, case)
    if not tied:
        assert sample.token_ids == result.token_ids, label
    return tied


# ---- a trained model ---------------------------------------------------------------------


QUESTION = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant "
    "solves it. User: Natalia sold clips to 48 of her friends in April, and then she sold half "
    "as many clips in May. How many clips did Natalia sell altogether? Assistant:"
)
# Free: nothing passes from engine to oracle. At tau 0.5 this model is chaotic as well (a factor
# of about 2 per step), so the modes that feed whole mixtures are followed.
FREE = ("hard", "fuzzy", "blend")
FOLLOWED = ("soft", "soft greedy", "entropy")


@pytest.mark.model
def test_with_a_trained_model_every_step_is_the_oracles_also_running_free():
    path = resolve_model(None)
    oracle = Oracle.load(path, dtype=torch.float32)
    prompt = oracle.tokenizer(QUESTION)["input_ids"]
    pending = {c.name: longer(c) for c in CASES if c.name in FREE + FOLLOWED}
    with Engine(path, **OPTIONS) as engine:
        for _ in range(ATTEMPTS):
            out = engine.generate([prompt] * len(pending), [c.sampling for c in pending.values()])
            for (name, case), (sample,) in zip(list(pending.items()), out):
                if name in FREE:
                    label, (result, tied) = "free", run(oracle, case, prompt)
                else:
                    label, (result, tied) = "trained", follow(oracle, case, sample, prompt)
                if tied:
                    pending[name] = case.again()
                    continue
                mode = f"{label} {mode_of(case)}"
                assert_same(f"{label}, {name}", mode, result, sample, CLOSE_LARGE)
                del pending[name]
            if not pending:
                break
    assert not pending, list(pending)


def longer(case: Case) -> Case:
    """Greedy answers, no early end, and the entropies of a model that is surer than random."""
    cot = {**case.cot, "min_think_tokens": THINK}
    if cot.get("policy") == "entropy":
        cot["policy_params"] = {"low": 0.5, "high": 1.0}
    return replace(case, answer={}, cot=cot)
