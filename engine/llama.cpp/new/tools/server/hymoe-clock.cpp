#include "hymoe-clock.h"

#include <list>
#include <mutex>
#include <string>
#include <unordered_map>

using time_point = std::chrono::system_clock::time_point;

static constexpr size_t             MAX_CONVERSATIONS = 1024;
static constexpr std::chrono::hours RETRY{1};

namespace {

class conversation_clocks {
public:
    time_point begun(const std::string & head, bool is_opening) {
        const std::lock_guard<std::mutex> lock(mutex);
        const time_point now = std::chrono::system_clock::now();
        const size_t key = std::hash<std::string>()(head);

        auto found = by_key.find(key);
        if (found == by_key.end()) {
            recent.emplace_front(key, now);
            by_key[key] = recent.begin();
            if (recent.size() > MAX_CONVERSATIONS) {
                by_key.erase(recent.back().first);
                recent.pop_back();
            }
            return now;
        }
        recent.splice(recent.begin(), recent, found->second);
        time_point & begun = found->second->second;
        if (is_opening && now - begun > RETRY) {
            begun = now;
        }
        return begun;
    }

private:
    std::mutex mutex;
    std::list<std::pair<size_t, time_point>> recent; // the last used one in front
    std::unordered_map<size_t, std::list<std::pair<size_t, time_point>>::iterator> by_key;
};

} // namespace

time_point hymoe_clock(const json & messages, const json & tools) {
    static conversation_clocks clocks;

    std::string head = tools.dump_safe();
    size_t n_head = 0;
    for (const auto & message : messages) {
        n_head++;
        head += '\0' + message.dump_safe();
        if (json_value(message, "role", std::string()) == "user") {
            break;
        }
    }
    return clocks.begun(head, n_head == messages.size());
}
