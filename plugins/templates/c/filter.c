// Says in requests who sent them on, and takes out of answers what made them.
//
// What a function is given is the plugin's to free; what an export returns is freed for it, and must come from malloc.

#include "filter.h"
#include <stdlib.h>
#include <string.h>

#define MARK "x-sent-on-by"

void exports_filter_on_request(filter_borrow_request_head_t request, filter_request_verdict_t *verdict) {
  filter_string_t counter, mark;
  filter_string_set(&counter, "requests");
  leeward_plugin_host_count(&counter, 1);

  filter_string_set(&mark, MARK);
  filter_list_list_u8_t values;
  leeward_plugin_passing_method_request_head_header(request, &mark, &values);
  bool marked = values.len > 0;
  filter_list_list_u8_free(&values);
  if (marked) {
    filter_string_t text;
    filter_string_dup(&text, "sent on already");
    verdict->tag = LEEWARD_PLUGIN_PASSING_REQUEST_VERDICT_RESPOND;
    verdict->val.respond.status = 508;
    verdict->val.respond.headers.ptr = NULL;
    verdict->val.respond.headers.len = 0;
    verdict->val.respond.body.ptr = text.ptr;
    verdict->val.respond.body.len = text.len;
    return;
  }

  filter_string_t config;
  leeward_plugin_passing_edit_error_t error;
  leeward_plugin_passing_method_request_head_config(request, &config);
  filter_list_u8_t value = {config.ptr, config.len};
  if (!leeward_plugin_passing_method_request_head_set_header(request, &mark, &value, &error)) {
    // A fault.
    abort();
  }
  filter_string_free(&config);
  verdict->tag = LEEWARD_PLUGIN_PASSING_REQUEST_VERDICT_PROCEED;
  verdict->val.proceed.request_body = LEEWARD_PLUGIN_PASSING_BODY_MODE_NONE;
  verdict->val.proceed.response = true;
}

void exports_filter_on_request_body(filter_borrow_request_head_t request, filter_list_u8_t *data, bool end,
                                    filter_body_verdict_t *verdict) {
  (void)request, (void)end;
  filter_list_u8_free(data);
  verdict->tag = LEEWARD_PLUGIN_PASSING_BODY_VERDICT_PASS;
}

void exports_filter_on_response(filter_borrow_request_head_t request, filter_borrow_response_head_t response,
                                filter_response_verdict_t *verdict) {
  (void)request;
  filter_string_t server;
  leeward_plugin_passing_edit_error_t error;
  filter_string_set(&server, "server");
  if (!leeward_plugin_passing_method_response_head_remove_header(response, &server, &error)) {
    abort();
  }
  verdict->tag = LEEWARD_PLUGIN_PASSING_RESPONSE_VERDICT_PROCEED;
  verdict->val.proceed = LEEWARD_PLUGIN_PASSING_BODY_MODE_NONE;
}

void exports_filter_on_response_body(filter_borrow_request_head_t request, filter_borrow_response_head_t response,
                                     filter_list_u8_t *data, bool end, filter_body_verdict_t *verdict) {
  (void)request, (void)response, (void)end;
  filter_list_u8_free(data);
  verdict->tag = LEEWARD_PLUGIN_PASSING_BODY_VERDICT_PASS;
}
