"""The measures of `diagnostics`, collected over micro-batches and ranks."""

from __future__ import annotations

import torch

from trainer import diagnostics
from trainer.forward import Densities
from trainer.packing import Batch

Values = dict[str, list[torch.Tensor]]


class Agreement:
    """Collects the measures of `diagnostics` over micro-batches."""

    def __init__(self, limit: int) -> None:
        self.limit = max(1, limit)
        self.values: Values = {"distance": [], "gap": [], "floor": [], "mismatch": []}

    def add(self, batch: Batch, now: Densities) -> None:
        values = self.values
        if len(batch.soft.row):
            values["distance"].append(diagnostics.gaussian_distance(now).cpu())
            values["gap"].append(diagnostics.mean_gap(batch, now, self.limit).cpu())
            values["floor"].append(diagnostics.rounding_floor(batch).cpu())
        values["mismatch"].append(diagnostics.hard_mismatch(batch, now).cpu())

    @staticmethod
    def metrics(*several: Values) -> dict[str, float]:
        """agree/... of all ranks' values; absent where nothing was measured."""
        joined = {
            name: torch.cat(parts)
            for name in several[0]
            if (parts := [part for values in several for part in values[name]])
        }
        out: dict[str, float] = {}
        if "distance" in joined:
            distance, gap = (diagnostics.summary(joined[n]) for n in ("distance", "gap"))
            out |= {
                "agree/gaussian_distance": distance["mean"],
                "agree/gaussian_distance_median": distance["median"],
                "agree/gaussian_distance_max": distance["max"],
                "agree/far_steps": float((joined["distance"] > diagnostics.FAR).float().mean()),
                "agree/mean_gap": gap["mean"],
                "agree/mean_gap_median": gap["median"],
                "agree/mean_gap_p99": gap["p99"],
                "agree/rounding_floor": diagnostics.summary(joined["floor"])["mean"],
            }
        if len(joined.get("mismatch", ())):
            mismatch = diagnostics.summary(joined["mismatch"])
            out |= {"agree/hard_kl": mismatch["mean"], "agree/hard_kl_max": mismatch["max"]}
        return out
