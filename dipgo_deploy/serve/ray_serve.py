"""The server as an application of Ray Serve."""

from __future__ import annotations

from typing import Any

from dipgo_deploy.serve.settings import from_environment


def application() -> Any:
    """What ``serve run dipgo_deploy.serve:app`` runs; settings from the environment (DIPGO_SERVE_...).

    Each replica opens the directories for itself and batches its own requests: the number of replicas, and what each
    takes of a machine, are options of Ray Serve's configuration.

    Raises:
        UserError: a setting is wrong or missing.
    """
    from ray import serve

    settings = from_environment()

    def build() -> Any:
        from dipgo_deploy.serve.engine import open_engines
        from dipgo_deploy.serve.service import Service
        from dipgo_deploy.serve.web import create_app

        return create_app(Service(open_engines(settings), settings))

    @serve.ingress(build)
    class Server:
        """The same application as ``dipgo-serve``'s."""

    # More than Ray's default, so that requests reach the queue that makes batches of them.
    deployment = serve.deployment(name="dipgo", max_ongoing_requests=settings.max_queue + 64)
    return deployment(Server).bind()
