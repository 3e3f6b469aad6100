"""The oracle against transformers' own decoding and against rules checked by hand."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from tiny_models import VOCAB_SIZE, tiny_gemma, tiny_llama, tiny_qwen3
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, GraniteConfig, GraniteForCausalLM

from softvllm import CoTParams, reconstruct
from softvllm.core import noise
from softvllm.core.oracle import Oracle, OracleResult, shaped
from softvllm.core.phases import EndCause, Phase
from softvllm.core.resolve import resolve
from softvllm.core.trace import Kind, decode, encode

PROMPT = np.random.default_rng(0).integers(4, VOCAB_SIZE, 20).tolist()
EOS = 1
SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Oracle:
    return Oracle.load(str(tiny_llama(tmp_path_factory.mktemp("llama"))))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory) -> Oracle:
    return Oracle.load(str(tiny_gemma(tmp_path_factory.mktemp("gemma"))))


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory) -> Oracle:
    return Oracle.load(str(tiny_qwen3(tmp_path_factory.mktemp("qwen3"))))


def think(oracle: Oracle, max_tokens: int = 24, **cot) -> OracleResult:
    """No texts: nothing forced and no end sequences unless the test asks for them."""
    bare = {"force_after_cut": (), "force_after_end": (), "end_strings": (), "seed": 7}
    params = CoTParams(**{**bare, "max_think_tokens": 10, **cot})
    return oracle.decode(PROMPT, params, max_tokens=max_tokens, keep_logits=True)


def greedy(oracle: Oracle, count: int) -> list[int]:
    """transformers' own greedy decoding, EOS or not."""
    out = oracle.model.generate(
        torch.tensor([PROMPT]),
        attention_mask=torch.ones(1, len(PROMPT), dtype=torch.int64),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
    )
    return out[0, len(PROMPT) :].tolist()


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen3"])
def test_without_noise_and_near_temperature_0_it_is_greedy_decoding(name, request):
    oracle = request.getfixturevalue(name)
    result = think(oracle, mode="soft", temperature=1e-6, noise_scale=0)
    assert EOS not in result.token_ids
    assert result.token_ids == greedy(oracle, 24)
    assert result.trace.kind.tolist() == [Kind.SOFT] * 10 + [Kind.SAMPLED] * 14
    torch.testing.assert_close(result.inputs, oracle.table[result.token_ids], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["llama", "gemma", "qwen3"])
def test_a_request_that_does_not_think_is_greedy_decoding(name, request):
    oracle = request.getfixturevalue(name)
    result = think(oracle, mode="hard", max_think_tokens=0)
    assert result.token_ids == greedy(oracle, 24)
    assert set(result.trace.phase) == {Phase.ANSWER}


def test_a_soft_step_feeds_the_mixture_of_the_whole_vocabulary_plus_noise(llama):
    result = think(llama, mode="soft")
    table = llama.table.double()
    for t in range(10):
        logits = result.logits[t].double()
        weights = torch.exp(2 * (logits - logits.max()))  # tau = 0.5
        mean = (weights[:, None] * table).sum(0) / weights.sum()
        z = noise.gaussian(torch.tensor([7]), torch.tensor([t]), 64)[0]
        sigma = 0.33 * math.sqrt(float(table.square().mean()))
        torch.testing.assert_close(
            result.inputs[t].double(), mean + sigma * z, rtol=1e-5, atol=1e-6
        )
        assert result.token_ids[t] == int(logits.argmax())
        entropy = float(-(logits.softmax(-1) * logits.log_softmax(-1)).sum())
        assert result.trace.entropy[t] == pytest.approx(entropy, abs=1e-5)
    assert (result.trace.log_prob == 0).all()  # shadows and greedy answers are not sampled


def test_the_model_is_fed_what_is_reported(llama):
    """One forward pass over prompt and inputs gives the logits of every step."""
    result = think(llama, mode="mixed", policy="blend")
    rows = torch.cat((llama.table[PROMPT], result.inputs[:-1]))[None]
    with torch.no_grad():
        logits = llama.model(inputs_embeds=rows).logits[0, len(PROMPT) - 1 :]
    torch.testing.assert_close(logits, result.logits, rtol=1e-4, atol=1e-4)


def test_hard_thoughts_follow_the_distribution_and_report_its_log_prob(llama):
    result = think(llama, mode="hard", temperature=0.7, top_k=5, max_think_tokens=20)
    for t in range(20):
        values, ids = (result.logits[t] / 0.7).topk(5)
        cdf = values.softmax(-1).cumsum(-1)
        u = noise.uniform(torch.tensor([7]), torch.tensor([t]))
        rank = int((cdf < u).sum())
        assert result.token_ids[t] == ids[rank]
        assert result.trace.log_prob[t] == pytest.approx(
            float(values.log_softmax(-1)[rank]), abs=1e-5
        )
    assert set(result.trace.kind) == {Kind.SAMPLED}
    assert torch.equal(result.inputs, llama.table[result.token_ids])


