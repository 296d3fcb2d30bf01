"""The ServerApp under its documented name, `fedtune.server.app:app`; it is made in `fedtune.server_app`."""

from fedtune.server_app import app as app
