"""`python -m trainer.eval`: the paper's grid for any checkpoint (docs/evaluation.md)."""

from __future__ import annotations

import errno
import sys
from collections.abc import Sequence

from trainer.eval.config import parse
from trainer.eval.run import evaluate
from trainer.rewards.pool import RewardFailure
from trainer.rollout_client import ServerGone, ServerRefused


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; 0: everything is there, 1: it stopped and said why."""
    try:
        evaluate(parse(arguments))
        return 0
    except (ValueError, ServerRefused, ServerGone, RewardFailure) as error:
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)  # what is written stays whole
        more = "; the same command goes on from here" if full else ""
        print(f"stopped: {error}{more}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; the same command goes on from here", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
