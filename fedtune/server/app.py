"""The ServerApp under its documented name, `fedtune.server.app:app`; it is made in `fedtune.server_app`.

Flower looks for the name in the source text, and finds it only in an assignment or in `__all__`.
"""

from fedtune.server_app import app

__all__ = ["app"]
