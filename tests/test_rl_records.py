"""Recorded rollouts give back what was recorded; what people are shown holds no password."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import patience, records
from trainer.config import Config
from trainer.config_file import to_toml
from trainer.data import Problem
from trainer.records import Record
from trainer.rollout_client import RolloutClient, ServerGone
from trainer.sync.base import patiently

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


def record(metadata: dict[str, Any]) -> Record:
    return Record(3, [Problem("p", "q?", "1", metadata)], [[1, 2]], "v", b"\x00frames", 1, 4)


@given(st.dictionaries(st.text(), plain, max_size=4))
def test_a_record_is_what_it_was_whatever_json_its_problems_hold(metadata: dict[str, Any]) -> None:
    whole = record({**metadata, "id": 2**200})  # msgpack ends at 64 bits
    assert records.decode(records.encode(whole)) == whole


def test_records_of_another_kind_are_refused(tmp_path: Path) -> None:
    records.write(tmp_path, record({}))
    file = tmp_path / "step_000003.msgpack"
    for data, words in (
        (msgspec.msgpack.encode({"format": 1, "problems": []}), "format 1; this trainer reads 2"),
        (msgspec.msgpack.encode([1]), "not a record"),
        (file.read_bytes()[:-3], "not a record"),
    ):
        file.write_bytes(data)
        with pytest.raises(ValueError, match=words):
            records.read(tmp_path, 3)


def test_a_saved_configuration_holds_no_password() -> None:
    text = to_toml(Config(rollout_url="http://me:secret@host:8000"))
    assert 'rollout_url = "http://host:8000"' in text and "secret" not in text


def test_sending_weights_counts_its_patience_from_the_first_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(patience.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)
    said: list[str] = []
    client = RolloutClient("http://127.0.0.1:1", retry_for=10.0, say=said.append)
    tries: list[float] = []

    def attempt() -> str:
        tries.append(now[0])
        now[0] += 50.0 if len(tries) == 1 else 4.0  # the first one waits for its timeout
        if len(tries) < 3:
            raise ServerGone("no answer")
        return "sent"

    assert patiently(client, "weights", attempt) == "sent"
    assert len(tries) == 3 and len(said) == 2 and "beginning anew" in said[0]
    tries.clear()
    monkeypatch.setattr(client, "retry_for", 3.0)
    with pytest.raises(ServerGone, match="no answer"):
        patiently(client, "weights", attempt)
    assert len(tries) == 2
    client.close()