def test_sampled_answers_follow_the_answers_own_parameters(llama):
    params = CoTParams(mode="soft", seed=7, max_think_tokens=0, force_after_cut=())
    result = llama.decode(
        PROMPT, params, max_tokens=30, temperature=0.8, top_p=0.6, keep_logits=True
    )
    for t in range(30):
        probs, ids = (result.logits[t] / 0.8).softmax(-1).sort(descending=True)
        keep = int((probs.cumsum(-1) < 0.6).sum()) + 1
        rank = ids.tolist().index(result.token_ids[t])
        assert rank < keep
        expected = math.log(float(probs[rank] / probs[:keep].sum()))
        assert result.trace.log_prob[t] == pytest.approx(expected, abs=1e-5)
    again = llama.decode(PROMPT, params, max_tokens=30, temperature=0.8, top_p=0.6)
    assert again.token_ids == result.token_ids


def test_supports_keep_the_tokens_they_should():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert shaped(logits, 1.0, 2, 1.0, 0.0).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert shaped(logits, 1.0, 0, 0.65, 0.0).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])
    assert shaped(logits, 1.0, 0, 0.75, 0.0).tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    assert shaped(logits, 1.0, 0, 1.0, 0.45).tolist() == pytest.approx([4 / 9, 3 / 9, 2 / 9, 0])
    assert shaped(logits, 0.5, 0, 1.0, 0.0).tolist() == pytest.approx(
        [16 / 30, 0.3, 4 / 30, 1 / 30]
    )
    assert shaped(logits, 1.0, 3, 0.5, 0.0).tolist() == pytest.approx([4 / 7, 3 / 7, 0, 0])


def test_blend_feeds_the_sampled_token_and_the_mixture_in_their_shares(llama):
    result = think(
        llama, mode="mixed", policy="blend", policy_params={"weight": 0.25}, noise="none", top_k=8
    )
    assert result.trace.kind[:10].tolist() == [Kind.SOFT_SAMPLED] * 10
    for t in range(10):
        mean = shaped(result.logits[t], 0.5, 8, 1.0, 0.0) @ llama.table
        expected = 0.25 * mean + 0.75 * llama.table[result.token_ids[t]]
        torch.testing.assert_close(result.inputs[t], expected)
    assert (result.trace.log_prob[:10] < 0).any()


def test_interleave_is_soft_in_its_share_of_the_steps(llama):
    result = think(
        llama,
        mode="mixed",
        policy="interleave",
        policy_params={"p": 0.3},
        max_think_tokens=200,
        min_think_tokens=200,
        max_tokens=201,
    )
    soft = result.trace.kind[:200] == Kind.SOFT
    assert 0.2 < soft.mean() < 0.4
    hard = np.flatnonzero(~soft)
    assert torch.equal(result.inputs[hard], llama.table[result.trace.token[hard]])


@pytest.mark.parametrize("above", [0, 1])
def test_the_entropy_policy_switches_with_hysteresis(llama, above):
    limits = {"low": 3.4, "high": 3.8, "soft_above": above}
    result = think(
        llama,
        mode="mixed",
        policy="entropy",
        policy_params=limits,
        max_think_tokens=60,
        max_tokens=61,
    )
    expected, soft = [], True
    for entropy in result.trace.entropy[result.trace.phase == Phase.THINK]:
        if entropy >= 3.8:
            soft = bool(above)
        elif entropy < 3.4:
            soft = not above
        expected.append(Kind.SOFT if soft else Kind.SAMPLED)
    assert result.trace.kind[: len(expected)].tolist() == expected
    assert len(set(expected)) == 2


def test_the_budget_is_kept_and_its_text_forced(llama):
    result = think(llama, mode="soft", force_after_cut="The answer", force_after_end="no")
    forced = llama.tokenizer.encode("The answer")
    assert result.trace.phase.tolist() == (
        [Phase.THINK] * 10 + [Phase.FORCED] * len(forced) + [Phase.ANSWER] * (14 - len(forced))
    )
    assert result.token_ids[10 : 10 + len(forced)] == forced
    assert (result.trace.kind[10 : 10 + len(forced)] == Kind.FORCED).all()
    assert torch.equal(result.inputs[10:], llama.table[result.token_ids[10:]])
    causes = result.trace.steps["cause"].tolist()
    assert causes == [EndCause.UNFINISHED] * 9 + [EndCause.BUDGET] * 15


