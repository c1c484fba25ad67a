#include "hunyuan-calls.h"

#include "hunyuan.h"
#include "unicode.h"

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

const std::string & CLOSE = hunyuan_tag::CALLS_END;

// What became of an attempt to read something: all of it, as far as the text goes, or something else stands there.
enum class got { all, more, other };

class scanner {
  public:
    scanner(const std::string & text, size_t begin, size_t end, bool is_final) :
        text(text), end(end), is_final(is_final), pos(begin) {}

    got  object(hunyuan_call & call);
    void skip_space();

    bool at_end() const { return pos == end; }
    char peek() const { return text[pos]; }
    bool take(char c);

  private:
    got member(hunyuan_call & call, bool & has_arguments);
    got decoded(std::string & out);
    got escape(std::string & out);
    got hex4(size_t from, uint32_t & code) const;
    got unicode_escape(std::string & out);
    got arguments(std::string & out);
    got nested(std::string & out);
    got nested_string(std::string & out);
    got scalar(std::string & out);
    got closing_tag() const;

    const std::string & text;
    const size_t        end;
    const bool          is_final;

  public:
    size_t pos;
};

void scanner::skip_space() {
    while (pos < end && hunyuan_is_space(text[pos])) {
        pos++;
    }
}

bool scanner::take(char c) {
    if (pos < end && text[pos] == c) {
        pos++;
        return true;
    }
    return false;
}

// `pos` stays in front of what is not complete; a call has a name once that is complete.
got scanner::object(hunyuan_call & call) {
    if (!take('{')) {
        return at_end() ? got::more : got::other;
    }
    bool has_arguments = false;
    while (true) {
        skip_space();
        if (take('}')) {
            return got::all;
        }
        const got result = member(call, has_arguments);
        if (result != got::all) {
            return result;
        }
        skip_space();
        if (!take(',') && !at_end() && peek() != '}') {
            return got::other;
        }
    }
}

got scanner::member(hunyuan_call & call, bool & has_arguments) {
    const size_t begin = pos;
    std::string  key;
    got          result = decoded(key);
    if (result == got::all) {
        skip_space();
        if (!take(':')) {
            result = at_end() ? got::more : got::other;
        } else {
            skip_space();
            if (at_end()) {
                result = got::more;
            }
        }
    }
    if (result != got::all) {
        pos = result == got::more ? begin : pos;
        return result;
    }
    std::string ignored;
    if (key == "name" && call.name.empty()) {
        result = decoded(ignored);
        if (result == got::all) {
            call.name = ignored;
        } else if (result == got::more) {
            pos = begin;
        }
        return result;
    }
    if ((key == "arguments" || key == "parameters") && !has_arguments) {
        has_arguments = true;
        return arguments(call.arguments);
    }
    return arguments(ignored);
}

// A string, its escapes resolved. `out` has what is complete even where the string is not.
got scanner::decoded(std::string & out) {
    if (!take('"')) {
        return at_end() ? got::more : got::other;
    }
    while (pos < end) {
        if (take('"')) {
            return got::all;
        }
        if (peek() == '\\') {
            const got result = escape(out);
            if (result != got::all) {
                return result;
            }
        } else {
            out += text[pos++];
        }
    }
    return got::more;
}

got scanner::escape(std::string & out) {
    if (pos + 1 == end) {
        return got::more;
    }
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    const char   c     = text[pos + 1];
    const char * found = std::strchr(names, c);
    if (c == 'u') {
        return unicode_escape(out);
    }
    if (c != '\0' && found != nullptr) {
        out += values[found - names];
        pos += 2;
    } else {
        out += text[pos++];
    }
    return got::all;
}

got scanner::hex4(size_t from, uint32_t & code) const {
    code = 0;
    for (size_t i = from; i < from + 4; i++) {
        if (i >= end) {
            return got::more;
        }
        const char c = text[i];
        const bool digit = c >= '0' && c <= '9', lower = c >= 'a' && c <= 'f', upper = c >= 'A' && c <= 'F';
        if (!digit && !lower && !upper) {
            return got::other;
        }
        code = code * 16 + (digit ? c - '0' : (lower ? c - 'a' : c - 'A') + 10);
    }
    return got::all;
}

