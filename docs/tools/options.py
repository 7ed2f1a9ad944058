"""Writes `docs/options.md` from `SiriusConfig`: `python docs/tools/options.py`, in the repository's root.

Names, defaults and texts are those of the class and its docstring, and the values are what it answers to a wrong one, so
the page cannot say anything else than the code. `tests/unit/test_documentation.py` compares the two.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "options.md"

HEAD = """\
<!-- Written by docs/tools/options.py from SiriusConfig: change the docstring there and run it again. -->

# Options

Keys of `speculative_config`, beside `"method": "sirius"`. Nothing has to be given. Unknown keys, bad values and contradictions
are refused before weights load, with the option, its value and a remedy.

"""

BETWEEN = """
Two options belong to a single request: [`sirius` and `sirius_threshold`](usage.md#options-of-one-request). Which settings are
fastest on your machine and your prompts is measured by [`vllm-sirius tune`](tuning.md).

vLLM's own keys that may stand beside them: `model` (`"sirius"` in the place of `method`), `num_speculative_tokens`, and
`num_speculative_tokens_per_batch_size`, vLLM's table of draft lengths by batch size, which decides in the place of `adaptive`.

## Each option in full
"""

PRESET_HEAD = """
## Presets

`"preset": "NAME"` stands for the options in its column, and further keys refine it. [acceptance.md](acceptance.md) says more
about the paper's algorithm.

"""

TAIL = """
## Requests

Requests with a temperature above 0 work with both acceptance rules. End of text, stop strings, `max_tokens`, `min_tokens`, seeds,
logprobs, penalties and grammars stay vLLM's; a draft never proposes the end of a text.
"""


def descriptions(docstring: str) -> dict[str, str]:
    """Texts of the section "Attributes" of a Google docstring, by name.

    Args:
        docstring: The docstring, as `inspect.getdoc` cleans it.

    Returns:
        One paragraph of Markdown for each attribute.
    """
    entries = docstring.partition("\nAttributes:\n")[2]
    found = re.findall(r"^    (\w+): (.*(?:\n        .*)*)", entries, flags=re.MULTILINE)
    return {name: " ".join(text.split()).replace("``", "`") for name, text in found}


def first_sentence(text: str) -> str:
    """What stands in the table.

    Args:
        text: A paragraph.

    Returns:
        Its first sentence.
    """
    return re.split(r"(?<=\.) (?=[A-Z0-9`])", text, maxsplit=1)[0]


def values_of(name: str) -> str:
    """What an option may be, in the words with which a wrong value is refused.

    Args:
        name: The option.

    Returns:
        Markdown.

    Raises:
        LookupError: If a wrong value is not refused, or in other words.
    """
    found = re.match(rf"{name}=\S+ is not (.+?): ", _answer_to_a_wrong(name))
    if found is None:
        raise LookupError(f"no values in what is said of {name}: {_answer_to_a_wrong(name)!r}")
    words = found[1]
    if words.startswith("one of "):
        return ", ".join(f"`{value}`" for value in words.removeprefix("one of ").split(", "))
    if words == "true or false":
        return "`true`, `false`"
    if words.startswith("a finite number"):
        return "a number"
    return words.removeprefix("a whole number ").replace("from ", "").replace("of at least", "at least")


def _answer_to_a_wrong(name: str) -> str:
    from vllm_sirius.config import SiriusConfig
    from vllm_sirius.errors import SiriusConfigError

    try:
        # A path may be any text.
        SiriusConfig.from_options({name: 0 if name == "offload_path" else "?"})
    except SiriusConfigError as error:
        return str(error)
    return ""


def as_json(value: Any) -> str:
    """A value as it is written in JSON, without quotes; empty for none.

    Args:
        value: The value.

    Returns:
        Markdown.
    """
    if value is None:
        return ""
    return f"`{value}`" if isinstance(value, str) else f"`{json.dumps(value)}`"


def page() -> str:
    """The whole page.

    Returns:
        Markdown.
    """
    from vllm_sirius.config import PRESETS, SiriusConfig

    fields = {field.name: field.default for field in dataclasses.fields(SiriusConfig)}
    texts = descriptions(inspect.getdoc(SiriusConfig) or "")
    assert list(texts) == list(fields), "the docstring of SiriusConfig does not list its options in their order"
    table = ["| Option | Default | Values | What it decides |", "|---|---|---|---|"]
    details = []
    for name, default in fields.items():
        text = texts[name]
        table.append(f"| [`{name}`](#{name}) | {as_json(default)} | {values_of(name)} | {first_sentence(text)} |")
        details.append(
            f"\n### `{name}`\n\nDefault: {as_json(default) or 'none'}. Values: {values_of(name)}.\n\n{text}\n"
        )
    presets = [
        f"| Option | {' | '.join(f'`{name}`' for name in PRESETS)} | default |",
        "|---" * (len(PRESETS) + 2) + "|",
    ]
    for name, default in fields.items():
        if any(name in preset for preset in PRESETS.values()):
            chosen = " | ".join(as_json(preset.get(name)) for preset in PRESETS.values())
            presets.append(f"| `{name}` | {chosen} | {as_json(default)} |")
    parts = [HEAD, "\n".join(table), "\n", BETWEEN, *details, PRESET_HEAD, "\n".join(presets), "\n", TAIL]
    return "".join(parts)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(page())
