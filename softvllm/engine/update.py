"""The engine core's side of a weight update: order of the steps, one verdict for all workers.

Each engine core has one `UpdateSession`, which sees the calls `start_weight_update`,
`update_weights` and `finish_weight_update` on their way to the workers, whoever makes them (HTTP
routes, `AsyncLLM`, `LLM`). It refuses what is out of order before a worker hears of it, and for
our back-end it turns the workers' verdicts into one: either all workers take the new weights or
all keep the old ones. After a finished update it drops what the caches computed from old weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from softvllm.engine.keys import engine_options

BACKEND = "safetensors"
"""Name of our back-end (`engine/weights.py`) in `--weight-transfer-config`."""
ABORT = "softvllm_abort_weight_update"
"""A call of our own: give up the update that is under way; fine if there is none."""


class UpdateRefusedError(ValueError):
    """A refused step. Its text crosses process borders and `find` gets it back there.

    `status` is HTTP's: 400 the folder is at fault, 409 the order of calls, 500 loading failed.
    In every case the old weights are in service.
    """

    _PATTERN = re.compile(r"weight update refused \((\d{3})\): (.*)", re.DOTALL)

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"weight update refused ({status}): {reason}")
        self.status, self.reason = status, reason

    @classmethod
    def find(cls, error: BaseException) -> UpdateRefusedError | None:
        """The refusal in an error that another process reported, if it is one."""
        match = cls._PATTERN.search(str(error))
        return cls(int(match[1]), match[2]) if match else None


class Core(Protocol):
    """What a session needs of the engine core."""

    def workers(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call function(worker, *args) on every worker."""

    def obstacle(self) -> str | None:
        """Why weights cannot change right now."""

    def updated(self, version: str | None) -> None:
        """New weights are in service: drop stale caches, set the version."""


class EngineSide:
    """`Core` over vLLM's `EngineCore`."""

    def __init__(self, engine_core: Any) -> None:
        self.engine_core = engine_core

    def workers(self, function: Callable[..., Any], *args: Any) -> list[Any]:
        return self.engine_core.model_executor.collective_rpc(function, args=args)

    def obstacle(self) -> str | None:
        core = self.engine_core
        if "weights" in core.model_executor.sleeping_tags:
            return "the weights are asleep: call /wake_up first"
        if core.scheduler.has_unfinished_requests() and not core.is_scheduler_paused():
            return "requests are running: call /pause?mode=keep first, and /resume afterwards"
        return None

    def updated(self, version: str | None) -> None:
        # Running requests give their blocks back and are computed anew when they resume: their
        # keys and values, like the cached ones, come from the old weights.
        self.engine_core._reset_caches()
        if version is not None:
            self.engine_core.set_weight_version(version)


def session_of(engine_core: Any) -> UpdateSession | None:
    """The engine core's session; None where neither softvllm nor its back-end is in use."""
    session = getattr(engine_core, "softvllm_session", None)
    if session is None:
        config = engine_core.vllm_config
        transfer = config.weight_transfer_config
        is_folder = transfer is not None and transfer.backend == BACKEND
        if not is_folder and engine_options(config) is None:
            return None
        session = UpdateSession(EngineSide(engine_core), is_folder)
        engine_core.softvllm_session = session
    return session


