"""The OpenAI-compatible server: vLLM's own, with a think phase per request (docs/server.md)."""
