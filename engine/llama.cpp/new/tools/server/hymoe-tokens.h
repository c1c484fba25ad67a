// The names under which UIs that speak to text-generation-webui, TabbyAPI or Aphrodite look for a tokenizer.

#pragma once

#include "server-context.h"
#include "server-http.h"

#include <functional>

// POST, all under the key like /tokenize, which answers them:
//   /v1/token/encode, /v1/internal/encode  {"text"} or {"prompt"}  ->  {"tokens", "length"}
//   /v1/internal/token-count               the same                ->  {"length"}
//   /v1/token/decode, /v1/internal/decode  {"tokens"}              ->  {"text"}
//   /v1/internal/stop-generation           nothing: closing the connection has stopped it already
// guard: what turns a handler's exceptions into answers
void hymoe_token_routes(const server_http_context & http, const server_routes & routes,
        const std::function<server_http_context::handler_t(server_http_context::handler_t)> & guard);
