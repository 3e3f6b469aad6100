"""New weights for a running engine: taken whole, or refused with the old ones untouched."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_harness import Engine, EngineError, Sample
from safetensors.torch import load_file, save_file
from tiny_models import tiny_llama

from softvllm import soft_params
from softvllm.core.checkpoint import write_marker, write_weights
from softvllm.core.embedding import embedding_rms
from softvllm.core.trace import decode
from softvllm.core.weight_folder import TensorEntry
from softvllm.engine.expected import compare, served_tensors
from softvllm.engine.update import ABORT, UpdateRefusedError, UpdateSession, settle, verdict

BLOCK = 32
PROMPT = list(range(60, 60 + 2 * BLOCK)) + [7, 8, 9]
TRANSFER = {"weight_transfer_config": {"backend": "safetensors"}}
FILE = "model.safetensors"
EMBED, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
NORM = "model.norm.weight"


# ---- the order of the steps, and one verdict for all workers --------------------------------


class FakeEngine:
    """Two workers with our back-end behind vLLM's interface."""

    def __init__(self, worker: Any) -> None:
        self.worker = worker
        self.verdict: str | None = None
        self.version: str | None = None

    def settle(self, keep: bool) -> None:
        self.worker.log.append("kept" if keep else "put back")


class FakeWorker:
    def __init__(self) -> None:
        self.weight_transfer_engine = FakeEngine(self)
        self.model_runner = object()  # without softvllm: nothing to refresh
        self._weight_update_active = True
        self.log: list[str] = []


