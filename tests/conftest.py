"""Fixtures of the whole session (server processes, each started when a test first asks for it), and
how patient generated tests are."""

from hypothesis import settings
from server_host import server, stock_server, thinking_server

# Machines are noisy: an example that takes long says nothing. What else the surroundings ask for
# stays, such as the same examples in every run where CI is set.
settings.register_profile("patient", parent=settings(), deadline=None)
settings.load_profile("patient")

__all__ = ["server", "stock_server", "thinking_server"]
