"""The algorithm, torch only: parameters, noise, mixture, policies, phases, trace, oracle.

Nothing here imports vllm, so the trainer uses the same definitions as the engine.
"""
