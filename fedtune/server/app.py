"""The name under which Flower apps know the ServerApp: `fedtune.server.app:app`. It is made in `fedtune.server_app`."""

from fedtune.server_app import app as app
