// tool_choice in all its forms; the generic code knows the three words alone.

#include "chat.h"
#include "hymoe-json.h"

#include <stdexcept>

// No client's string can begin so: all but the three words are refused below.
static const std::string FUNCTION = "function:";

static std::string text_of(const common_json & object, const std::string & key) {
    return object.is_object() && object.contains(key) && object.at(key).is_string() ? object.at(key).get<std::string>() : "";
}

// The function that is named, in the form of chat completions, of responses or of Anthropic's messages; empty where none is.
static std::string function_of(const common_json & choice) {
    if (choice.is_object() && choice.contains("function")) {
        return text_of(choice.at("function"), "name");
    }
    const std::string type = text_of(choice, "type");
    return type == "function" || type == "tool" ? text_of(choice, "name") : "";
}

// "auto" or "required" of {"type": "allowed_tools"}, whose mode stands in an object of its own or beside the type.
static std::string mode_of(const common_json & choice) {
    if (text_of(choice, "type") != "allowed_tools") {
        return "";
    }
    return text_of(choice.contains("allowed_tools") ? choice.at("allowed_tools") : choice, "mode");
}

std::string common_chat_tool_choice_text(const common_json & body) {
    if (!body.contains("tool_choice") || body.at("tool_choice").is_null()) {
        return "auto";
    }
    const common_json & choice = body.at("tool_choice");
    const std::string   word   = choice.is_string() ? choice.get<std::string>() : mode_of(choice);
    if (word == "auto" || word == "none" || word == "required") {
        return word;
    }
    const std::string name = function_of(choice);
    if (name.empty()) {
        throw std::invalid_argument("tool_choice must be \"auto\", \"none\", \"required\" or "
                                    "{\"type\": \"function\", \"function\": {\"name\": ...}}, got: " + hymoe_shown(choice));
    }
    return FUNCTION + name;
}

void common_chat_set_tool_choice(common_chat_templates_inputs & inputs, const std::string & tool_choice) {
    if (tool_choice.compare(0, FUNCTION.size(), FUNCTION) == 0) {
        inputs.tool_choice          = COMMON_CHAT_TOOL_CHOICE_REQUIRED;
        inputs.tool_choice_function = tool_choice.substr(FUNCTION.size());
    } else {
        inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(tool_choice);
    }
}
