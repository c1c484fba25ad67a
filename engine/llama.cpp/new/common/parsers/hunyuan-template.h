// How a HunYuan template is recognised and used; the generic code calls this in common/chat.cpp.

#pragma once

#include "chat-auto-parser.h"
#include "chat.h"

#include <string>

// A template of this family that knows thoughts: the vendor's, a repaired one, or ours.
bool is_hunyuan_template(const std::string & src);

// Throws std::invalid_argument where tool_choice requires a function that the request does not have.
common_chat_params common_chat_params_init_hunyuan(const common_chat_template & tmpl,
                                                   const autoparser::generation_params & given);