class FakeCore:
    def __init__(self) -> None:
        self.fleet = [FakeWorker(), FakeWorker()]
        self.obstacle_text: str | None = None
        self.versions: list[str | None] = []

    def workers(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        return [function(worker, *args) for worker in self.fleet]

    def obstacle(self) -> str | None:
        return self.obstacle_text

    def updated(self, version: str | None) -> None:
        self.versions.append(version)


FOLDER = {"update_info": {"path": "/x"}}
START, UPDATE, FINISH = "start_weight_update", "update_weights", "finish_weight_update"


def refused(session: UpdateSession, method: str) -> tuple[int, str]:
    sent: list[str] = []
    with pytest.raises(UpdateRefusedError) as caught:
        session.call(method, lambda: sent.append(method), FOLDER)
    assert caught.value.status != 409 or not sent, "an order error must not reach a worker"
    return caught.value.status, caught.value.reason


def run(session: UpdateSession, *methods: str) -> None:
    for method in methods:
        answer = session.call(method, lambda: "sent", FOLDER)
        assert answer == (None if method == ABORT else "sent")


@pytest.mark.parametrize("is_folder", [True, False])
def test_steps_out_of_order_are_refused_with_the_next_step(is_folder: bool) -> None:
    core = FakeCore()
    session = UpdateSession(core, is_folder)
    for method in (UPDATE, FINISH):
        status, reason = refused(session, method)
        assert status == 409 and "/start_weight_update" in reason
    run(session, START)
    status, reason = refused(session, START)
    assert status == 409 and "/abort_weight_update" in reason
    status, reason = refused(session, FINISH)
    assert status == 409 and "/update_weights" in reason
    run(session, UPDATE, FINISH, START, UPDATE, FINISH)
    assert len(core.versions) == 2


def test_a_folder_is_one_update_and_other_back_ends_send_many_chunks() -> None:
    session = UpdateSession(FakeCore(), is_folder=True)
    run(session, START, UPDATE)
    assert refused(session, UPDATE)[0] == 409
    run(session, FINISH)
    other = UpdateSession(FakeCore(), is_folder=False)
    run(other, START, UPDATE, UPDATE, UPDATE, FINISH)


def test_one_worker_that_cannot_read_the_folder_refuses_for_all() -> None:
    core = FakeCore()
    session = UpdateSession(core, is_folder=True)
    run(session, START)
    core.fleet[1].weight_transfer_engine.verdict = "not mounted here"
    assert refused(session, UPDATE) == (400, "not mounted here")
    assert [worker.log for worker in core.fleet] == [["put back"], ["put back"]]
    assert not any(worker._weight_update_active for worker in core.fleet)
    core.fleet[1].weight_transfer_engine.verdict = None
    run(session, START, UPDATE, FINISH)


def test_one_worker_that_cannot_load_puts_all_back() -> None:
    core = FakeCore()
    session = UpdateSession(core, is_folder=True)
    run(session, START, UPDATE)
    core.fleet[0].weight_transfer_engine.verdict = "out of memory"
    assert refused(session, FINISH) == (500, "out of memory")
    assert [worker.log[-1] for worker in core.fleet] == ["put back", "put back"]
    assert core.versions == []


def test_nothing_changes_while_requests_run() -> None:
    core = FakeCore()
    session = UpdateSession(core, is_folder=True)
    run(session, START, UPDATE)
    core.obstacle_text = "pause first"
    assert refused(session, FINISH) == (409, "pause first")
    core.obstacle_text = None
    run(session, FINISH)
    assert core.versions == [None]
    assert core.fleet[0].log == ["kept"]


def test_an_update_can_be_given_up_at_any_step() -> None:
    session = UpdateSession(FakeCore(), is_folder=True)
    run(session, ABORT, START, ABORT, START, UPDATE, ABORT, ABORT, START, UPDATE, FINISH)
    # Others take the model apart as they start.
    other = UpdateSession(FakeCore(), is_folder=False)
    run(other, ABORT, START)
    assert refused(other, ABORT)[0] == 409


def test_what_workers_would_raise_over_never_reaches_them() -> None:
    """A worker that raises leaves the others' answers in their queues."""
    sent: list[str] = []

    def call(method: str, **kwargs: Any) -> None:
        session.call(method, lambda: sent.append(method), kwargs)

    session = UpdateSession(FakeCore(), is_folder=True)
    call("init_weight_transfer_engine", init_info={})
    for method, kwargs in (
        ("init_weight_transfer_engine", {"init_info": {"master_port": 1}}),
        ("start_draft_weight_update", {}),
    ):
        with pytest.raises(UpdateRefusedError):
            call(method, **kwargs)
    for info in (None, [{"path": "/x"}], "/x"):
        call(START)
        with pytest.raises(UpdateRefusedError, match="must be an object"):
            call(UPDATE, update_info=info)
    call(START)
    with pytest.raises(UpdateRefusedError, match="under way"):
        call("shutdown_weight_transfer_engine")
    assert set(sent) == {START}


def test_calls_that_concern_no_update_pass() -> None:
    session = UpdateSession(FakeCore(), is_folder=True)
    assert session.call("sleep", lambda: 3) == 3
    assert session.call(verdict, lambda: 4) == 4
    assert session.call(settle, lambda: 5) == 5


def test_a_refusal_survives_the_text_of_another_process() -> None:
    error = UpdateRefusedError(400, "wrong shape: a\nand b (c): d")
    told = Exception(f"Call to collective_rpc method failed: {error}")
    found = UpdateRefusedError.find(told)
    assert found is not None and (found.status, found.reason) == (error.status, error.reason)
    assert UpdateRefusedError.find(RuntimeError("weights")) is None


# ---- dtypes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("started", "given", "served", "fits", "rounded"),
    [
        ("BF16", "BF16", torch.bfloat16, True, 0),
        ("F32", "F32", torch.bfloat16, True, 1),
        ("BF16", "F32", torch.bfloat16, True, 1),
        ("F32", "BF16", torch.bfloat16, True, 0),
        ("BF16", "BF16", torch.float32, True, 0),
        ("BF16", "F32", torch.float32, True, 0),
        ("F32", "BF16", torch.float32, False, 0),
        ("BF16", "F16", torch.bfloat16, False, 0),
        ("F16", "BF16", torch.float16, False, 0),
        ("BF16", "F64", torch.bfloat16, False, 0),
        ("I32", "I32", torch.bfloat16, True, 0),
        ("I32", "F32", torch.bfloat16, False, 1),
        ("F8_E4M3", "BF16", torch.bfloat16, False, 0),
    ],
)
def test_only_float32_is_converted_and_only_down(
    started: str, given: str, served: torch.dtype, fits: bool, rounded: int
) -> None:
    expected = {"a": TensorEntry("f", started, (2,), 0, 0)}
    found = {"a": TensorEntry("f", given, (2,), 0, 0)}
    problems, narrowed = compare(expected, found, served, tied=False)
    assert (not problems) == fits
    assert narrowed == rounded


