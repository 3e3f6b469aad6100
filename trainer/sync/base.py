"""What the loop wants of a way to send weights, and what the ways share."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol, TypeVar

import torch

from trainer.patience import Patience, Progress
from trainer.ranks import full
from trainer.rollout_client import RolloutClient, ServerGone, ServerRefused

RESUME_ATTEMPTS = 5
T = TypeVar("T")


def patiently(client: RolloutClient, what: str, attempt: Callable[[], T]) -> T:
    """The result of `attempt`, which may be repeated, begun anew for `client.retry_for` seconds
    after its first failure while the server is away.

    Raises:
        ServerGone: it stayed away.
    """
    patience = Patience(client.retry_for, client.say, Progress())
    while True:
        try:
            return attempt()
        except ServerGone as trouble:
            patience.wait(ServerGone(f"sending {what}: {trouble}; beginning anew"))


class WeightSync(Protocol):
    """A way to the server. `version` names weights; every sample's trace carries the name."""

    def push(self, version: str, model: Any) -> dict[str, float]:
        """Put the model's weights in service and make sure they are.

        Returns:
            Seconds by phase; `paused` is how long the server stood still.

        Raises:
            ServerRefused, ServerGone: the weights are not in service.
        """

    def recover(self) -> None:
        """Before a retry: wake a paused server, give a restarted one the last weights again."""

    @property
    def checks_versions(self) -> bool:
        """Whether samples carry the version that was pushed."""

    @property
    def served_model(self) -> str | None:
        """Name to ask for in rollouts; None: the base model."""


class NoSync:
    """The server keeps its weights: recorded rollouts, tests, distillation from a fixed policy."""

    checks_versions = False
    served_model: str | None = None

    def push(self, version: str, model: Any) -> dict[str, float]:
        return {}

    def recover(self) -> None:
        pass


class Following(NoSync):
    """On a rank that does not lead: hands over its shards while rank 0 writes them."""

    def push(self, version: str, model: Any) -> dict[str, float]:
        for _ in named_weights(model, None)():
            pass
        return {}


def wake(client: RolloutClient, timeout: float) -> None:
    """Resume a server that something left paused, such as a trainer that was killed."""
    answer = client.call("GET", "/is_paused", retry=True)
    if isinstance(answer, dict) and answer.get("is_paused"):
        resume(client, timeout)


def resume(client: RolloutClient, timeout: float) -> None:
    """Wake the server; a lost `/resume` would leave it paused for ever, so try a few times."""
    for attempt in range(RESUME_ATTEMPTS):
        try:
            client.call("POST", "/resume", timeout=timeout)
            return
        except ServerGone:
            if attempt == RESUME_ATTEMPTS - 1:
                raise
            time.sleep(0.2 * 2**attempt)


def served_version(client: RolloutClient) -> str | None:
    """The weight version in service."""
    answer = client.call("GET", "/weight_info", retry=True)
    version = answer.get("weight_version") if isinstance(answer, dict) else None
    return None if version is None else str(version)


def confirm(client: RolloutClient, version: str) -> None:
    """Raise `ServerRefused` if the server does not serve this version."""
    served = served_version(client)
    if served != version:
        raise ServerRefused(
            f"the server serves weights {served!r} after an update to {version!r}; is another "
            "trainer using it?"
        )


def named_weights(
    model: Any, dtype: torch.dtype | None, rounded: torch.dtype | None = None
) -> Callable[[], Iterator[Any]]:
    """(checkpoint name, tensor) of all parameters and saved buffers, tied ones once.

    Tensors are whole; where they are sharded, all ranks must go through the list together.

    Args:
        dtype: the type wanted; None: as they are.
        rounded: the type that passes compute in, where what is kept has more bits.
    """

    def pairs() -> Iterator[tuple[str, torch.Tensor]]:
        parameters = dict(model.named_parameters())  # tied ones appear once
        saved = model.state_dict()
        for name, tensor in parameters.items():
            whole = full(tensor.detach()).to(rounded or tensor.dtype)
            yield name, whole.to(dtype or whole.dtype)
        for name, buffer in model.named_buffers():
            if name in saved and name not in parameters:
                yield name, buffer

    return pairs
