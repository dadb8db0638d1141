"""Says in requests who sent them on, and takes out of answers what made them."""

from wit_world import WitWorld as World
from wit_world.imports import host
from wit_world.imports.passing import (
    BodyMode,
    BodyVerdict_Pass,
    Interest,
    RequestVerdict_Proceed,
    RequestVerdict_Respond,
    ResponseVerdict_Proceed,
)
from wit_world.imports.types import Response

MARK = "x-sent-on-by"


class WitWorld(World):
    def on_request(self, request):
        host.count("requests", 1)
        if request.header(MARK):
            return RequestVerdict_Respond(Response(508, [], b"sent on already"))
        # What is refused is raised, and a fault.
        request.set_header(MARK, request.config().encode())
        return RequestVerdict_Proceed(Interest(BodyMode.NONE, True))

    def on_request_body(self, request, data, end):
        return BodyVerdict_Pass()

    def on_response(self, request, response):
        response.remove_header("server")
        return ResponseVerdict_Proceed(BodyMode.NONE)

    def on_response_body(self, request, response, data, end):
        return BodyVerdict_Pass()
