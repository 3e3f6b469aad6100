"""Seeds of all samples of a rollout request.

All at once, because the event loop serves nobody meanwhile: one by one, the largest request that is
admitted would take a minute and a half. The trainer derives its own in the same way.
"""

from __future__ import annotations

from softvllm.core.noise import sample_seeds

__all__ = ["sample_seeds"]
