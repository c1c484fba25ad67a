"""How soon hy-chat shows what a server sends, and what is typed meanwhile, on a pseudo-terminal of 500 columns.

The server is a stand-in of the tests that sends words at a fixed pace and notes when: what is measured is what hy-chat
adds. First token: from its being sent until it is on the screen, target 50 ms. Key: from its being typed until it is on
the screen while 100 words come per second, target 50 ms. Ends with status 1 where a median misses its target.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from paced_server import first_token_delays, typing_delays

TARGET_MS = 50.0
# Letters of no word that the server sends.
KEYS = "zyxvuqjkbm"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=20, help="asked for the first token [%(default)s]")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as state:
        env = {"TERM": "xterm-256color", "XDG_STATE_HOME": state}
        rows = {"first token": first_token_delays(env, options.questions), "key": typing_delays(env, KEYS)}
    print(f"{'':12} {'n':>4} {'median ms':>10} {'worst ms':>10} {'target ms':>10}")
    for name, seconds in rows.items():
        middle, worst = 1000 * median(seconds), 1000 * max(seconds)
        print(f"{name:12} {len(seconds):4} {middle:10.1f} {worst:10.1f} {TARGET_MS:10.0f}")
    return int(any(1000 * median(seconds) > TARGET_MS for seconds in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
