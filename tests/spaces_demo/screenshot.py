"""
Takes the screenshot of the page for the README. The server must be running.

    python spaces_demo/app.py --model FOLDER &
    python tests/spaces_demo/screenshot.py docs/images/space.png
"""

import argparse
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.spaces_demo.browsing import ask, choose_example, chromium, open_page, wait_for  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.strip().split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--address", default="http://127.0.0.1:7860")
    parser.add_argument("--example", type=int, default=0)
    parser.add_argument("--question", help="by default the first question of the example")
    parser.add_argument("--off", nargs="*", default=[], help="experts to switch off, by name")
    parser.add_argument("--dark", action="store_true")
    parser.add_argument("--height", type=int, default=1560)
    args = parser.parse_args()
    with chromium() as browser:
        page = open_page(browser, args.address, {"width": 1240, "height": args.height}, args.dark)
        choose_example(page, args.example)
        question = args.question or page.inner_text("#suggestions button >> nth=0")
        ask(page, question)
        for name in args.off:
            page.click(f"#switch-{name} label:has-text('Off')")
            page.wait_for_selector(f"#card-{name} .missing")
            wait_for(page, "Done.")
        page.mouse.move(0, 0)
        page.evaluate("() => { document.activeElement.blur(); scrollTo(0, 0); }")
        page.wait_for_timeout(1000)
        page.screenshot(path=str(args.output))


if __name__ == "__main__":
    main()
