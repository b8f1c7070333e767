"""The prompts of `cola generate`, and where its results go."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cola_megatron.config import ConfigError

if TYPE_CHECKING:
    from cola_megatron.inference.protocol import Generation


@dataclass(frozen=True)
class Prompt:
    """One prompt and what its line said besides."""

    text: str
    id: int | None = None
    """Of its noise; None: its place among the prompts."""
    max_new_tokens: int | None = None

    def result(self, generation: "Generation", identity: int) -> dict[str, Any]:
        """One line of the output."""
        return {
            "prompt": self.text,
            "id": identity,
            "text": generation.text,
            "finish_reason": generation.finish_reason,
            "token_ids": generation.token_ids.tolist(),
            "prompt_tokens": generation.prompt_tokens,
        }


def read_prompts(file: Path) -> list[Prompt]:
    """Prompts of a file: one JSON object per line in `*.jsonl` (`prompt`, and if wanted `id`, `max_new_tokens`; other
    keys are not read), else one text per line; empty lines do not count.

    Raises:
        ConfigError: the file cannot be read, or a line is not of that form.
    """
    try:
        # Lines as everybody counts them: `str.splitlines` also ends one at U+2028 and others that a text may hold.
        lines = [line.removesuffix("\r") for line in file.read_bytes().decode("utf-8-sig").split("\n")]
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{file}: not a text file (UTF-8)") from None
    if file.suffix != ".jsonl":
        return [Prompt(line) for line in lines if line]
    return [_of_json(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def as_line(result: dict[str, Any]) -> str:
    """JSON in one line for every reader, also for those that end a line at more than a line feed."""
    return json.dumps(result, ensure_ascii=False).translate(_LINE_ENDS)


_LINE_ENDS = {number: f"\\u{number:04x}" for number in (0x85, 0x2028, 0x2029)}


def _of_json(line: str, place: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{place}: not JSON: {error}") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ConfigError(f'{place}: must be an object with a text under "prompt"')
    for name in ("id", "max_new_tokens"):
        if entry.get(name) is not None and (not isinstance(entry[name], int) or isinstance(entry[name], bool)):
            raise ConfigError(f'{place}: "{name}" must be an integer, not {json.dumps(entry[name])}')
    return Prompt(entry["prompt"], entry.get("id"), entry.get("max_new_tokens"))