// \uXXXX, or a pair of surrogates; one that stands alone is U+FFFD, and four that are not hexadecimal are text.
got scanner::unicode_escape(std::string & out) {
    uint32_t code = 0, low = 0;
    got      result = hex4(pos + 2, code);
    if (result == got::more) {
        return result;
    }
    if (result == got::other) {
        out += text[pos++];
        return got::all;
    }
    size_t length = 6;
    if (code >= 0xD800 && code < 0xDC00) {
        const size_t next = pos + length;
        result = got::more;
        if (next < end && (text[next] != '\\' || (next + 1 < end && text[next + 1] != 'u'))) {
            result = got::other;
        } else if (next + 1 < end) {
            result = hex4(next + 2, low);
        }
        if (result == got::more) {
            return result;
        }
        if (result == got::all && low >= 0xDC00 && low < 0xE000) {
            code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
            length = 12;
        }
    }
    out += common_unicode_cpt_to_utf8(code >= 0xD800 && code < 0xE000 ? 0xFFFD : code);
    pos += length;
    return got::all;
}

got scanner::arguments(std::string & out) {
    const char c = peek();
    return c == '"' ? decoded(out) : c == '{' || c == '[' ? nested(out) : scalar(out);
}

// An object or array as it stands. Brackets are counted, not matched: a model that mixes them up is its reader's affair.
got scanner::nested(std::string & out) {
    size_t depth = 0;
    while (pos < end) {
        const char c = peek();
        if (c == '"') {
            const got result = nested_string(out);
            if (result != got::all) {
                return result;
            }
            continue;
        }
        if (c == '<') {
            const got tag = closing_tag();
            if (tag != got::other) {
                return tag == got::all ? got::other : got::more;
            }
        }
        out += c;
        pos++;
        depth += c == '{' || c == '[';
        depth -= c == '}' || c == ']';
        if (depth == 0) {
            return got::all;
        }
    }
    return got::more;
}

// A string as it stands, with escapes where JSON wants them.
got scanner::nested_string(std::string & out) {
    out += text[pos++];  // the quote
    while (pos < end) {
        const char c = text[pos];
        if (c == '\\') {
            if (pos + 1 == end) {
                return got::more;
            }
            const char next = text[pos + 1];
            uint32_t   code;
            const got  hex = next == 'u' ? hex4(pos + 2, code) : got::all;
            if (hex == got::more) {
                return got::more;
            }
            pos++;
            // a backslash before a real newline means the newline; before a character that it cannot escape, itself
            if (static_cast<unsigned char>(next) >= 0x20) {
                const bool known = hex == got::all && std::strchr("\"\\/bfnrtu", next) != nullptr;
                out += known ? std::string{ c, next } : std::string{ c, c, next };
                pos++;
            }
            continue;
        }
        pos++;
        if (static_cast<unsigned char>(c) < 0x20) {
            static const char hex[] = "0123456789abcdef";
            out += c == '\n' ? "\\n" : c == '\t' ? "\\t" : c == '\r' ? "\\r" :
                   std::string("\\u00") + hex[c >> 4] + hex[c & 15];
        } else {
            out += c;
        }
        if (c == '"') {
            return got::all;
        }
    }
    return got::more;
}

// A number or a word: nothing of it counts before it is complete.
got scanner::scalar(std::string & out) {
    size_t stop = pos;
    while (stop < end && !hunyuan_is_space(text[stop]) && std::strchr(",}]<{[\"", text[stop]) == nullptr) {
        stop++;
    }
    if (stop == end && !is_final) {
        return got::more;
    }
    if (stop == pos) {
        return got::other;
    }
    const std::string value = text.substr(pos, stop - pos);
    out = value == "null" ? "{}" : value;
    pos = stop;
    return got::all;
}

got scanner::closing_tag() const {
    const size_t n = std::min(CLOSE.size(), end - pos);
    if (text.compare(pos, n, CLOSE, 0, n) != 0) {
        return got::other;
    }
    return n == CLOSE.size() ? got::all : is_final ? got::other : got::more;
}

}  // namespace

hunyuan_section hunyuan_read_section(const std::string & text, size_t begin, size_t end, bool is_final) {
    hunyuan_section section;
    scanner         scan(text, begin, end, is_final);
    scan.skip_space();
    const bool is_array = scan.take('[');
    scan.skip_space();
    section.consumed = begin;
    if (is_array && scan.take(']')) {
        section.consumed = scan.pos;
        return section;
    }
    while (true) {
        hunyuan_call call;
        const got    result = scan.object(call);
        const bool   named  = !call.name.empty();
        section.is_open     = result == got::more && !is_final;
        if (named) {
            if (call.arguments.empty() && !section.is_open) {
                call.arguments = "{}";
            }
            section.calls.push_back(call);
            section.consumed = result == got::more && is_final ? end : scan.pos;
        }
        if (result == got::more || !named) {
            return section;
        }
        // between calls: a comma, or nothing
        scan.skip_space();
        scan.take(',');
        scan.skip_space();
        if (scan.take(']')) {
            section.consumed = scan.pos;
            return section;
        }
        if (scan.at_end()) {
            section.is_open = !is_final;
            return section;
        }
    }
}
