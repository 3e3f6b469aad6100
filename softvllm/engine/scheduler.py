"""The scheduler's part: keep the ledgers, replay preempted requests, bound the answer.

A mixin over whichever scheduler class vLLM chose (sync, async or a user's own); it overrides
four public methods and changes no decision of the scheduler itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from softvllm.core.phases import Phase
from softvllm.core.resolve import ResolvedCoT
from softvllm.engine.keys import WIRE_KEY, resolved_dict
from softvllm.engine.ledger import Ledger
from softvllm.engine.records import HostRecord

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.request import Request

RECORD_ATTR = "softvllm_record"
"""Attribute of `ModelRunnerOutput`: the step's `HostRecord`."""
REPLAY_ATTR = "softvllm_replays"
"""Attribute of `SchedulerOutput`: {request id: Replay} of requests resumed in this step."""
LEDGER_ATTR = "softvllm_ledger"
"""Attribute of `Request`: its `Ledger`."""


class SoftSchedulerMixin:
    """See the module docstring."""

    requests: dict[str, Request]

    def add_request(self, request: Request) -> None:
        raw = resolved_dict(request.sampling_params)
        if raw is not None and request.request_id not in self.requests:
            setattr(request, LEDGER_ATTR, Ledger(ResolvedCoT.from_dict(raw)))
        super().add_request(request)  # type: ignore[misc]

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)  # type: ignore[misc]
        resumed = set(output.scheduled_cached_reqs.resumed_req_ids)
        resumed.update(new.req_id for new in output.scheduled_new_reqs)
        replays = {}
        for req_id in resumed:
            ledger = ledger_of(self.requests.get(req_id))
            if ledger is not None and len(ledger.builder):
                replays[req_id] = ledger.replay()
        if replays:
            setattr(output, REPLAY_ATTR, replays)
        return output

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> Any:
        record: HostRecord | None = getattr(model_runner_output, RECORD_ATTR, None)
        if record is None:
            return super().update_from_output(  # type: ignore[misc]
                scheduler_output, model_runner_output
            )
        think_row = {int(row): i for i, row in enumerate(record.think)}
        pending: list[tuple[Request, Ledger, int, int]] = []
        for row, req_id in enumerate(record.req_ids):
            request = self.requests.get(req_id)
            ledger = ledger_of(request)
            if request is None or ledger is None or request.is_finished():
                continue
            phase = Phase(record.columns[row][0])
            ledger.pending_phase = phase
            count = request.num_output_tokens
            if phase == Phase.ANSWER and ledger.answer_start is None and ledger.cot.answer_max:
                request.max_tokens = min(request.max_tokens, count + ledger.cot.answer_max)
            pending.append((request, ledger, count, row))
        outputs = super().update_from_output(  # type: ignore[misc]
            scheduler_output, model_runner_output
        )
        by_id = {out.request_id: out for group in outputs.values() for out in group.outputs}
        for request, ledger, count, row in pending:
            ledger.pending_phase = None
            if request.num_output_tokens == count:
                continue  # a stale step the scheduler dropped; it will be computed again
            assert int(record.position[row]) == count == len(ledger.builder)
            delta = ledger.accept(record, row, think_row.get(row))
            out = by_id.get(request.request_id)
            if out is not None:
                out.kv_transfer_params = {WIRE_KEY: delta}
        return outputs

    def softvllm_held_bytes(self) -> int:
        """Bytes of all ledgers, for metrics and leak tests."""
        ledgers = (ledger_of(r) for r in self.requests.values())
        return sum(ledger.nbytes for ledger in ledgers if ledger is not None)


def ledger_of(request: Any) -> Ledger | None:
    return getattr(request, LEDGER_ATTR, None)


def with_soft(base: type) -> type:
    """The scheduler class `base` with our layer."""
    if issubclass(base, SoftSchedulerMixin):
        return base
    return type(f"Soft{base.__name__}", (SoftSchedulerMixin, base), {})


def is_constrained(request: Any, committed: bool) -> bool | None:
    """Whether the grammar constrains this position; None for requests without a CoT object.

    Structured output starts with the answer phase. `committed` asks for the position being
    processed, else for the next one to be sampled.
    """
    ledger = ledger_of(request)
    if ledger is None:
        return None
    phase = ledger.pending_phase if committed else ledger.next_phase()
    return phase == Phase.ANSWER
