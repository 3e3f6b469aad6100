"""Clients of the server: they speak HTTP and never import vllm.

`SoftClient` and `AsyncSoftClient` for programs, `clients.chat` for the terminal, `examples/` for
unchanged OpenAI clients, `playground/` for the browser.
"""

from __future__ import annotations

from clients.async_client import AsyncChatStream, AsyncSoftClient
from clients.client import ChatStream, SoftClient
from clients.errors import (
    AccessDenied,
    BadAnswer,
    CoTRequestRefused,
    NotASoftServer,
    RequestRefused,
    SampleFailed,
    ServerFailed,
    ServerTimeout,
    ServerUnreachable,
    SoftClientError,
    StreamCut,
)
from clients.types import (
    ContentDelta,
    CoTBlock,
    Done,
    Event,
    ReasoningDelta,
    ServerInfo,
    ServerLimits,
    SoftChoice,
    SoftReply,
    ThinkStep,
    ThinkStepEvent,
    ToolCallDelta,
    TopToken,
)

__all__ = [
    "AccessDenied",
    "AsyncChatStream",
    "AsyncSoftClient",
    "BadAnswer",
    "ChatStream",
    "CoTBlock",
    "CoTRequestRefused",
    "ContentDelta",
    "Done",
    "Event",
    "NotASoftServer",
    "ReasoningDelta",
    "RequestRefused",
    "SampleFailed",
    "ServerFailed",
    "ServerInfo",
    "ServerLimits",
    "ServerTimeout",
    "ServerUnreachable",
    "SoftChoice",
    "SoftClient",
    "SoftClientError",
    "SoftReply",
    "StreamCut",
    "ThinkStep",
    "ThinkStepEvent",
    "ToolCallDelta",
    "TopToken",
]
