"""The out-of-domain part of an evaluation: multiple choice and KL of every checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from trainer import setup
from trainer.eval import checkpoints as ckpt
from trainer.eval import choice, likelihood
from trainer.eval.checkpoints import Checkpoint
from trainer.eval.config import EvalConfig
from trainer.eval.store import ChoiceRow, KlRow, Store


class Likelihoods:
    """Plans and makes the rows; loads models only where rows are missing.

    Args:
        base: folder or name of the base model; None where it is not known.

    Raises:
        ValueError: data or base model are missing.
    """

    def __init__(
        self, config: EvalConfig, checkpoints: Sequence[Checkpoint], base: str | None, out: Path
    ) -> None:
        self.config, self.checkpoints, self.base, self.out = config, checkpoints, base, out
        self.sets: dict[str, list[choice.Item]] = {}
        self.texts: list[tuple[str, str]] = []
        self.digests: dict[str, str] = {}
        """Of the whole content of each set, and of the texts: rows are bound to it."""
        self.base_weights: str | None = None
        self.tokenizer: Any = None
        """The base model's, where there are texts."""
        if not config.choice.sets and not config.kl.texts:
            return
        if config.kl.texts and base is None:
            raise ValueError(
                "kl.texts measures from the base model: give --model.path, or its folder as "
                "--checkpoints none=FOLDER"
            )
        served = [c.name for c in checkpoints if c.folder is None]
        if served and config.model.path is None:
            raise ValueError(
                f"likelihoods of {served[0]} (served) need its folder: give --model.path, the "
                "model that the server was started with"
            )
        if served or config.kl.texts:
            assert base is not None
            self.base_weights = ckpt.base_weights(base)
        self._read()

    def _read(self) -> None:
        config = self.config
        for spec in config.choice.sets:
            name, items = choice.read(spec)
            if name in self.sets:
                raise ValueError(f"choice.sets names {name!r} twice; give one another NAME=FILE")
            self.sets[name] = choice.pick(items, config.choice.limit, config.seed)
            self.digests[f"choice-{name}"] = choice.digest(items)
        if config.kl.texts:
            self.texts, self.digests["kl"] = likelihood.texts(config.kl, config.seed)
            self.tokenizer = setup.load_tokenizer(str(self.base))
            likelihood.require_tokens(self.texts, self.tokenizer)

    @property
    def facts(self) -> dict[str, Any]:
        """What was read and measured from, for `results.json`."""
        given = (c.given for c in self.checkpoints if str(c.folder) == self.base)
        model = self.config.model.path or next(given, None)  # where it lies says nothing elsewhere
        base = {"model": model, "weights": self.base_weights} if self.base_weights else None
        return {"base": base, "content": self.digests}

    @property
    def total(self) -> int:
        """Rows of all checkpoints."""
        return len(self.checkpoints) * (sum(map(len, self.sets.values())) + len(self.texts))

    def run(self, tick: Callable[[], None]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Make what is missing; entries of `results.json` for choice and KL.

        Raises:
            ValueError: a folder has changed, or a choice is too short.
        """
        choices: list[dict[str, Any]] = []
        divergences: list[dict[str, Any]] = []
        reference: Any = None
        for checkpoint in self.checkpoints:
            loaded: list[Any] = []

            def model(of: Checkpoint = checkpoint, held: list[Any] = loaded) -> Any:
                if not held:
                    held.append(self._load(self._path(of), self._weights(of)))
                return held[0]

            for name, items in self.sets.items():
                rows = self._choice(checkpoint, name, items, model, tick)
                choices.append(self._entry(checkpoint, set=name) | self._numbers(rows))
            if self.texts:
                facts = {"max_tokens": self.config.kl.max_tokens, "base": self.base_weights}
                store = self._store(checkpoint, "kl", KlRow, **facts)
                keys = [(name, 0) for name, _ in self.texts]
                if store.missing(keys) and reference is None:
                    assert self.base is not None and self.base_weights is not None
                    reference = self._load(self.base, self.base_weights)
                self._kl(store, model, reference, tick)
                found = store.ordered(keys)
                numbers = likelihood.kl_numbers(
                    found, self.config.report.replicates, self.config.seed
                )
                divergences.append(self._entry(checkpoint) | numbers)
        return choices, divergences

    def _choice(
        self,
        checkpoint: Checkpoint,
        name: str,
        items: Sequence[choice.Item],
        model: Callable[[], Any],
        tick: Callable[[], None],
    ) -> list[ChoiceRow]:
        store = self._store(checkpoint, f"choice-{name}", ChoiceRow)
        missing = {key[0] for key in store.missing([(item.id, 0) for item in items])}
        tokenizer = setup.load_tokenizer(self._path(checkpoint)) if missing else None
        for item in items:
            if item.id in missing:
                store.append(likelihood.choice_row(model(), tokenizer, item))
            tick()
        store.close()
        return store.ordered([(item.id, 0) for item in items])

    def _kl(
        self, store: Store[KlRow], model: Callable[[], Any], base: Any, tick: Callable[[], None]
    ) -> None:
        missing = {key[0] for key in store.missing([(name, 0) for name, _ in self.texts])}
        for name, text in self.texts:
            if name in missing:
                ids = self.tokenizer(text)["input_ids"][: self.config.kl.max_tokens]
                assert len(ids) >= 2, "refused when they were read"
                store.append(likelihood.kl_row(model(), base, name, ids))
            tick()
        store.close()

    def _store(self, checkpoint: Checkpoint, name: str, kind: Any, **header: Any) -> Store[Any]:
        weights = checkpoint.weights if checkpoint.folder else f"base {self.base_weights}"
        header |= {"weights": weights, "dtype": self.config.model.dtype}
        header["content"] = self.digests[name]
        path = self.out / "likelihood" / checkpoint.name / f"{name}.jsonl"
        return Store(path, header, kind)

    def _load(self, path: str, weights: str) -> Any:
        model = likelihood.load_model(path, self.config.model)
        ckpt.require_unchanged(path, weights)  # afterwards: also what changed while it was read
        return model

    def _path(self, checkpoint: Checkpoint) -> str:
        return str(checkpoint.folder or self.base)

    def _weights(self, checkpoint: Checkpoint) -> str:
        return checkpoint.weights if checkpoint.folder else str(self.base_weights)

    def _numbers(self, rows: Sequence[ChoiceRow]) -> dict[str, Any]:
        return likelihood.choice_numbers(rows, self.config.report.replicates, self.config.seed)

    def _entry(self, checkpoint: Checkpoint, **more: str) -> dict[str, Any]:
        facts = {"checkpoint": checkpoint.name, "training": checkpoint.training}
        return {**facts, "training_seed": checkpoint.seed, **more}
