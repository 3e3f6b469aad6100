"""The vLLM side: front end, scheduler, runners. Only `compat.py` patches vLLM."""
