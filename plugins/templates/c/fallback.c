// Answers reads with what its configuration says while the service doesn't.
//
// What a function is given is the plugin's to free; what an export returns is freed for it, and must come from malloc.

#include "fallback.h"
#include <stdlib.h>
#include <string.h>

typedef leeward_plugin_failure_borrow_failed_request_t request_t;

static bool is(const fallback_string_t *text, const char *other) {
  return text->len == strlen(other) && memcmp(text->ptr, other, text->len) == 0;
}

static void say(const char *before, const fallback_string_t *text) {
  char line[256];
  size_t len = strlen(before);
  size_t rest = text->len < sizeof line - len ? text->len : sizeof line - len;
  memcpy(line, text->ptr, rest);
  memcpy(line + rest, before, len);
  fallback_string_t message = {(uint8_t *)line, rest + len};
  leeward_plugin_host_log(LEEWARD_PLUGIN_HOST_LEVEL_INFO, &message);
}

static void field(leeward_plugin_types_header_t *header, const char *name, const char *value) {
  fallback_string_dup(&header->name, name);
  fallback_string_t text;
  fallback_string_dup(&text, value);
  header->value.ptr = text.ptr;
  header->value.len = text.len;
}

void exports_fallback_on_failure(request_t request, fallback_action_t *action) {
  fallback_string_t service, method;
  leeward_plugin_failure_method_failed_request_service(request, &service);
  say(" failed", &service);
  fallback_string_free(&service);

  // Others could have had an effect.
  leeward_plugin_failure_method_failed_request_method(request, &method);
  bool reads = is(&method, "GET") || is(&method, "HEAD");
  fallback_string_free(&method);
  if (!reads) {
    action->tag = LEEWARD_PLUGIN_FAILURE_ACTION_DECLINE;
    return;
  }

  fallback_string_t counter;
  fallback_string_set(&counter, "answers");
  leeward_plugin_host_count(&counter, 1);

  fallback_string_t config;
  leeward_plugin_failure_method_failed_request_config(request, &config);
  action->tag = LEEWARD_PLUGIN_FAILURE_ACTION_RESPOND;
  leeward_plugin_types_response_t *response = &action->val.respond;
  response->status = 200;
  response->headers.len = 2;
  response->headers.ptr = malloc(2 * sizeof *response->headers.ptr);
  field(&response->headers.ptr[0], "content-type", "application/json");
  field(&response->headers.ptr[1], "cache-control", "no-store");
  response->body.ptr = config.ptr;
  response->body.len = config.len;
}