# ---- engines --------------------------------------------------------------------------------


def asked(**kwargs: Any) -> Any:
    kwargs = {"mode": "soft", "seed": 3, "record": "dense", **kwargs}
    return soft_params(
        max_think_tokens=6,
        end_strings=(),
        force_after_cut=(40, 41),
        max_tokens=12,
        ignore_eos=True,
        logprobs=5,
        **kwargs,
    )


def hard() -> Any:
    from vllm import SamplingParams

    return SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logprobs=5)


def sample(engine: Engine) -> list[Sample]:
    """A stock request, then thinking ones, each alone so that batches are alike."""
    return [engine.one(PROMPT, p) for p in (hard(), asked(), asked(top_k=8), asked(mode="fuzzy"))]


def assert_bitwise(got: list[Sample], want: list[Sample]) -> None:
    for a, b in zip(got, want, strict=True):
        assert a.token_ids == b.token_ids
        assert a.logprobs == b.logprobs
        if a.trace_bytes is not None:
            assert np.array_equal(a.trace.dense, b.trace.dense)
            assert a.trace.meta["sigma"] == b.trace.meta["sigma"]
            assert a.trace.meta["rms"] == b.trace.meta["rms"]


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    return load_file(model / FILE)


def folder_for(tmp_path: Path, model: Path, name: str = "new", **metadata: Any) -> Path:
    return write_weights(tmp_path / name, weights_of(model), metadata)


def refusal(engine: Engine, function: str, *args: Any) -> str:
    with pytest.raises(EngineError) as caught:
        engine.call(f"weight_probe:{function}", *args)
    (line,) = [t for t in str(caught.value).splitlines() if "weight update refused" in t][-1:]
    return line


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tied(place: Path) -> Path:
    return tiny_llama(place / "tied")


@pytest.fixture(scope="module")
def tied_new(place: Path) -> Path:
    return tiny_llama(place / "tied-new", seed=7)


@pytest.fixture(scope="module")
def untied(place: Path) -> Path:
    return tiny_llama(place / "untied", tied=False)


@pytest.fixture(scope="module")
def untied_new(place: Path) -> Path:
    return tiny_llama(place / "untied-new", tied=False, seed=7)


@pytest.fixture(scope="module")
def engine(tied: Path) -> Iterator[Engine]:
    with Engine(tied, block_size=BLOCK, enable_prefix_caching=True, **TRANSFER) as running:
        yield running


@pytest.fixture
def old(engine: Engine, tied: Path, tmp_path: Path) -> Iterator[list[Sample]]:
    """What the engine says with its first weights, which are in service again afterwards."""
    yield sample(engine)
    engine.call("weight_probe:update", str(folder_for(tmp_path, tied, "back")), "default")


@pytest.fixture(scope="module")
def fresh(tied_new: Path) -> list[Sample]:
    with Engine(tied_new, block_size=BLOCK, enable_prefix_caching=True) as running:
        return sample(running)


@pytest.mark.engine
def test_new_weights_give_what_a_new_engine_gives(
    engine: Engine, old: list[Sample], fresh: list[Sample], tied_new: Path, tmp_path: Path
) -> None:
    assert old[0].token_ids != fresh[0].token_ids
    assert engine.one(PROMPT, hard()).num_cached_tokens == 2 * BLOCK
    folder = folder_for(tmp_path, tied_new)
    assert engine.call("weight_probe:update", str(folder), "17") == "17"
    got = sample(engine)
    assert_bitwise(got, fresh)
    # Neither blocks nor sigma of the old weights survive; the trace names the new ones.
    assert got[0].num_cached_tokens == 0
    rms = embedding_rms(weights_of(tied_new)[EMBED])
    assert engine.call("weight_probe:rms_in_use") == pytest.approx(rms)
    assert got[1].trace.meta["weight_versions"] == [["17", 0, 12]]


