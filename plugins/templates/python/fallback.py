"""Answers reads with what its configuration says while the service doesn't."""

from wit_world import WitWorld as World
from wit_world.imports import host
from wit_world.imports.failure import Action_Decline, Action_Respond
from wit_world.imports.types import Header, Response


class WitWorld(World):
    def on_failure(self, request):
        host.log(host.Level.INFO, f"{request.service()} failed: {request.cause().name}")
        # Others could have had an effect.
        if request.method() not in ("GET", "HEAD"):
            return Action_Decline()
        host.count("answers", 1)
        headers = [
            Header("content-type", b"application/json"),
            Header("cache-control", b"no-store"),
        ]
        return Action_Respond(Response(200, headers, request.config().encode()))
