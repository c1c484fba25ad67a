// The JSON between <tool_calls> and </tool_calls>, read while it grows.

#pragma once

#include <cstddef>
#include <string>
#include <vector>

struct hunyuan_call {
    std::string name;
    std::string arguments;  // JSON text; only grows while the text grows
};

struct hunyuan_section {
    std::vector<hunyuan_call> calls;             // those whose name is complete
    size_t                    consumed = 0;      // first byte that is not decided (is_open) or not part of the section
    bool                      is_open  = false;  // more text may continue it
};

// Reads calls from text[begin, end): an array of objects, or objects alone. More text may follow unless is_final.
//
// Taken as they come: missing commas, missing closing brackets, keys in any order, "parameters" for "arguments", arguments
// as an object, as a string that holds one, null or missing ({}). In strings of the arguments control characters and
// backslashes that escape nothing are escaped, everything else is copied as it stands. What is no call ends the section:
// `consumed` is where. No calls and not open means that no call begins here at all (an empty array is consumed).
hunyuan_section hunyuan_read_section(const std::string & text, size_t begin, size_t end, bool is_final);