@pytest.mark.engine
def test_the_version_comes_from_the_marker_or_the_folder_if_none_is_given(
    engine: Engine, old: list[Sample], tied: Path, tmp_path: Path
) -> None:
    named = folder_for(tmp_path, tied, "step-3")
    assert engine.call("weight_probe:update", str(named)) == "step-3"
    marked = folder_for(tmp_path, tied, "other", weight_version=4)
    assert engine.call("weight_probe:update", str(marked)) == "4"
    assert_bitwise(sample(engine), old)


@pytest.mark.engine
def test_tied_output_weights_may_be_there_if_they_are_the_embedding(
    engine: Engine, old: list[Sample], fresh: list[Sample], tied_new: Path, tmp_path: Path
) -> None:
    tensors = weights_of(tied_new)
    tensors[OUTPUT] = tensors[EMBED] + 1
    wrong = write_weights(tmp_path / "wrong", tensors)
    assert "differs from model.embed_tokens" in refusal(engine, "update", str(wrong))
    assert_bitwise(sample(engine), old)
    tensors[OUTPUT] = tensors[EMBED]
    right = write_weights(tmp_path / "right", tensors, checksums=True, shard_bytes=100_000)
    engine.call("weight_probe:update", str(right))
    assert_bitwise(sample(engine), fresh)


def changed(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path, Path], Path]:
    """A complete folder with the wrong tensors."""

    def make(target: Path, model: Path) -> Path:
        tensors = weights_of(model)
        change(tensors)
        return write_weights(target, tensors)

    return make


def half_written(target: Path, model: Path) -> Path:
    """The trainer died while writing: a file cut short, and no marker yet."""
    target.mkdir()
    shutil.copy(model / FILE, target)
    os.truncate(target / FILE, 50_000)
    return target


def half_copied(target: Path, model: Path) -> Path:
    """The marker overtook the file."""
    folder = write_weights(target, weights_of(model))
    os.truncate(folder / FILE, 50_000)
    return folder


def no_marker(target: Path, model: Path) -> Path:
    target.mkdir()
    save_file(weights_of(model), target / FILE)
    return target


def relative(target: Path, model: Path) -> Path:
    return Path(os.path.relpath(write_weights(target, weights_of(model))))


def as_dtype(name: str, dtype: torch.dtype) -> Callable[[Path, Path], Path]:
    return changed(lambda t: t.update({name: t[name].to(dtype)}))


REFUSED: dict[str, tuple[Callable[[Path, Path], Path], str]] = {
    "half written": (half_written, "no marker file STABLE"),
    "half copied": (half_copied, "half copied"),
    "no marker": (no_marker, "no marker file STABLE"),
    "wrong shape": (
        changed(lambda t: t.update({NORM: torch.ones(63)})),
        "wrong shape: model.norm.weight is [63] instead of [64]",
    ),
    "name missing": (changed(lambda t: t.pop(NORM)), "missing: model.norm.weight"),
    "name too many": (
        changed(lambda t: t.update({"model.norm.bias": torch.ones(64)})),
        "not in the model: model.norm.bias",
    ),
    "vLLM's own names": (
        changed(lambda t: t.update({"model.layers.0.self_attn.qkv_proj.weight": t[NORM]})),
        "not in the model: model.layers.0.self_attn.qkv_proj.weight",
    ),
    "wrong dtype": (as_dtype(NORM, torch.float16), "wrong dtype: model.norm.weight is F16"),
    "NaN": (
        changed(lambda t: t.update({NORM: torch.full((64,), float("nan"), dtype=t[NORM].dtype)})),
        "model.norm.weight and 0 other tensors hold NaN",
    ),
    "relative path": (relative, "absolute path"),
    "no folder": (lambda target, model: target, "no folder"),
}


@pytest.mark.engine
def test_a_wrong_folder_is_refused_whole_and_the_next_right_one_is_taken(
    engine: Engine, old: list[Sample], fresh: list[Sample], tied_new: Path, tmp_path: Path
) -> None:
    before = engine.call("weight_probe:fingerprints")
    for i, (make, reason) in enumerate(REFUSED.values()):
        folder = make(tmp_path / f"refused-{i}", tied_new)
        told = refusal(engine, "update", str(folder))
        assert "refused (400)" in told and reason in told, told
    assert engine.call("weight_probe:fingerprints") == before
    assert_bitwise(sample(engine), old)
    assert sample(engine)[1].trace.meta["weight_versions"] == [["default", 0, 12]]
    engine.call("weight_probe:update", str(folder_for(tmp_path, tied_new)))
    assert_bitwise(sample(engine), fresh)


