"""vLLM's NCCL broadcast, through its own sender: the only file here that needs vllm installed.

Never run in this repository's tests, which have no GPU. A broadcast cannot be interrupted; it runs
in a thread that the process does not wait for, with a time limit outside.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from trainer.config import SyncConfig
from trainer.rollout_client import RolloutClient, ServerGone, ServerRefused
from trainer.sync.base import confirm, resume, served_version

REMEDY = 'use sync.method = "safetensors", which needs a folder both sides can read and no vllm'


@contextmanager
def paused(client: RolloutClient, timeout: float, apart: Callable[[], bool]) -> Iterator[None]:
    """The server stands still meanwhile and is woken afterwards, also after a failure.

    This back-end takes the model apart in `/start_weight_update` and receives into it, so the
    pause must cover the whole transfer: the server's own, in its last call, would come too late.

    Args:
        apart: whether the server's layers may be apart now; then it is not woken, since it would
            sample from them.

    Raises:
        ServerGone: a failure left the layers apart.
    """
    try:
        # In here: if only the answer is lost, the server is paused all the same.
        client.call("POST", "/pause", params={"mode": "keep"}, timeout=timeout, retry=True)
        yield
    except BaseException as trouble:
        if apart():
            words = str(trouble) or type(trouble).__name__
            raise ServerGone(
                f"the transfer failed when the server's layers were apart ({words}); it is left "
                "paused: restart the server, then the trainer with --resume"
            ) from trouble
        with suppress(ServerGone, ServerRefused):  # what led here says more
            resume(client, timeout)
        raise
    resume(client, timeout)


class _Routes:
    """The four control routes with the trainer's key and patience (vLLM's client knows no key)."""

    def __init__(self, client: RolloutClient, timeout: float) -> None:
        self._client, self._timeout = client, timeout
        self.version: str | None = None
        self.apart = False
        """Whether the server's layers are apart, or may be: an answer was lost."""

    def _post(self, path: str, json: Any = None) -> None:
        self._client.call("POST", path, json=json, timeout=self._timeout)

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._post("/init_weight_transfer_engine", {"init_info": init_info})

    def shutdown_weight_transfer_engine(self) -> None:
        self._post("/shutdown_weight_transfer_engine")

    def start_weight_update(self) -> None:
        self.apart = True
        try:
            self._post("/start_weight_update")
        except ServerRefused:
            self.apart = False
            raise

    def update_weights(self, update_info: Any) -> None:
        self._post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._post("/finish_weight_update", {"weight_version": weight_version or self.version})
        self.apart = False


class NcclSync:
    """Rank 0 of a process group with the server's workers.

    Raises:
        ValueError: vllm or a GPU is missing here.
    """

    checks_versions = True
    served_model: str | None = None

    def __init__(self, client: RolloutClient, config: SyncConfig) -> None:
        import torch

        try:
            from vllm.distributed import weight_transfer
        except ImportError:
            raise ValueError(f"sync.method = nccl needs vllm installed here; or {REMEDY}") from None
        if not torch.cuda.is_available():
            raise ValueError(f"sync.method = nccl needs a GPU in the trainer; or {REMEDY}")
        self.client, self.config, self._vllm = client, config, weight_transfer
        self._routes = _Routes(client, config.timeout)
        self._engine: Any = None
        self._version: str | None = None

    def push(self, version: str, model: Any) -> dict[str, float]:
        start = time.monotonic()
        self._routes.version = version
        with paused(self.client, self.config.timeout, lambda: self._routes.apart):
            began = time.monotonic()
            self._within_limit(lambda: self._send(model))
            stood = time.monotonic() - began
        confirm(self.client, version)
        self._version = version
        return {"write": 0.0, "paused": stood, "total": time.monotonic() - start}

    def recover(self) -> None:
        resume(self.client, self.config.timeout)
        served = served_version(self.client)
        if served != self._version:
            raise ServerGone(
                f"the server restarted and serves {served!r}; its NCCL group is lost: start the "
                "trainer again with --resume"
            )

    def _send(self, model: Any) -> None:
        if self._engine is None:
            from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

            answer = self.client.call("GET", "/get_world_size", retry=True)
            self._routes.shutdown_weight_transfer_engine()  # of a trainer that died
            self._engine = self._vllm.WeightTransferTrainerFactory.trainer_init(
                init_info=NCCLTrainerInitInfo(
                    master_address=self.config.nccl_address,
                    master_port=self.config.nccl_port,
                    world_size=int(answer["world_size"]) + 1,
                    rank=0,
                ),
                client=self._routes,
                source=self._vllm.ModuleSource(model),
            )
        self._engine.send_weights()

    def _within_limit(self, work: Any) -> None:
        failure: list[BaseException] = []

        def run() -> None:
            try:
                work()
            except BaseException as error:
                failure.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(self.config.timeout)
        if thread.is_alive():
            raise ServerGone(
                f"the NCCL transfer did not finish in {self.config.timeout:.0f} s; check that the "
                f"server's workers reach {self.config.nccl_address}:{self.config.nccl_port}"
            )
        if failure:
            raise failure[0]
