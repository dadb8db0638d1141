// Says in requests who sent them on, and takes out of answers what made them.

import * as host from "leeward:plugin/host@0.2.0";

const MARK = "x-sent-on-by";
const bytes = (text) => new TextEncoder().encode(text);

export function onRequest(request) {
  host.count("requests", 1);
  if (request.header(MARK).length > 0) {
    return { tag: "respond", val: { status: 508, headers: [], body: bytes("sent on already") } };
  }
  // What is refused is thrown, and a fault.
  request.setHeader(MARK, bytes(request.config()));
  return { tag: "proceed", val: { requestBody: "none", response: true } };
}

export function onRequestBody(request, data, end) {
  return { tag: "pass" };
}

export function onResponse(request, response) {
  response.removeHeader("server");
  return { tag: "proceed", val: "none" };
}

export function onResponseBody(request, response, data, end) {
  return { tag: "pass" };
}