@pytest.mark.engine
def test_wrong_update_infos_are_refused_by_name(engine: Engine, tmp_path: Path) -> None:
    for info, reason in (
        ({}, "path"),
        ({"path": 3}, "absolute path"),
        ({"path": "/x", "folder": "/x"}, "folder"),
        ({"path": "/x", "checksums": [1]}, "checksums"),
        ([{"path": "/x"}], "update_info must be"),
    ):
        engine.call("weight_probe:step", "start_weight_update")
        told = refusal(engine, "step", "update_weights", {"update_info": info})
        assert "refused (400)" in told and reason in told, told


@pytest.mark.engine
def test_steps_out_of_order_leave_the_engine_ready(
    engine: Engine, old: list[Sample], tied: Path, tmp_path: Path
) -> None:
    assert "refused (409)" in refusal(engine, "step", "finish_weight_update")
    engine.call("weight_probe:step", "start_weight_update")
    assert_bitwise(sample(engine), old)
    assert "refused (409)" in refusal(engine, "step", "start_weight_update")
    assert "refused (409)" in refusal(engine, "step", "finish_weight_update")
    engine.call("weight_probe:abort")
    engine.call("weight_probe:update", str(folder_for(tmp_path, tied)))
    assert_bitwise(sample(engine), old)


@pytest.mark.engine
@pytest.mark.parametrize("after", [0, 3, 15])
def test_a_load_that_fails_halfway_puts_everything_back(
    engine: Engine,
    old: list[Sample],
    fresh: list[Sample],
    tied_new: Path,
    tmp_path: Path,
    after: int,
) -> None:
    before = engine.call("weight_probe:fingerprints")
    folder = folder_for(tmp_path, tied_new)
    told = refusal(engine, "disk_fails", str(folder), after)
    assert "refused (500)" in told and "Input/output error" in told
    assert engine.call("weight_probe:fingerprints") == before
    assert_bitwise(sample(engine), old)
    engine.call("weight_probe:update", str(folder))
    assert_bitwise(sample(engine), fresh)


@pytest.mark.engine
def test_a_folder_that_changes_after_the_check_is_not_loaded(
    engine: Engine, old: list[Sample], fresh: list[Sample], tied_new: Path, tmp_path: Path
) -> None:
    cut = folder_for(tmp_path, tied_new, "cut")
    assert "changed after it was checked" in refusal(engine, "cut_between", str(cut), FILE)
    assert_bitwise(sample(engine), old)
    # Deleting it is harmless: it is held open.
    gone = folder_for(tmp_path, tied_new, "gone")
    engine.call("weight_probe:removed_between", str(gone))
    assert not gone.exists()
    assert_bitwise(sample(engine), fresh)


@pytest.mark.engine
def test_a_request_in_flight_keeps_its_past_and_goes_on_with_new_weights(
    engine: Engine, old: list[Sample], tied: Path, tied_new: Path, tmp_path: Path
) -> None:
    params = soft_params(
        mode="soft",
        seed=3,
        max_think_tokens=20,
        end_strings=(),
        force_after_cut=(40,),
        max_tokens=30,
        ignore_eos=True,
        record="dense",
    )
    folder = folder_for(tmp_path, tied_new)
    parts = engine.call("weight_probe:midway", params, 8, str(folder), "new")
    before, whole = (decode(part) for part in parts)
    steps = len(before)
    assert 0 < steps < 20 and len(whole) == 30
    assert before.token.tolist() == whole.token[:steps].tolist()
    assert before.dense is not None and whole.dense is not None
    assert np.array_equal(before.dense, whole.dense[: len(before.dense)])
    assert whole.meta["weight_versions"] == [["default", 0, steps], ["new", steps, 30]]
    sigmas = [0.33 * embedding_rms(weights_of(model)[EMBED]) for model in (tied, tied_new)]
    assert [sigma for sigma, _ in whole.meta["sigmas"]] == pytest.approx(sigmas)
    assert [first for _, first in whole.meta["sigmas"]] == [0, steps]


