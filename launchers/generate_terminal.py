"""`cola generate --interactive`: a terminal that shows blocks as they settle."""

import io
import shutil
import sys
import unicodedata
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, TextIO

from launchers.generate_prompts import as_line

if TYPE_CHECKING:
    from cola_megatron.inference.protocol import Piece, Preview
    from cola_megatron.inference.text_model import TextModel

DIM, PLAIN, CLEAR_LINE, UP = "\033[2m", "\033[0m", "\033[K", "\033[A"


def converse(model: "TextModel", options: dict[str, Any], preview_steps: list[int], as_json: bool = False) -> None:
    """Continues one line of standard input after the other until there are no more.

    In a terminal, settled text grows behind the prompt and the block under way is shown dim below it. Elsewhere each
    settled block is a line of its own: its text, or with `as_json` an object.
    """
    from cola_megatron.inference.protocol import Piece

    in_terminal = sys.stdin.isatty() and sys.stdout.isatty() and not as_json
    for number, prompt in enumerate(_prompts(in_terminal)):
        # Each prompt has noise of its own, and the same one when the same lines are entered again.
        pieces = model.stream([prompt], [number], preview_steps=preview_steps if in_terminal else (), **options)
        if in_terminal:
            show(prompt, pieces, sys.stdout, shutil.get_terminal_size().columns)
            continue
        for piece in pieces:
            assert isinstance(piece, Piece), "previews were not asked for"
            record = {"prompt": number, "text": piece.text, "finish_reason": piece.finish_reason}
            print(as_line(record) if as_json else piece.text, flush=True)


def _prompts(in_terminal: bool) -> Iterator[str]:
    if in_terminal:
        print("One prompt per line; Ctrl-D ends.", file=sys.stderr)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no UTF-8 ends itself, not the session
    while True:
        if in_terminal:
            print("> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        line = line.rstrip("\n")
        if any("\udc80" <= character <= "\udcff" for character in line):
            print("cola: this line is not UTF-8 and is passed over", file=sys.stderr)
        elif line:
            yield line


def show(prompt: str, pieces: Iterable["Piece | Preview"], screen: TextIO, columns: int) -> None:
    """Writes prompt and settled pieces, and each preview in the line below until the next piece or preview comes."""
    from cola_megatron.inference.protocol import Piece

    line = ""  # what stands in the settled text's last line

    def write_settled(text: str) -> str:
        screen.write(text)
        last = (line + text).rpartition("\n")[2]
        if last and _width(last) % columns == 0:
            screen.write(" \r")  # a full line: makes the terminal go on to the next now, not with the next character
        return last

    line = write_settled(_printable(prompt))
    for piece in pieces:
        # Down, clear what was shown there, up again to where the settled text ends: moves that survive scrolling.
        back = f"{UP}\r" + (f"\033[{_width(line) % columns}C" if _width(line) % columns else "")
        if isinstance(piece, Piece):
            screen.write(f"\n{CLEAR_LINE}{back}")
            line = write_settled(_printable(piece.text))
        else:
            screen.write(f"\n{CLEAR_LINE}{DIM}{_fitting(piece.text, columns)}{PLAIN}{back}")
        screen.flush()
    screen.write("\n")
    screen.flush()


def _fitting(text: str, columns: int) -> str:
    """The beginning of a text, in one line."""
    shown, width = "", 0
    for character in _printable(text).replace("\n", "\u23ce"):
        width += _width(character)
        if width >= columns:
            break
        shown += character
    return shown


def _printable(text: str) -> str:
    """Without characters that a terminal obeys: a model may write any byte."""
    kept = text.replace("\t", "    ").replace("\r", "")
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c != "\n" else c for c in kept)


def _width(text: str) -> int:
    """Columns that a text takes."""
    wide = {"W": 2, "F": 2}
    return sum(wide.get(unicodedata.east_asian_width(c), 1) for c in text if not unicodedata.combining(c))
