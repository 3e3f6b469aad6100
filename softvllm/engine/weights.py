"""Weight-transfer back-end `safetensors`: new weights from a folder on a shared file system.

Fits vLLM's four phases so that the model is touched in the last one only:

    init    nothing
    start   nothing (NCCL's back-end takes the model apart here, which cannot be undone)
    update  the folder is opened and checked whole; the model is not touched
    finish  the checked folder is loaded; if that fails, the model is put back as it was

A worker that raised in the middle of a collective call would leave the other workers' answers in
their queues, where vLLM would take them for answers to the next call. So nothing raises here: a
failure is kept in `verdict`, and `engine/update.py`, which hears all workers, decides.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from softvllm.core.weight_folder import WeightFolder, WeightFolderError, check_weights
from softvllm.engine.expected import OUTPUT, compare, served_tensors, tied_mismatch

logger = logging.getLogger("vllm.softvllm")  # vLLM's handlers show its own children only


@dataclass
class FolderInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class FolderUpdate(WeightTransferUpdateInfo):
    """`update_info` of `/update_weights`."""

    path: str
    """Absolute path of the folder, as the server sees it."""
    checksums: dict[str, str] = field(default_factory=dict)
    """SHA-256 in hexadecimal by file name; files left out are checked for size only."""

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise WeightFolderError('update_info needs "path", the absolute path of the folder')
        pairs = self.checksums.items() if isinstance(self.checksums, dict) else ((0, 0),)
        if not all(isinstance(text, str) for pair in pairs for text in pair):
            raise WeightFolderError('"checksums" must be an object {file name: SHA-256}')


class FolderEngine(WeightTransferEngine[FolderInit, FolderUpdate]):
    """One worker's side of the back-end."""

    init_info_cls = FolderInit
    update_info_cls = FolderUpdate
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: Any) -> None:
        super().__init__(config, vllm_config, device, model)
        self.expected = served_tensors(vllm_config)
        text_config = vllm_config.model_config.hf_config.get_text_config()
        self.tied = bool(getattr(text_config, "tie_word_embeddings", False))
        self.verdict: str | None = None
        """Why the last step failed on this worker."""
        self.version: str | None = None
        """Version of the staged folder: its metadata's `weight_version`, else its name."""
        self._staged: WeightFolder | None = None
        self._before: Snapshot | None = None

    def init_transfer_engine(self, init_info: FolderInit) -> None:
        pass

    def start_weight_update(self) -> None:
        self.settle(keep=True)
        self.verdict = None

    def update_weights(self, update_info: Any) -> None:
        """Open and check the folder; see `verdict`."""
        try:
            self.receive_weights(self.parse_update_info(update_info))
        except ValueError as error:
            self.verdict = str(error)
        except Exception as error:
            logger.exception("cannot check the new weights")
            self.verdict = f"cannot check the folder: {type(error).__name__}: {error}"

    def receive_weights(self, update_info: FolderUpdate) -> None:
        folder = check_weights(update_info.path, update_info.checksums)
        try:
            problems, narrowed = compare(
                self.expected, folder.entries, self.model_config.dtype, self.tied
            )
            if not problems and self.tied and OUTPUT in folder.entries:
                problems = tied_mismatch(folder, self.expected)
            if problems:
                raise WeightFolderError(
                    f"the weights in {folder.path} do not fit the served model: "
                    f"{'; '.join(problems)}. Write what model.save_pretrained writes for the "
                    "checkpoint the server was started from"
                )
            # One request on such weights would leave NaN in cache blocks, and vLLM's CPU attention
            # multiplies what a block holds beyond its last token by 0, which keeps a NaN: later
            # requests would be wrong even after good weights are back.
            broken = folder.not_finite()
            if broken:
                raise WeightFolderError(
                    f"the weights in {folder.path} are not finite: {broken[0]} and "
                    f"{len(broken) - 1} other tensors hold NaN or infinity. The run that wrote "
                    "them has diverged; go back to its last good checkpoint"
                )
        except BaseException:
            folder.close()
            raise
        if narrowed:
            logger.info(
                "%d float32 tensors of %s are rounded to %s",
                narrowed,
                folder.path,
                self.model_config.dtype,
            )
        self._staged = folder
        self.version = str(folder.metadata.get("weight_version", folder.path.name))

    def finish_weight_update(self) -> None:
        """Load the checked folder, or put the model back as it was; see `verdict`."""
        assert self._staged is not None
        snapshot = None
        try:
            self._staged.check_unchanged()
            snapshot = Snapshot(self.model)
            self._load()
        except Exception as error:
            logger.exception("cannot load the new weights; the old ones stay")
            self.verdict = f"{type(error).__name__}: {error}"
            if snapshot is not None:
                snapshot.restore()
        else:
            self._before = snapshot
        finally:
            self._synchronize()

    def _load(self) -> None:
        from vllm.model_executor.model_loader.reload import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
        )

        initialize_layerwise_reload(self.model)
        self.model.load_weights(self._tensors())
        finalize_layerwise_reload(self.model, self.model_config)
        repack_shared(self.model)

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        assert self._staged is not None
        for name, tensor in self._staged.tensors():
            if not (self.tied and name == OUTPUT):
                yield name, tensor

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def settle(self, keep: bool) -> None:
        """End the update: keep the weights as they are now, or go back to those before it."""
        if not keep and self._before is not None:
            self._before.restore()
            self._synchronize()
        if self._staged is not None:
            self._staged.close()
        self._staged = self._before = None

    def shutdown(self) -> None:
        self.settle(keep=True)


class Snapshot:
    """A model's tensors (copied to host memory) and structure, to go back to bit for bit.

    Reloading exchanges parameters, and CPU kernels keep packed weights in attributes of their
    layers; so every module's attributes are remembered, not only its parameters.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

        self._layer_info = get_layerwise_info
        self._modules = [
            (
                module,
                dict(module.__dict__),
                dict(module._parameters),
                dict(module._buffers),
                set(module._non_persistent_buffers_set),
            )
            for module in model.modules()
        ]
        tensors = {
            id(tensor): tensor
            for _, _, parameters, buffers, _ in self._modules
            for tensor in (*parameters.values(), *buffers.values())
            if tensor is not None
        }
        # A buffer may be a view of a parameter: the copies agree, so order does not matter.
        self._values = [
            (tensor, tensor.data, tensor.detach().to("cpu", copy=True))
            for tensor in tensors.values()
        ]

    @torch.no_grad()
    def restore(self) -> None:
        for module, attributes, parameters, buffers, non_persistent in self._modules:
            self._layer_info(module).reset()
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(non_persistent)
        for tensor, data, value in self._values:
            tensor.data = data
            data.copy_(value)


def weights_changed(runner: Any) -> None:
    """What softvllm does on a worker whose weights changed, whichever way."""
    core = getattr(runner, "softvllm_core", None)
    if core is not None:
        repack_shared(runner.get_model())
        core.refresh_weights()


def repack_shared(model: torch.nn.Module) -> None:
    """Renew the packed copies that vLLM's CPU kernels keep of tied output weights.

    Reloading packs a layer anew when its weights arrive. Tied output weights arrive with the
    embedding, so their own layer would go on with the copy of the old ones.
    """
    owners: dict[int, list[Any]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None and weight.device.type == "cpu" and hasattr(module, "cpu_linear"):
            owners.setdefault(id(weight), []).append(module)
    for modules in owners.values():
        if len(modules) > 1:
            for module in modules:
                module.quant_method.process_weights_after_loading(module)
