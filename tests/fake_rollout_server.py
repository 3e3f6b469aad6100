"""A rollout server on loopback: the documented routes over the oracle and a tiny model.

The policy is real (it takes new weights and samples from them), the engine is a plain loop. It
can be told to misbehave. `python tests/fake_rollout_server.py MODEL` serves from a process of its
own until its standard input closes.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from loopback_server import LoopbackServer
from transformers import AutoModelForCausalLM

from softvllm.core.embedding import embedding_rms
from softvllm.core.oracle import Oracle, shaped
from softvllm.core.params import CoTParams
from softvllm.core.phases import Phase
from softvllm.core.rollout import MEDIA_TYPE, End, Failure, Sample, Start, encode_frame
from softvllm.core.trace import Trace, encode
from softvllm.core.weight_folder import WeightFolderError, check_weights

BASE = "tiny"
"""Name of the model without an adapter."""


@dataclass
class Trouble:
    """What goes wrong. Counts are used up, one per request."""

    unavailable: int = 0
    """Rollout requests answered 503."""
    cut: list[int] = field(default_factory=list)
    """Each rollout request in turn: the connection drops after so many samples."""
    silent: int = 0
    """Rollout requests that never answer."""
    fail: dict[tuple[int, int], str] = field(default_factory=dict)
    """Samples that come as error frames with this code, once (`nan`: always)."""
    restart: int = 0
    """Rollout requests before which the server forgets its weights, as after a restart."""
    wrong_version: bool = False
    """Report another version than was set."""
    refuse_weights: str | None = None
    """Reason to refuse the next folder."""
    lose_resume: int = 0
    """Calls of /resume answered 503."""
    lose_finish: int = 0
    """Calls of /finish_weight_update that load and are answered 503."""
    lose_pause: int = 0
    """Calls of /pause that pause and are answered 503."""
    refuse_load: int = 0
    """Calls of /v1/load_lora_adapter answered 503 that do nothing."""
    lose_load: int = 0
    """Calls of /v1/load_lora_adapter that load and are answered 503."""
    no_versions: bool = False
    """Samples do not say which weights made them."""
    min_think: int = 0
    """min_think_tokens of the server's recipe, for requests that do not say."""
    tau_off: float = 1.0
    """Report a temperature so many times the one used."""
    enable_rl: bool = True
    modes: tuple[str, ...] = ("hard", "soft", "fuzzy", "mixed")


