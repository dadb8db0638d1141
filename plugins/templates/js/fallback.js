// Answers reads with what its configuration says while the service doesn't.

import * as host from "leeward:plugin/host@0.2.0";

const bytes = (text) => new TextEncoder().encode(text);

export function onFailure(request) {
  host.log("info", `${request.service()} failed: ${request.cause()}`);
  // Others could have had an effect.
  if (!["GET", "HEAD"].includes(request.method())) {
    return { tag: "decline" };
  }
  host.count("answers", 1);
  const headers = [
    { name: "content-type", value: bytes("application/json") },
    { name: "cache-control", value: bytes("no-store") },
  ];
  return { tag: "respond", val: { status: 200, headers, body: bytes(request.config()) } };
}
