"""Reinforcement learning for soft, fuzzy, hard and mixed chains of thought.

The maths, in reading order: `reading` (a rollout sample to an `episodes.Episode`), `packing`
(episodes to one padding-free batch), `forward` (model to densities, through the fused `head`),
`advantages`, `objective` (densities to loss), `diagnostics`. docs/objective.md states it on one
page. Nothing here imports vllm.
"""