def test_a_budget_of_0_starts_with_the_forced_text(llama):
    result = think(llama, mode="soft", max_think_tokens=0, force_after_cut=(9, 8))
    assert result.token_ids[:2] == [9, 8]
    assert result.trace.phase.tolist() == [Phase.FORCED] * 2 + [Phase.ANSWER] * 22
    assert result.trace.end_cause == EndCause.BUDGET


def test_an_end_sequence_of_shadow_tokens_ends_thinking_after_its_last_token(llama):
    free = think(llama, mode="soft")
    end = free.token_ids[3:6]
    result = think(
        llama,
        mode="soft",
        end_token_ids=(tuple(end),),
        force_after_end=(9,),
        force_after_cut=(8, 8),
    )
    assert result.token_ids[:6] == free.token_ids[:6]
    assert result.token_ids[6] == 9
    assert result.trace.phase.tolist()[5:8] == [Phase.THINK, Phase.FORCED, Phase.ANSWER]
    assert result.trace.end_cause == EndCause.END_SEQUENCE
    assert torch.equal(result.inputs[:6], free.inputs[:6])


def test_no_end_comes_before_the_minimum(llama):
    free = think(llama, mode="soft")
    end = (tuple(free.token_ids[3:6]),)
    result = think(llama, mode="soft", end_token_ids=end, min_think_tokens=7)
    assert result.trace.end_cause == EndCause.BUDGET
    assert (
        think(llama, mode="soft", end_token_ids=end, min_think_tokens=6).token_ids[:6]
        == (free.token_ids[:6])
    )


@pytest.mark.parametrize("forced", [(), (9, 8)])
def test_a_stop_token_in_the_shadow_is_replaced_by_what_follows_thinking(llama, forced):
    free = think(llama, mode="soft")
    stop = free.token_ids[5]
    assert stop not in free.token_ids[:5]
    params = {"mode": "soft", "seed": 7, "max_think_tokens": 10, "end_strings": ()}
    result = llama.decode(
        PROMPT,
        CoTParams(**params, force_after_cut=forced),
        max_tokens=24,
        stop_token_ids=[stop],
        keep_logits=True,
    )
    assert result.trace.end_cause == EndCause.EOS
    assert result.token_ids[:5] == free.token_ids[:5]
    assert torch.equal(result.inputs[:5], free.inputs[:5])
    if forced:
        assert result.token_ids[5:7] == [9, 8]
        assert result.trace.phase.tolist()[4:8] == [
            *[Phase.THINK, Phase.FORCED, Phase.FORCED],
            Phase.ANSWER,
        ]
    else:  # the greedy answer is the stop token itself, and ends the request
        assert result.token_ids[5:] == [stop]
        assert result.trace.phase.tolist()[5:] == [Phase.ANSWER]


def test_stop_tokens_are_masked_below_the_minimum(llama):
    stop = think(llama, mode="soft").token_ids[0]
    params = CoTParams(mode="soft", seed=7, min_think_tokens=4, max_think_tokens=4, end_strings=())
    result = llama.decode(PROMPT, params, max_tokens=24, stop_token_ids=[stop], keep_logits=True)
    assert stop not in result.token_ids[:4]
    assert (result.logits[:4, [stop, EOS]] == -torch.inf).all()
    assert result.trace.phase[:4].tolist() == [Phase.THINK] * 4
    # Entropy and mixture are those of the masked distribution.
    mean = shaped(result.logits[0], 0.5, 0, 1.0, 0.0) @ llama.table
    z = noise.gaussian(torch.tensor([7]), torch.tensor([0]), 64)[0]
    torch.testing.assert_close(result.inputs[0], mean + result.trace.meta["sigma"] * z)


def test_a_cold_stop_needs_its_steps_in_a_row(llama):
    entropy = think(llama, mode="fuzzy", max_think_tokens=20).trace.entropy[:20]
    limit = float(np.median(entropy))
    cold = entropy < limit
    first = int(np.flatnonzero(cold[1:] & cold[:-1])[0]) + 1  # the second of two cold steps
    assert cold[:first].any() and first < 19
    result = think(
        llama, mode="fuzzy", max_think_tokens=20, cold_stop_entropy=limit, cold_stop_steps=2
    )
    assert result.trace.end_cause == EndCause.COLD_STOP
    assert int((result.trace.phase == Phase.THINK).sum()) == first + 1


