#include "hymoe-tokens.h"

#include "server-common.h"

#include <stdexcept>

using handler_t = server_http_context::handler_t;

// Ask `handler` with another body, and let `convert` make its answer another one; an error's answer stays.
static server_http_res_ptr ask(const handler_t & handler, const server_http_req & req, const json & body,
        const std::function<json(const json &)> & convert) {
    const server_http_req inner { req.params, req.headers, req.path, req.query_string, body.dump_safe(), {}, req.should_stop };
    auto res = handler(inner);
    if (res->status == 200) {
        res->data = safe_json_to_str(convert(json::parse(res->data)));
    }
    return res;
}

static std::string text_of(const json & body) {
    for (const char * key : { "text", "prompt" }) {
        if (body.contains(key) && body.at(key).is_string()) {
            return body.at(key);
        }
    }
    throw std::invalid_argument("'text' is required, a string");
}

void hymoe_token_routes(const server_http_context & http, const server_routes & routes,
        const std::function<handler_t(handler_t)> & guard) {
    const handler_t tokenize   = routes.post_tokenize;
    const handler_t detokenize = routes.post_detokenize;

    const handler_t encode = [tokenize](const server_http_req & req) {
        return ask(tokenize, req, json {{"content", text_of(json::parse(req.body))}}, [](const json & answer) {
            return json {{"tokens", answer.at("tokens")}, {"length", answer.at("tokens").size()}};
        });
    };
    const handler_t count = [tokenize](const server_http_req & req) {
        return ask(tokenize, req, json {{"content", text_of(json::parse(req.body))}}, [](const json & answer) {
            return json {{"length", answer.at("tokens").size()}};
        });
    };
    const handler_t decode = [detokenize](const server_http_req & req) {
        const json body = json::parse(req.body);
        return ask(detokenize, req, json {{"tokens", body.at("tokens")}}, [](const json & answer) {
            return json {{"text", answer.at("content")}};
        });
    };
    const handler_t nothing = [](const server_http_req &) {
        auto res = std::make_unique<server_http_res>();
        res->data = "{}";
        return res;
    };

    http.post("/v1/token/encode",              guard(encode));
    http.post("/v1/token/decode",              guard(decode));
    http.post("/v1/internal/encode",           guard(encode));
    http.post("/v1/internal/decode",           guard(decode));
    http.post("/v1/internal/token-count",      guard(count));
    http.post("/v1/internal/stop-generation",  guard(nothing));
}