@pytest.mark.engine
def test_running_requests_are_not_torn(
    engine: Engine, old: list[Sample], tied_new: Path, tmp_path: Path
) -> None:
    folder = folder_for(tmp_path, tied_new)
    told = refusal(engine, "midway", asked(), 3, str(folder), "new", False)
    assert "refused (409)" in told and "/pause?mode=keep" in told
    engine.call("weight_probe:abort")
    assert_bitwise(sample(engine), old)


@pytest.mark.engine
def test_float32_weights_are_rounded_for_a_model_served_in_bfloat16(
    untied: Path, untied_new: Path, tmp_path: Path
) -> None:
    with Engine(untied_new, dtype="bfloat16") as running:
        fresh = sample(running)
    with Engine(untied, dtype="bfloat16", **TRANSFER) as running:
        old = sample(running)
        without = changed(lambda t: t.pop(OUTPUT))(tmp_path / "without", untied_new)
        assert f"missing: {OUTPUT}" in refusal(running, "update", str(without))
        half = as_dtype(NORM, torch.float16)(tmp_path / "half", untied_new)
        assert "wrong dtype" in refusal(running, "update", str(half))
        assert_bitwise(sample(running), old)
        running.call("weight_probe:update", str(folder_for(tmp_path, untied_new)))
        assert_bitwise(sample(running), fresh)
        assert "are rounded to torch.bfloat16" in running.tail(100_000)
        # A trainer that writes bfloat16 itself gets the same.
        running.call("weight_probe:update", str(folder_for(tmp_path, untied, "old")))
        rounded = {name: t.to(torch.bfloat16) for name, t in weights_of(untied_new).items()}
        running.call("weight_probe:update", str(write_weights(tmp_path / "bf16", rounded)))
        assert_bitwise(sample(running), fresh)


@pytest.mark.engine
def test_two_workers_and_an_engine_core_of_its_own_agree(
    untied: Path, untied_new: Path, tmp_path: Path
) -> None:
    with Engine(untied, tp=2, multiprocess=True, **TRANSFER) as running:
        old = sample(running)
        half = half_copied(tmp_path / "half", untied_new)
        # Twice: an answer left in a worker's queue would be taken for the next call's.
        for _ in range(2):
            told = refusal(running, "update", str(half))
            assert "refused (400)" in told and "half copied" in told
        assert_bitwise(sample(running), old)
        folder = folder_for(tmp_path, untied_new)
        assert running.call("weight_probe:update", str(folder), "2") == "2"
        new = sample(running)
        rms = embedding_rms(weights_of(untied_new)[EMBED])
        assert new[1].trace.meta["rms"] == pytest.approx(rms)
        assert new[1].trace.meta["weight_versions"] == [["2", 0, 12]]
        running.call("weight_probe:update", str(folder_for(tmp_path, untied, "old")))
        assert_bitwise(sample(running), old)


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_model_without_safetensors_files_cannot_take_weights(
    tied: Path, tmp_path: Path, load_format: str
) -> None:
    from vllm.config.load import LoadConfig

    def config(model: Path) -> Any:
        facts = SimpleNamespace(model=str(model), revision=None)
        return SimpleNamespace(load_config=LoadConfig(load_format=load_format), model_config=facts)

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(weights_of(tied), pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match="needs a model loaded from safetensors files"):
        served_tensors(config(pickled))
    if load_format == "auto":
        assert served_tensors(config(tied)).keys() == weights_of(tied).keys()


def test_the_marker_of_a_saved_model_is_all_it_takes(tied: Path, tmp_path: Path) -> None:
    """`model.save_pretrained` and `write_marker` make a folder the server takes."""
    saved = shutil.copytree(tied, tmp_path / "saved")
    write_marker(saved)
    from softvllm.core.checkpoint import check_weights

    with check_weights(saved) as found:
        assert found.entries.keys() == weights_of(tied).keys()