class FakeRolloutServer(LoopbackServer):
    """Runs in a thread, from `with` to its end."""

    def __init__(self, model: Path | str, **trouble: Any) -> None:
        self.path = str(model)
        self.oracle = Oracle.load(self.path)
        self.trouble = Trouble(**trouble)
        self.version = "default"
        self.versions: list[str] = []
        self.calls: list[str] = []
        self.samples_sent: list[tuple[int, str]] = []
        """(seed, version) of every sample that went out."""
        self.paused = False
        self.adapters: dict[str, Oracle] = {}
        """Merged into the model, by name."""
        self._staged: Any = None
        self._started = False
        self.listen(_Log(self._app(), self))

    def restart(self) -> None:
        """Forget pushed weights and state."""
        self.oracle = Oracle.load(self.path)
        self.adapters = {}
        self.version, self.paused, self._started, self._staged = "default", False, False, None

    def _app(self) -> FastAPI:
        app = FastAPI()
        for method, path, route in (
            ("GET", "/v1/cot/info", self._info),
            ("POST", "/v1/rollouts", self._rollouts),
            ("POST", "/pause", self._pause),
            ("POST", "/resume", self._resume),
            ("GET", "/is_paused", self._is_paused),
            ("GET", "/weight_info", self._weight_info),
            ("POST", "/abort_weight_update", self._abort),
            ("POST", "/start_weight_update", self._start),
            ("POST", "/update_weights", self._update),
            ("POST", "/finish_weight_update", self._finish),
            ("GET", "/v1/models", self._models),
            ("POST", "/v1/load_lora_adapter", self._load_adapter),
            ("POST", "/v1/unload_lora_adapter", self._unload_adapter),
        ):
            app.add_api_route(path, route, methods=[method])
        return app

    # ---- weights -----------------------------------------------------------------------------

    async def _pause(self) -> Any:
        self.paused = True
        if self.trouble.lose_pause:
            self.trouble.lose_pause -= 1
            return _error(503, "try later")
        return {}

    async def _resume(self) -> Any:
        if self.trouble.lose_resume:
            self.trouble.lose_resume -= 1
            return _error(503, "try later")
        self.paused = False
        return {}

    async def _is_paused(self) -> Any:
        return {"is_paused": self.paused}

    async def _weight_info(self) -> Any:
        return {"weight_version": "other" if self.trouble.wrong_version else self.version}

    async def _abort(self) -> Any:
        self._started = False
        return {}

    async def _start(self) -> Any:
        if self._started:
            return _error(409, "an update is under way already")
        self._started = True
        return {}

    async def _update(self, request: Request) -> Any:
        if not self._started:
            return _error(409, "no update is under way")
        if self.trouble.refuse_weights:
            reason, self.trouble.refuse_weights = self.trouble.refuse_weights, None
            self._started = False
            return _error(400, reason)
        path = (await request.json())["update_info"]["path"]
        try:
            with check_weights(path) as folder:
                self._staged = dict(folder.tensors())
        except WeightFolderError as error:
            return _error(400, str(error))
        return {}

    async def _finish(self, request: Request) -> Any:
        body = await request.json()
        pause = body.get("pause")
        if pause not in (None, "keep", "wait", "abort"):
            return _error(400, f"pause: {pause!r} is not keep, wait or abort")
        # A pause of its own ends with the call; it is not seen, as loading awaits nothing.
        if not (self.paused or pause) or self._staged is None:
            return _error(409, "requests are running, or no weights were given")
        missing, unexpected = self.oracle.model.load_state_dict(self._staged, strict=False)
        if unexpected or set(missing) - {"lm_head.weight"}:
            return _error(500, f"missing {missing}, unexpected {unexpected}")
        self.oracle.model.tie_weights()
        self.version = body["weight_version"]
        self.versions.append(self.version)
        self._started, self._staged = False, None
        if self.trouble.lose_finish:
            self.trouble.lose_finish -= 1
            return _error(503, "try later")
        return {}

    # ---- adapters, as vLLM's OpenAIServingModels has them ---------------------------------------

    async def _models(self) -> Any:
        return {"data": [{"id": name} for name in (BASE, *self.adapters)]}

    async def _load_adapter(self, request: Request) -> Any:
        body = await request.json()
        name, path = body["lora_name"], body["lora_path"]
        if self.trouble.refuse_load:
            self.trouble.refuse_load -= 1
            return _error(503, "try later")
        if name in self.adapters:
            return _error(400, f"The lora adapter '{name}' has already been loaded.")
        if not (Path(path) / "adapter_config.json").exists():
            return _error(404, f"No adapter found for '{path}'")
        self.adapters[name] = await asyncio.to_thread(self._merged, path)
        self.versions.append(name)
        if self.trouble.lose_load:
            self.trouble.lose_load -= 1
            return _error(503, "try later")
        return Response(f"Success: LoRA adapter '{name}' added successfully.")

    async def _unload_adapter(self, request: Request) -> Any:
        name = (await request.json())["lora_name"]
        if name not in self.adapters:
            return _error(404, f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        return Response(f"Success: LoRA adapter '{name}' removed successfully.")

    def _merged(self, path: str) -> Oracle:
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(self.path)
        model = PeftModel.from_pretrained(base, path).merge_and_unload()
        return Oracle(model, self.oracle.tokenizer)

    # ---- rollouts ----------------------------------------------------------------------------

    async def _info(self) -> Any:
        table = self.oracle.table
        return {
            "modes": list(self.trouble.modes),
            "refusal": None,
            "recipe": {"min_think_tokens": self.trouble.min_think},
            "embedding": {
                "rms": embedding_rms(table),
                "dim": table.shape[1],
                "vocab_size": len(table),
                "dtype": str(table.dtype).removeprefix("torch."),
            },
            "enable_rl": self.trouble.enable_rl,
            "weight_version": self.version,
        }

    async def _rollouts(self, request: Request) -> Response:
        trouble = self.trouble
        body = msgspec.msgpack.decode(await request.body())
        if trouble.unavailable:
            trouble.unavailable -= 1
            return _error(503, "engine_paused")
        if trouble.silent:
            trouble.silent -= 1
            await asyncio.sleep(600)
        if trouble.restart:
            trouble.restart -= 1
            self.restart()
        if self.paused:
            return _error(503, "engine_paused")
        if body.get("model", BASE) not in (BASE, *self.adapters):
            return _error(404, f"The model `{body['model']}` does not exist.")
        return StreamingResponse(self._frames(body), media_type=MEDIA_TYPE)

    async def _frames(self, body: dict[str, Any]) -> AsyncGenerator[bytes, None]:
        seeds, prompts = body["seeds"], body["prompts"]
        cut = self.trouble.cut.pop(0) if self.trouble.cut else None
        sent = errors = 0
        yield encode_frame(
            Start(request_id="r", model=BASE, num_prompts=len(prompts), num_samples=body["n"])
        )
        for i, row in enumerate(seeds):
            for k, seed in enumerate(row):
                if cut is not None and sent == cut:
                    data = encode_frame(End(samples=0, errors=0))
                    yield data[: len(data) // 2]  # half a frame, then nothing
                    raise ConnectionResetError("cut on demand")
                code = self.trouble.fail.get((i, k))
                if code is not None:
                    if code != "nan":
                        del self.trouble.fail[i, k]
                    errors += 1
                    yield encode_frame(Failure(prompt=i, sample=k, code=code, message="on demand"))
                    continue
                ids = prompts[i]["prompt_token_ids"]
                sample = await asyncio.to_thread(self._sample, i, k, ids, seed, body)
                yield encode_frame(sample)
                sent += 1
        yield encode_frame(End(samples=sent, errors=errors))

    def _sample(self, i: int, k: int, ids: list[int], seed: int, body: dict[str, Any]) -> Sample:
        least = {"min_think_tokens": self.trouble.min_think}
        given = {"mode": body["cot_mode"], **least, **body["cot"], "seed": seed}
        if given["mode"] == "mixed":
            given.setdefault("policy", "blend")
        params = CoTParams.from_dict(given)
        oracle = self.adapters.get(body.get("model", BASE), self.oracle)
        sparse = params.mode in ("soft", "fuzzy") and params.top_k > 0 and "record" not in given
        result = oracle.decode(
            ids,
            params,
            max_tokens=(params.max_think_tokens or 0) + 40 + (params.answer_max_tokens or 8),
            temperature=body["sampling"]["temperature"],
            keep_logits=sparse,
        )
        trace = result.trace
        if sparse:  # what the server records unless it is asked for something else
            _make_sparse(trace, result.logits)
        spans = [] if self.trouble.no_versions else [[self.version, 0, len(trace)]]
        trace.meta["weight_versions"] = spans
        trace.meta["tau"] *= self.trouble.tau_off
        if body["cot"].get("record") == "steps":
            trace.dense = None
        self.samples_sent.append((seed, self.version))
        think = int((trace.phase == Phase.THINK).sum())
        tokenizer = self.oracle.tokenizer
        thought = tokenizer.decode(result.token_ids[:think])
        return Sample(
            prompt=i,
            sample=k,
            prompt_ids=np.array(ids, "<i4").tobytes(),
            trace_bytes=encode(trace),
            text=thought + tokenizer.decode(result.token_ids[think:]),
            answer_start=len(thought),
            finish_reason="stop",
        )


class _Log:
    """Plain ASGI: notes every call."""

    def __init__(self, app: Any, server: FakeRolloutServer) -> None:
        self._app, self._fake = app, server

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self._fake.calls.append(scope["path"])
        await self._app(scope, receive, send)


def _make_sparse(trace: Trace, logits: torch.Tensor) -> None:
    """Tokens and weights of the mixtures in place of h~."""
    meta, at = trace.meta, trace.soft_positions
    p = [
        shaped(row, meta["tau"], meta["top_k"], meta["top_p"], meta["min_p"]) for row in logits[at]
    ]
    weights, ids = torch.stack(p).topk(meta["top_k"], dim=-1)
    meta["record"], trace.dense = "sparse", None
    trace.sparse_ids, trace.sparse_weights = ids.to(torch.int32).numpy(), weights.numpy()


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "code": status}}, status)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with FakeRolloutServer(sys.argv[1]) as server:
        print(server.url, flush=True)
        sys.stdin.read()
