"""What ``test_weights.py`` runs inside an engine process: ``engine.call("weight_probe:abort")``."""

from __future__ import annotations

from typing import Any

from engine_probe import core_of


def update(llm: Any, path: str, version: str | None = None, **info: Any) -> str:
    """One whole update; returns the version in service."""
    llm.start_weight_update()
    llm.update_weights({"update_info": {"path": path, **info}})
    llm.finish_weight_update(version)
    return llm.llm_engine.get_weight_version()


def step(llm: Any, name: str, *args: Any) -> None:
    """One step alone, such as `finish_weight_update`."""
    getattr(llm, name)(*args)


def abort(llm: Any) -> None:
    from softvllm.engine.update import ABORT

    llm.llm_engine.collective_rpc(ABORT)


def fingerprints(llm: Any) -> list[str]:
    """One hash over all parameters and buffers per worker."""
    return llm.llm_engine.collective_rpc("compute_weight_checksums")


def cut_between(llm: Any, path: str, file: str) -> None:
    """An update whose file loses its end after the check."""
    llm.start_weight_update()
    llm.update_weights({"update_info": {"path": path}})
    with open(f"{path}/{file}", "r+b") as handle:
        handle.truncate(1000)
    llm.finish_weight_update()


def removed_between(llm: Any, path: str) -> None:
    """An update whose folder is deleted after the check."""
    import shutil

    llm.start_weight_update()
    llm.update_weights({"update_info": {"path": path}})
    shutil.rmtree(path)
    llm.finish_weight_update()


def disk_fails(llm: Any, path: str, after: int) -> None:
    """An update whose check reads all tensors, and whose loading fails after some."""
    from softvllm.core.weight_folder import WeightFolder

    read, count = WeightFolder.read, 0

    def failing(self: Any, name: str) -> Any:
        nonlocal count
        count += 1
        if count > len(self.entries) + after:
            raise OSError("Input/output error")
        return read(self, name)

    WeightFolder.read = failing  # type: ignore[method-assign]
    try:
        update(llm, path)
    finally:
        WeightFolder.read = read  # type: ignore[method-assign]


def midway(
    llm: Any, params: Any, steps: int, path: str, version: str, pause: bool = True
) -> tuple[bytes, bytes]:
    """A request in flight across pause(keep), update, resume.

    Returns its encoded trace as streamed before the update, and at the end.
    """
    from softvllm.core.trace import encode

    engine, core = llm.llm_engine, core_of(llm)
    engine.add_request("midway", {"prompt_token_ids": [5, 6, 7, 8]}, params)
    seen: list[Any] = []
    for _ in range(steps):
        seen += engine.step()
    before = encode(seen[-1].outputs[0].cot.trace)
    if pause:
        core.pause_scheduler("keep", False)
    try:
        update(llm, path, version)
    finally:
        if pause:
            core.resume_scheduler()
        while engine.has_unfinished_requests():
            seen += engine.step()
    return before, encode(seen[-1].outputs[0].cot.trace)


def rms_in_use(llm: Any) -> float:
    """RMS of the table as the worker knows it."""
    from engine_probe import soft_core

    return soft_core(llm).table.rms()
