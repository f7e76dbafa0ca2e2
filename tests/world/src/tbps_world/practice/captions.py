"""`python -m tbps_world.practice.captions`: a chat server on this machine that rewrites captions by a rule.

It puts each listed attribute in the place of the phrase of the same kind, so that annotate.py can be tried without a model
and without a key that is worth anything.
"""

import argparse
import re
import sys
import threading
from typing import Any

from tbps_common.run.arguments import whole_number
from tbps_common.run.command import command


def answer(messages: list[dict[str, Any]]) -> str:
    """The rewritten sentence for a prompt of `build_prompt`."""
    from dp_gen.generation.references import rewrite
    from dp_gen.segmentation.phrases import find_phrases, load_lexicon

    prompt = str(messages[-1]["content"])
    found = re.search(r"^Sentence: (.*)\nAttributes: (.*)\nRewritten sentence:\Z", prompt, re.MULTILINE | re.DOTALL)
    if found is None:
        return "This server only rewrites captions for annotate.py, and this is another question."
    sentence, attributes = found[1], [part.strip() for part in found[2].split(",") if part.strip()]
    lexicon = load_lexicon()
    spans = find_phrases(sentence, lexicon)
    phrases: dict[str, str] = {}
    others = []
    for attribute in attributes:
        label = next(iter(find_phrases(attribute, lexicon)), None)
        if label in spans and label not in phrases:
            phrases[label] = attribute
        else:
            others.append(attribute)
    segments = [{"label": label, "start": start, "end": end} for label, (start, end) in spans.items()]
    text, _ = rewrite(sentence, segments, phrases)
    return text if not others else f"{text.rstrip(' .')}, with {' and '.join(others)}."


@command
def main(argv: list[str]) -> int:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(
        prog="python -m tbps_world.practice.captions",
        description="Serve an OpenAI-compatible chat on this machine that rewrites captions by a rule, to try annotate.py: "
        "export OPENAI_BASE_URL=http://127.0.0.1:PORT/v1 OPENAI_API_KEY=any",
    )
    parser.add_argument("--port", type=whole_number(0), default=8808, help="0 takes a free one (default: %(default)s)")
    args = parser.parse_args(argv)
    from tbps_world.practice.server import PracticeServer

    with PracticeServer(answer, port=args.port) as server:
        print(f"serving on {server.url}; press Ctrl-C to stop", flush=True)
        threading.Event().wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
