"""Rollouts from a running `softvllm serve`: asked for once, received whole, never twice.

A server may restart, refuse for a while (503) or break a stream off. Whole samples that arrived
are kept; the missing ones are asked for again with their own seeds, so a repaired batch is the
batch that an undisturbed server would have sent. Patience is bounded and its end is an error that
says what the server said.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx2
import msgspec

from softvllm.core.rollout import MEDIA_TYPE, End, Failure, FrameReader, Sample, Start
from softvllm.core.trace import Trace
from trainer.patience import Patience, Progress
from trainer.rollout_request import Key, Piece, Request, Rollouts, pieces
from trainer.server_address import authorization, root_of, shown, unsendable
from trainer.server_words import Later, ServerGone, ServerRefused, check_server, judge, name_of

__all__ = [
    "Key",
    "Request",
    "RolloutClient",
    "Rollouts",
    "ServerGone",
    "ServerRefused",
    "check_server",
]

CONNECT_SECONDS = 10.0
ENGINE_RETRIES = 2
"""How often a sample that the engine gave up is asked for again. NaN is not: it would come back."""


class RolloutClient:
    """One server.

    Args:
        url: its root. Messages show it without user and password.
        api_key: the server's key; white space around it is ignored.
        timeout: seconds without a byte after which a request counts as lost.
        retry_for: seconds without progress, counted from the first failure, after which the run
            gives up.
        say: where a retry is announced.

    Raises:
        ValueError: the URL or the key can be no server's.
    """

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        retry_for: float = 300.0,
        say: Callable[[str], None] = print,
    ) -> None:
        root, headers = root_of(url), authorization(api_key)
        self.url = shown(root)
        self.retry_for, self.say = retry_for, say
        limits = httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS))
        self._http = httpx2.Client(base_url=root, headers=headers, timeout=limits)

    def close(self) -> None:
        self._http.close()

    # ---- single calls ----------------------------------------------------------------------------

    def call(
        self,
        method: str,
        path: str,
        *,
        json: Any = None,
        params: dict[str, str] | None = None,
        timeout: float | None = None,
        retry: bool = False,
        plain: bool = False,
    ) -> Any:
        """One JSON call.

        Args:
            retry: whether to go on trying while the server is away; only for calls that may be
                repeated.
            plain: the answer is a sentence, not JSON.

        Raises:
            ServerRefused: status 4xx, with the server's words, or the call cannot be sent at all.
            ServerGone: no answer or status 5xx.
        """
        wait = timeout if timeout is not None else httpx2.USE_CLIENT_DEFAULT

        def once() -> Any:
            try:
                answer = self._http.request(method, path, json=json, params=params, timeout=wait)
            except httpx2.LocalProtocolError:
                raise unsendable(self.url, path) from None
            except httpx2.TransportError as error:
                raise Later(f"{self.url}{path} does not answer ({name_of(error)})") from None
            judge(self.url, answer.status_code, answer.content, path)
            if plain:
                return answer.text
            try:
                return answer.json() if answer.content else None
            except ValueError:
                raise ServerRefused(
                    f"{self.url}{path} does not answer in JSON: is this a softvllm server?"
                ) from None

        patience = Patience(self.retry_for if retry else 0.0, self.say, Progress())
        while True:
            try:
                return once()
            except Later as trouble:
                patience.wait(trouble)

    def info(self) -> dict[str, Any]:
        """`GET /v1/cot/info`, waiting for a server that is still starting."""
        answer = self.call("GET", "/v1/cot/info", retry=True)
        return dict(answer)

    # ---- rollouts --------------------------------------------------------------------------------

    def generate(
        self,
        request: Request,
        on_sample: Callable[[Key, Sample], None] | None = None,
        recover: Callable[[], None] | None = None,
        progress: Progress | None = None,
    ) -> Rollouts:
        """All samples of a request, or the reason why one has none.

        Args:
            on_sample: called once for every sample, as it arrives (rewards begin here).
            recover: called before asking again: puts the right weights into a server that
                restarted and wakes one that was left paused.
            progress: shared by requests under way together, so that a sample of any of them renews
                the patience of all; None: this request's own samples do.

        Raises:
            ServerRefused: the request is wrong.
            ServerGone: no progress for `retry_for` seconds since the first failure.
            ValueError: the server answers something else than it was asked.
        """
        out = Rollouts()
        start = time.monotonic()
        wanted = {(i, k) for i, row in enumerate(request.seeds) for k in range(len(row))}
        given_up: Counter[Key] = Counter()
        progress = progress or Progress()
        patience = Patience(self.retry_for, self.say, progress)
        while missing := sorted(wanted - out.samples.keys() - out.failures.keys()):
            try:
                for piece in pieces(request, missing):
                    out.attempts += 1
                    self._attempt(request, piece, out, given_up, on_sample, progress)
                if wanted <= out.samples.keys() | out.failures.keys():
                    break
                raise Later("samples are missing though the stream ended in order")
            except Later as trouble:
                have = len(out.samples)
                patience.wait(Later(f"{trouble}; {have} of {len(wanted)} samples are here"))
                if recover is not None:
                    recover()
        out.seconds = time.monotonic() - start
        return out

    def _attempt(
        self,
        request: Request,
        piece: Piece,
        out: Rollouts,
        given_up: Counter[Key],
        on_sample: Callable[[Key, Sample], None] | None,
        progress: Progress,
    ) -> None:
        body = {
            **request.body,
            "n": len(piece.seeds[0]),
            "seeds": piece.seeds,
            "prompts": [{"prompt_token_ids": ids} for ids in piece.prompts],
        }
        reader = FrameReader()
        try:
            with self._http.stream(
                "POST",
                "/v1/rollouts",
                content=msgspec.msgpack.encode(body),
                headers={"Content-Type": "application/msgpack", "Accept": MEDIA_TYPE},
            ) as answer:
                if answer.status_code != 200:
                    words = answer.read()
                    if answer.status_code == 404 and body.get("model") is not None:
                        # A server that restarted knows no adapter; `recover` gives it back.
                        raise Later(
                            f"{self.url}/v1/rollouts knows no {body['model']!r} (404: "
                            f"{words[:300].decode(errors='replace')})"
                        )
                    judge(self.url, answer.status_code, words, "/v1/rollouts")
                kind = answer.headers.get("content-type", "")
                if not kind.startswith(MEDIA_TYPE):
                    raise ServerRefused(
                        f"{self.url}/v1/rollouts answers with {kind or 'no content type'}: is "
                        "this a softvllm server?"
                    )
                for data in answer.iter_bytes():
                    out.bytes += len(data)
                    for frame in reader.feed(data):
                        before = out.finished
                        self._take(frame, piece.keys, request, out, given_up, on_sample)
                        if out.finished > before:
                            progress.made()
        except httpx2.LocalProtocolError:
            raise unsendable(self.url, "/v1/rollouts") from None
        except httpx2.TransportError as error:
            raise Later(f"the rollout stream broke off ({name_of(error)})") from None
        if not reader.ended:
            raise Later("the rollout stream was cut")

    def _take(
        self,
        frame: Start | Sample | Failure | End,
        keys: dict[Key, Key],
        request: Request,
        out: Rollouts,
        given_up: Counter[Key],
        on_sample: Callable[[Key, Sample], None] | None,
    ) -> None:
        if isinstance(frame, (Start, End)):
            return
        if (frame.prompt, frame.sample) not in keys:
            raise ValueError(f"{self.url} sent a sample ({frame.prompt}, {frame.sample}) too many")
        key = keys[frame.prompt, frame.sample]
        if key in out.samples or key in out.failures:
            return  # a proxy repeated it
        frame.prompt, frame.sample = key
        if isinstance(frame, Failure):
            given_up[key] += 1
            if frame.code in ("aborted", "engine") and given_up[key] <= ENGINE_RETRIES:
                return  # missing: asked for again
            out.failures[key] = frame
            return
        trace = _trace(frame)
        if trace is None:
            out.failures[key] = Failure(
                prompt=key[0], sample=key[1], code="trace", message="the trace cannot be decoded"
            )
            return
        i, k = key
        if frame.prompt_token_ids.tolist() != request.prompts[i]:
            raise ValueError(f"{self.url} fed other prompt ids than it was given")
        if trace.meta.get("seed") != request.seeds[i][k]:
            raise ValueError(f"{self.url} used seed {trace.meta.get('seed')} for another")
        if request.version is not None:
            versions = {span[0] for span in trace.meta.get("weight_versions", ())}
            if not versions and len(trace):
                raise ValueError(
                    f"{self.url} sent a sample that does not say which weights made it, wanted "
                    f"{request.version!r}; use the server of the pinned vLLM, or sync.method = none"
                )
            if versions - {request.version}:
                raise Later(
                    f"samples come from weights {sorted(versions)}, wanted {request.version!r}"
                )
        out.samples[key] = frame
        if on_sample is not None:
            on_sample(key, frame)


def _trace(sample: Sample) -> Trace | None:
    try:
        return sample.trace
    except ValueError:
        return None
