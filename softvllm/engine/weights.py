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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from softvllm.core.weight_folder import (
    DTYPES,
    TensorEntry,
    WeightFolder,
    WeightFolderError,
    check_weights,
    open_file,
    read_header,
)

BACKEND = "safetensors"
OUTPUT = "lm_head.weight"
_FLOATS = ("F32", "F16", "BF16")
_SHOWN = 5
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
            if not isinstance(update_info, Mapping):
                raise WeightFolderError('update_info must be {"path": DIR}, the same for all ranks')
            self.receive_weights(self.parse_update_info(dict(update_info)))
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
        from vllm.model_executor.model_loader.reload import get_layerwise_info

        for module, attributes, parameters, buffers, non_persistent in self._modules:
            get_layerwise_info(module).reset()
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for target, source in (
                (module._parameters, parameters),
                (module._buffers, buffers),
            ):
                target.clear()
                target.update(source)
            module._non_persistent_buffers_set.clear()
            module._non_persistent_buffers_set.update(non_persistent)
        for tensor, data, value in self._values:
            tensor.data = data
            data.copy_(value)


def served_tensors(vllm_config: Any) -> dict[str, TensorEntry]:
    """Names, shapes and dtypes of the checkpoint the server was started from.

    vLLM fuses and renames parameters, so its own names say little about a checkpoint's.

    Raises:
        ValueError: the model was not loaded from safetensors files.
    """
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

    loader = get_model_loader(vllm_config.load_config)
    files: list[str] = []
    if isinstance(loader, DefaultModelLoader):
        model = vllm_config.model_config
        _, files, usable, _ = loader._prepare_weights(
            model.model,
            subfolder=None,
            revision=model.revision,
            fall_back_to_pt=False,
            allow_patterns_overrides=None,
        )
        files = files if usable else []
    if not files:
        raise ValueError(
            f"weight transfer with back-end {BACKEND} needs a model loaded from safetensors files, "
            f"to know which tensors to expect; {vllm_config.model_config.model} (load format "
            f"{vllm_config.load_config.load_format}) is not. Save it with save_pretrained first"
        )
    found: dict[str, TensorEntry] = {}
    for file in files:
        with open_file(file) as handle:
            found.update(read_header(handle, file))
    return found


def compare(
    expected: Mapping[str, TensorEntry],
    found: Mapping[str, TensorEntry],
    served: torch.dtype,
    tied: bool,
) -> tuple[list[str], int]:
    """What is wrong with the tensors found (empty: nothing), and how many will be rounded.

    A dtype fits if it is the served model's or the started checkpoint's, or float32 for a model
    served in half precision. Output weights tied to the embedding may be there or not, and so may
    the rotary frequencies of old checkpoints, which no engine reads.
    """
    served_name = next(name for name, dtype in DTYPES.items() if dtype == served)

    def optional(name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (tied and name == OUTPUT)

    missing = [n for n in expected if n not in found and not optional(n)]
    extra = [n for n in found if n not in expected and not optional(n)]
    shapes, dtypes, narrowed = [], [], 0
    for name, entry in found.items():
        wanted = expected.get(name)
        if wanted is None:
            continue
        if entry.shape != wanted.shape:
            shapes.append(f"{name} is {list(entry.shape)} instead of {list(wanted.shape)}")
        as_served = entry.dtype in (served_name, "F32") and wanted.dtype in _FLOATS
        if entry.dtype != wanted.dtype and not as_served:
            dtypes.append(f"{name} is {entry.dtype} instead of {wanted.dtype}")
        narrowed += entry.dtype == "F32" and served_name in ("BF16", "F16")
    problems = []
    for what, items in (
        ("missing", missing),
        ("not in the model", extra),
        ("wrong shape", shapes),
        ("wrong dtype", dtypes),
    ):
        if items:
            more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
            problems.append(f"{what}: {', '.join(items[:_SHOWN])}{more}")
    return problems, narrowed


def tied_mismatch(folder: WeightFolder, expected: Mapping[str, TensorEntry]) -> list[str]:
    """Output weights of a tied model must be the embedding, since they are not loaded."""
    output = folder.entries[OUTPUT]
    twins = [n for n in expected if n.endswith(("embed_tokens.weight", "wte.weight"))]
    if len(twins) != 1:
        return [f"{OUTPUT} cannot be told from the embedding it is tied to; leave it out"]
    twin = folder.entries[twins[0]]
    same = (output.shape, output.dtype) == (twin.shape, twin.dtype)
    if same:
        raw = folder.read(OUTPUT).view(torch.uint8), folder.read(twins[0]).view(torch.uint8)
        same = torch.equal(*raw)
    if same:
        return []
    return [f"{OUTPUT} differs from {twins[0]}, but the served model ties them; leave it out"]
