"""Rewards: what an answer is worth. `base` says what a scorer is, `pool` runs scorers in processes
that can be killed; `gsm8k`, `math` and `reasoning_gym` are built in, any Python function can be
named as `module:function`. Nothing here imports torch: worker processes start fast and stay small.
"""