class UpdateSession:
    """Where the update under way stands.

    Args:
        core: the engine core.
        is_folder: whether the back-end is ours, which can be undone at any step.
    """

    def __init__(self, core: Core, is_folder: bool) -> None:
        self.core, self.is_folder = core, is_folder
        self.started = self.received = False
        self._steps: dict[str, Callable[[Callable[[], Any], Mapping[str, Any]], Any]] = {
            "init_weight_transfer_engine": self._init,
            "shutdown_weight_transfer_engine": self._shutdown,
            "start_weight_update": self._start,
            "start_draft_weight_update": self._start_draft,
            "update_weights": self._update,
            "finish_weight_update": self._finish,
        }

    def call(
        self, method: Any, send: Callable[[], Any], kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Handle one collective call with these arguments; `send` passes it on to the workers.

        Raises:
            UpdateRefusedError: out of order or, by our back-end, refused by a worker.
        """
        if method == ABORT:
            return self._abort()
        step = self._steps.get(method) if isinstance(method, str) else None
        return send() if step is None else step(send, kwargs or {})

    # With our back-end, what a worker would raise over is refused before it gets there: see
    # `engine/weights.py`.

    def _init(self, send: Callable[[], Any], kwargs: Mapping[str, Any]) -> Any:
        if not self.is_folder:
            return send()
        if kwargs.get("init_info"):
            raise UpdateRefusedError(400, "this back-end needs no init_info; leave it out")
        return None

    def _shutdown(self, send: Callable[[], Any], kwargs: Mapping[str, Any]) -> Any:
        if self.started:
            raise UpdateRefusedError(409, "an update is under way: finish it or give it up first")
        return send()

    def _start(self, send: Callable[[], Any], kwargs: Mapping[str, Any]) -> Any:
        if self.started:
            raise UpdateRefusedError(
                409,
                "an update is under way already: finish it with /finish_weight_update or give it "
                "up with /abort_weight_update",
            )
        result = send()
        self.started, self.received = True, False
        return result

    def _start_draft(self, send: Callable[[], Any], kwargs: Mapping[str, Any]) -> Any:
        if self.is_folder:
            raise UpdateRefusedError(409, "this back-end has no draft models to update")
        return self._start(send, kwargs)

    def _update(self, send: Callable[[], Any], kwargs: Mapping[str, Any]) -> Any:
        if not self.started:
            raise UpdateRefusedError(409, "no update is under way: call /start_weight_update first")
        if self.is_folder and self.received:
            raise UpdateRefusedError(
                409,
                "this update has its folder already: call /finish_weight_update, or "
                "/abort_weight_update to begin anew",
            )
        if self.is_folder and not isinstance(kwargs.get("update_info"), dict):
            self._give_up()
            raise UpdateRefusedError(
                400, 'update_info must be an object {"path": DIR}, the same for all ranks'
            )
        try:
            result = send()
        except BaseException:
            self.started = False  # as vLLM's worker does
            raise
        self._judge(400)
        self.received = True
        return result

    def _finish(self, send: Callable[[], Any], kwargs: Mapping[str, Any]) -> Any:
        if not self.started:
            raise UpdateRefusedError(409, "no update is under way: call /start_weight_update first")
        if not self.received:
            raise UpdateRefusedError(
                409,
                "no weights were given: call /update_weights first, or /abort_weight_update to "
                "end the update",
            )
        obstacle = self.core.obstacle()
        if obstacle is not None:
            raise UpdateRefusedError(409, obstacle)
        try:
            result = send()
        except BaseException:
            self.started = False
            if self.is_folder:
                self._give_up()
            raise
        self._judge(500)
        self.started = False
        version = None
        if self.is_folder:
            version = self.core.workers(settle, True)[0]
        self.core.updated(version)
        return result

    def _abort(self) -> None:
        if self.started and not self.is_folder:
            raise UpdateRefusedError(
                409, "this back-end has begun to overwrite the model; send all weights and finish"
            )
        if self.started:
            self._give_up()

    def _judge(self, status: int) -> None:
        """Raise if a worker failed, after all of them are back at the old weights."""
        if not self.is_folder:
            return
        verdicts = [v for v in self.core.workers(verdict) if v is not None]
        if verdicts:
            self._give_up()
            raise UpdateRefusedError(status, verdicts[0])

    def _give_up(self) -> None:
        self.core.workers(settle, False)
        self.started = self.received = False


# ---- run in the workers ------------------------------------------------------------------------


def verdict(worker: Any) -> str | None:
    """Why this worker's last step failed."""
    return worker.weight_transfer_engine.verdict


def settle(worker: Any, keep: bool) -> str | None:
    """End the update on this worker; returns the version of its folder."""
    worker = getattr(worker, "worker", worker)  # vLLM hands out its wrapper
    engine = worker.weight_transfer_engine
    engine.settle(keep)
    worker._weight_update_active = False
    if not keep:
        from softvllm.engine.weights import weights_changed

        weights_changed(worker.model_runner)
    return engine.version
