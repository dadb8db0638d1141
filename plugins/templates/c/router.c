// Gives a request the backend that it asks for, if that is healthy.
//
// What a function is given is the plugin's to free.

#include "router.h"
#include <string.h>

bool exports_router_choose(router_borrow_request_head_t request, router_list_target_t *targets, uint32_t *chosen) {
  router_string_t name;
  router_list_list_u8_t values;
  router_string_set(&name, "x-backend");
  leeward_plugin_passing_method_request_head_header(request, &name, &values);
  bool found = false;
  for (size_t at = 0; values.len > 0 && at < targets->len && !found; at++) {
    const router_target_t *target = &targets->ptr[at];
    found = target->healthy > 0 && target->service.len == values.ptr[0].len &&
            memcmp(target->service.ptr, values.ptr[0].ptr, target->service.len) == 0;
    *chosen = at;
  }
  router_list_list_u8_free(&values);
  router_list_target_free(targets);
  return found;
}