def test_the_answer_ends_at_its_stop_token_and_at_its_own_limit(llama):
    free = think(llama, mode="soft")
    stop = free.token_ids[14]
    assert stop not in free.token_ids[:14]
    bare = {"force_after_cut": (), "end_strings": (), "max_think_tokens": 10}
    params = CoTParams(mode="soft", seed=7, **bare)
    result = llama.decode(PROMPT, params, max_tokens=24, stop_token_ids=[stop])
    assert result.token_ids == free.token_ids[:15]
    assert think(llama, mode="soft", answer_max_tokens=3).token_ids == free.token_ids[:13]


@pytest.mark.parametrize("name", ["llama", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_input_embedding_is_what_the_model_makes_of_the_token(name, dtype, request):
    oracle = request.getfixturevalue(name)
    model = type(oracle.model)(oracle.model.config).to(dtype).eval()
    check_inputs(Oracle(model), expected_scale={"llama": 1.0, "gemma": 8.0}[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_multipliers_inside_and_behind_the_embedding_module_apply_once(dtype):
    gemma3 = Gemma3TextConfig(**{**SMALL, "hidden_size": 80}, head_dim=40)
    check_inputs(Oracle(Gemma3ForCausalLM(gemma3).to(dtype).eval()), math.sqrt(80))
    granite = GraniteConfig(**SMALL, embedding_multiplier=12.0)
    check_inputs(Oracle(GraniteForCausalLM(granite).to(dtype).eval()), 1.0)


def check_inputs(oracle: Oracle, expected_scale: float) -> None:
    assert float(oracle.scale) == pytest.approx(expected_scale, rel=4e-3)
    ids = torch.tensor(PROMPT)
    with torch.no_grad():
        logits, _ = oracle._forward(oracle.table[ids], None)
        expected = oracle.model(input_ids=ids[None], logits_to_keep=1).logits[0, -1].float()
    assert torch.equal(logits, expected)


def test_sigma_is_a_share_of_the_table_before_the_multiplier(gemma):
    meta = think(gemma, mode="soft").trace.meta
    rms = float(gemma.table.double().square().mean().sqrt())
    assert meta["rms"] == pytest.approx(rms, rel=1e-8)  # squares are taken in float32
    assert meta["sigma"] == pytest.approx(0.33 * rms, rel=1e-6)


def test_an_embedding_module_of_unknown_ways_is_refused(llama):
    class Shifted(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) + 1

    model = type(llama.model)(llama.model.config).eval()
    model.set_input_embeddings(Shifted(VOCAB_SIZE, 64))
    with pytest.raises(ValueError, match="Shifted does more than look up and scale"):
        Oracle(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_trace_survives_its_encoding_and_reconstructs_bit_by_bit(llama, dtype, tmp_path):
    path = tiny_llama(tmp_path)
    oracle = Oracle.load(str(path), dtype=dtype)
    result = think(oracle, mode="mixed", policy="interleave", force_after_cut=(5, 6))
    assert result.inputs.dtype == dtype
    trace = decode(encode(result.trace))
    assert torch.equal(reconstruct(trace, oracle.table), result.inputs)


def test_fed_its_own_inputs_it_repeats_itself(llama):
    free = think(llama, mode="soft")
    params = CoTParams(mode="soft", seed=7, max_think_tokens=10, end_strings=(), force_after_cut=())
    result = llama.decode(PROMPT, params, max_tokens=24, feed=free.inputs)
    assert result.token_ids == free.token_ids
    assert torch.equal(result.inputs, free.inputs)


def test_another_trajectory_is_followed_and_not_reported_as_its_own(llama):
    params = CoTParams(mode="soft", seed=7, max_think_tokens=10, end_strings=(), force_after_cut=())
    feed = llama.table[torch.arange(24)]
    result = llama.decode(PROMPT, params, max_tokens=24, feed=feed, keep_logits=True)
    with torch.no_grad():
        ids = torch.tensor([PROMPT + list(range(23))])
        logits = llama.model(ids).logits[0, len(PROMPT) - 1 :]
    count = len(result.token_ids)
    torch.testing.assert_close(result.logits, logits[:count], rtol=1e-4, atol=1e-4)
    assert not torch.equal(result.inputs[:10], feed[:10])


def test_a_policy_registered_by_others_is_refused(llama):
    cot = resolve(
        CoTParams(mode="soft", seed=1, max_think_tokens=2),
        llama.tokenizer,
        stop_ids=llama.stop_ids(),
        vocab_size=llama.vocab_size,
        greedy_answer=True,
        max_tokens=24,
    )
    with pytest.raises(ValueError, match="does not know policy 'elsewhere'"):
        llama.decode(PROMPT, dataclasses.replace(cot, policy="elsewhere"), max_tokens=24)


def test_importing_it_needs_torch_alone():
    code = (
        "import sys, softvllm.core.oracle;"
        "print([m for m in ('transformers', 'vllm', 'msgspec') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
