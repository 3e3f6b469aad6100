"""Throughput of every mode against stock vLLM: `python -m softvllm.bench`."""
