"""Fixtures of the whole session: server processes, each started when a test first asks for it."""

from server_host import server, stock_server, thinking_server

__all__ = ["server", "stock_server", "thinking_server"]
