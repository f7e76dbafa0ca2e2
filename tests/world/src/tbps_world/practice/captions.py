"""`python -m tbps_world.practice.captions`: a chat server on this machine that rewrites captions by a rule.

It puts each listed attribute in the place of the phrase of the same kind, so that annotate.py can be tried without a model
and without a key that is worth anything.
"""

import re
import sys
from typing import Any

from tbps_common.run.command import command
from tbps_world.practice.server import serve


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
    purpose = "rewrites captions by a rule, to try annotate.py"
    return serve(argv, answer, module="tbps_world.practice.captions", port=8808, purpose=purpose)


if __name__ == "__main__":
    sys.exit(main())
