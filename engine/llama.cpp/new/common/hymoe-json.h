// JSON of strangers: how deep it may be, and how much of it is shown to them again.

#pragma once

#include "json.h"

#include <cstddef>
#include <string>

// Copying, printing and destroying a value calls itself once for each level, so depth is what a thread's stack allows.
constexpr size_t HYMOE_JSON_LEVELS = 256;
constexpr size_t HYMOE_SHOWN_BYTES = 80;

// Throws common_json_error where arrays and objects in `text` lie in more levels of one another. Looks at nothing else.
inline void hymoe_check_levels(const std::string & text) {
    size_t level     = 0;
    bool   in_string = false;
    for (size_t i = 0; i < text.size(); i++) {
        const char c = text[i];
        if (in_string) {
            i += c == '\\';
            in_string = c != '"';
        } else if (c == '"') {
            in_string = true;
        } else if (c == '[' || c == '{') {
            level++;
        } else if ((c == ']' || c == '}') && level > 0) {
            level--;
        }
        if (level > HYMOE_JSON_LEVELS) {
            throw common_json_error("parse error: JSON is nested more than " + std::to_string(HYMOE_JSON_LEVELS) + " levels deep");
        }
    }
}

// The beginning of a text, as messages quote it, cut at a character's end.
inline std::string hymoe_shown(const std::string & text) {
    size_t n = HYMOE_SHOWN_BYTES;
    if (text.size() <= n) {
        return text;
    }
    while (n > 0 && (static_cast<unsigned char>(text[n]) & 0xC0) == 0x80) {
        n--;
    }
    return text.substr(0, n) + "...";
}

inline std::string hymoe_shown(const common_json & value) {
    return hymoe_shown(value.dump_safe());
}
