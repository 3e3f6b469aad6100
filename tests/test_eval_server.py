"""What an evaluation asks of the server (model, weights, room) and of its own folder."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from eval_runs import PROBLEMS, EvalServer, command, eval_server, results_of, rows_of
from rl_fixtures import other_model, surroundings, tiny_model
from tiny_models import COMMON, tiny_llama
from trainer_rollouts import single_thread

from softvllm.core.params import PAPER_AFTER_CUT
from trainer.eval import bench
from trainer.eval.__main__ import main
from trainer.eval.service import SERVED_FILE
from trainer.eval.store import Store
from trainer.files import alone
from trainer.setup import load_tokenizer

threads = pytest.fixture(single_thread, autouse=True, scope="module")
model = pytest.fixture(tiny_model, scope="module")
other = pytest.fixture(other_model, scope="module")
server = pytest.fixture(eval_server)
around = pytest.fixture(surroundings, autouse=True)


# ---- the model in service ------------------------------------------------------------------------


def test_a_finished_evaluation_is_not_shown_for_another_served_model(
    model: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "eval"
    with EvalServer(model, name="one") as server:
        assert main(command(server.url, model, out)) == 0
    assert results_of(out)["checkpoints"][0]["served"]["model"] == "one"
    with EvalServer(model, name="two") as server:
        assert main(command(server.url, model, out)) == 1
    error = capsys.readouterr().err
    assert "'one'" in error and "'two'" in error and "start the server again" in error


def test_a_served_folder_with_new_weights_is_another_model(
    model: Path, other: Path, tmp_path: Path, capsys: Any
) -> None:
    folder, out = tmp_path / "best", tmp_path / "eval"
    for source, code in ((model, 0), (model, 0), (other, 1)):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        with EvalServer(folder) as server:
            assert main(command(server.url, model, out)) == code
    assert "start the server again" in capsys.readouterr().err


def test_a_server_that_restarts_with_new_weights_in_its_folder_is_noticed(
    model: Path, other: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    folder = tmp_path / "best"
    shutil.copytree(model, folder)
    with EvalServer(folder) as server:
        sample, sent = server._sample, []

        def then_restart(*given: Any) -> Any:
            sent.append(given)
            if len(sent) == 3:
                shutil.rmtree(folder)  # new files: the served model may be a map of the old ones
                shutil.copytree(other, folder)
                server.restart()
                raise ConnectionResetError("cut on demand")
            return sample(*given)

        monkeypatch.setattr(server, "_sample", then_restart)
        assert main(command(server.url, model, tmp_path / "eval")) == 1
    assert "the server restarted as" in capsys.readouterr().err


def test_trained_weights_in_service_do_not_become_untrained_in_a_folder_that_knows_them(
    server: EvalServer, model: Path, other: Path, tmp_path: Path, capsys: Any
) -> None:
    given = ("--checkpoints", f"soft={other}")
    assert main(command(server.url, model, tmp_path / "one", *given)) == 0
    out = tmp_path / "two"
    assert main(command(server.url, model, out, "--checkpoints", "soft=served")) == 0
    assert main(command(server.url, model, out)) == 1
    assert "call trained weights untrained" in capsys.readouterr().err
    assert not (out / "samples" / "none").exists()


def test_facts_that_an_older_version_did_not_note_are_no_contradiction(
    server: EvalServer, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "eval"
    assert main(command(server.url, model, out)) == 0
    file = out / SERVED_FILE
    noted = json.loads(file.read_text())
    assert noted.pop("weights_at_start") == server.started_with
    file.write_text(json.dumps(noted))
    assert main(command(server.url, model, out, "--samples", "4")) == 0


def test_pushed_weights_do_not_pass_for_untrained_ones(
    server: EvalServer, model: Path, other: Path, tmp_path: Path, capsys: Any
) -> None:
    assert main(command(server.url, model, tmp_path / "one", "--checkpoints", f"soft={other}")) == 0
    sent = len(server.samples_sent)
    assert main(command(server.url, model, tmp_path / "two")) == 1
    error = capsys.readouterr().err
    assert (
        "were pushed to the server" in error and "none=FOLDER" in error and "soft=served" in error
    )
    assert len(server.samples_sent) == sent
    given = ("--checkpoints", "soft=served")
    assert main(command(server.url, model, tmp_path / "three", *given)) == 0
    served = results_of(tmp_path / "three")["checkpoints"][0]["served"]
    assert served["weight_version"].startswith("eval-soft-")
    numbers = [results_of(tmp_path / name)["cells"] for name in ("one", "three")]
    assert numbers[0] == numbers[1]


def test_a_base_model_of_another_shape_than_the_served_one_is_refused(
    server: EvalServer, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(COMMON, "hidden_size", 2 * COMMON["hidden_size"])
    wide = tiny_llama(tmp_path / "wide")
    assert main(command(server.url, wide, tmp_path / "eval")) == 1
    assert f"{wide} does not fit the server" in capsys.readouterr().err
    assert not server.samples_sent


def test_a_server_that_restarts_with_another_model_is_noticed(
    server: EvalServer, model: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    sample, sent = server._sample, []

    def then_restart(*given: Any) -> Any:
        sent.append(given)
        if len(sent) == 3:
            server.name = "two"
            raise ConnectionResetError("cut on demand")
        return sample(*given)

    monkeypatch.setattr(server, "_sample", then_restart)
    assert main(command(server.url, model, tmp_path / "eval")) == 1
    assert "the server restarted as {'model': 'two'" in capsys.readouterr().err


# ---- room ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ({"max_think_tokens": 5}, "thinks 5 tokens at most, 6 are asked"),
        ({"max_model_len": 12}, "the server holds 12: raise its --max-model-len"),
    ],
)
def test_what_does_not_fit_the_server_is_refused_before_the_first_sample(
    model: Path, tmp_path: Path, capsys: Any, limits: dict[str, int], words: str
) -> None:
    with EvalServer(model, limits=limits) as server:
        assert main(command(server.url, model, tmp_path / "eval")) == 1
        assert words in capsys.readouterr().err
        assert not server.samples_sent


def test_forced_text_takes_room_too(model: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = command("", model, tmp_path / "eval", "--settings", "soft-sample")
    tokenizer = load_tokenizer(str(model))
    forced = len(tokenizer.encode(PAPER_AFTER_CUT, add_special_tokens=False))
    prompt = max(len(tokenizer.encode(f"What is {i} + {i}?")) for i in range(PROBLEMS))
    room = prompt + 6 + forced + 4  # thoughts and answers of `command`
    for length, code in ((room - 1, 1), (room, 0)):
        with EvalServer(model, limits={"max_model_len": length}) as server:
            at = arguments.index("--rollout-url") + 1
            assert main([*arguments[:at], server.url, *arguments[at + 1 :]]) == code
    assert f"{forced} forced and 4 of answer are {room}" in capsys.readouterr().err


def test_a_setting_that_contradicts_the_budget_is_refused_before_the_first_sample(
    server: EvalServer, model: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = command(server.url, model, tmp_path / "eval", "--settings", "hard-greedy", "long")
    table = tmp_path / "eval.toml"
    table.write_text(
        table.read_text() + '[setting.long]\nmode = "soft"\ncot = { min_think_tokens = 7 }\n'
    )
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "task sums, setting long" in error and "must not exceed max_think_tokens (6)" in error
    assert not server.samples_sent


def test_checkpoints_of_another_shape_are_refused_before_the_first_sample(
    server: EvalServer, model: Path, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    monkeypatch.setitem(COMMON, "hidden_size", 2 * COMMON["hidden_size"])
    wide = tiny_llama(tmp_path / "wide")
    given = ("--checkpoints", "none=served", f"soft={wide}")
    assert main(command(server.url, model, tmp_path / "eval", *given)) == 1
    assert f"{wide} does not fit the server" in capsys.readouterr().err
    assert main(command(server.url, wide, tmp_path / "eval", "--checkpoints", f"soft={model}")) == 1
    assert f"{wide} does not fit the server" in capsys.readouterr().err
    assert not server.samples_sent


def test_a_folder_that_cannot_be_made_is_not_said_to_go_on(
    server: EvalServer, model: Path, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "eval"
    out.write_text("a file")
    assert main(command(server.url, model, out)) == 1
    error = capsys.readouterr().err
    assert str(out) in error and "goes on" not in error


def test_holding_out_everything_says_that_all_was_seen(
    server: EvalServer, model: Path, tmp_path: Path, capsys: Any
) -> None:
    trained = tmp_path / "trained.toml"
    trained.write_text(
        f'data.source = "file"\ndata.path = "{tmp_path / "problems.jsonl"}"\nvalidation.every = 0\n'
    )
    given = ("--trained-on", str(trained), "--drop-seen")
    assert main(command(server.url, model, tmp_path / "eval", *given)) == 1
    assert "all 6 problems were seen in training" in capsys.readouterr().err


def test_answers_without_thoughts_can_be_asked_for(
    server: EvalServer, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "eval"
    assert main(command(server.url, model, out, "--max-think-tokens", "0")) == 0
    for cell in results_of(out)["cells"]:
        assert cell["think_tokens"]["mean"] == 0 and cell["entropy"] is None
        assert cell["capped"] is None and cell["end"] == {"budget": 1}
    assert all(not row.get("think") for row in rows_of(out, "none/sums/soft-sample"))
    assert "Think steps" in (out / "report.html").read_text()


# ---- the evaluation's own folder -----------------------------------------------------------------


def test_two_evaluations_do_not_write_into_one_folder(
    server: EvalServer, model: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = command(server.url, model, tmp_path / "eval")
    with alone(tmp_path / "eval"):
        assert main(arguments) == 1
    assert "another process is writing" in capsys.readouterr().err
    assert not server.samples_sent
    assert main(arguments) == 0


def test_a_full_disk_stops_with_a_word_and_loses_nothing(
    server: EvalServer, model: Path, tmp_path: Path, capsys: Any
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "eval"
    assert main(command(server.url, model, whole)) == 0
    write, written = Store._write, []

    def until_full(self: Any, row: Any) -> None:
        if len(written) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(row)
        write(self, row)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Store, "_write", until_full)
        assert main(command(server.url, model, out)) == 1
    error = capsys.readouterr().err
    assert "No space left" in error and "goes on from here" in error
    cells = [f"none/sums/{name}" for name in ("hard-greedy", "soft-sample")]
    kept = [row for cell in cells for row in rows_of(out, cell)]
    assert len(kept) == 9
    assert main(command(server.url, model, out)) == 0
    rows = [row for cell in cells for row in rows_of(out, cell)]
    assert len(rows) == 24 and all(row in rows for row in kept)
    results = [json.loads((folder / "results.json").read_text()) for folder in (whole, out)]
    assert results[0] == results[1]


# ---- its cost ------------------------------------------------------------------------------------


def test_the_bench_makes_the_same_samples_both_ways(
    server: EvalServer, model: Path, tmp_path: Path, capsys: Any
) -> None:
    arguments = command(server.url, model, tmp_path / "eval", "--settings", "soft-sample")
    at = arguments.index("--out")
    arguments = arguments[:at] + arguments[at + 2 :]
    saved = tmp_path / "bench.json"
    assert bench.main([*arguments, "--rounds", "2", "--save", str(saved)]) == 0
    found = json.loads(saved.read_text())
    assert found["samples"] == 18 and [len(s) for s in found["seconds"].values()] == [2, 2]
    assert len(server.samples_sent) == 5 * 18
    assert len({seed for seed, _ in server.samples_sent}) == 18
    for refused in (
        ("--checkpoints", f"soft={model}"),
        ("--restore", str(model)),
        ("--out", str(tmp_path / "eval")),
        ("--kl.texts", str(saved)),
        ("--rounds", "1"),
    ):
        assert bench.main([*arguments, *refused]) == 1
    arguments[arguments.index("--rollout-url") + 1] = "http://127.0.0.1:9"
    assert bench.main([*arguments, "--retry-for", "0"]) == 1
    assert "stopped: " in capsys.readouterr().err
