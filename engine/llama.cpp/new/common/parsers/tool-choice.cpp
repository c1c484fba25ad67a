// tool_choice in all its forms; the generic code knows the three words alone.

#include "chat.h"

#include <stdexcept>

static const std::string FUNCTION = "function:";

std::string common_chat_tool_choice_text(const common_json & body) {
    if (!body.contains("tool_choice") || body.at("tool_choice").is_null()) {
        return "auto";
    }
    const common_json & choice = body.at("tool_choice");
    if (choice.is_string()) {
        return choice.get<std::string>();
    }
    const bool named = choice.is_object() && choice.contains("function") && choice.at("function").is_object() &&
                       choice.at("function").contains("name") && choice.at("function").at("name").is_string();
    if (!named) {
        throw std::invalid_argument("tool_choice must be \"auto\", \"none\", \"required\" or "
                                    "{\"type\": \"function\", \"function\": {\"name\": ...}}, got: " + choice.dump());
    }
    return FUNCTION + choice.at("function").at("name").get<std::string>();
}

void common_chat_set_tool_choice(common_chat_templates_inputs & inputs, const std::string & tool_choice) {
    if (tool_choice.compare(0, FUNCTION.size(), FUNCTION) == 0) {
        inputs.tool_choice          = COMMON_CHAT_TOOL_CHOICE_REQUIRED;
        inputs.tool_choice_function = tool_choice.substr(FUNCTION.size());
    } else {
        inputs.tool_choice = common_chat_tool_choice_parse_oaicompat(tool_choice);
    }
}
