"""`cola generate`: prompts from options, files and standard input; what it writes and what it refuses."""

import io
import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cola_megatron import ColaDLM
from cola_megatron.config import ConfigError
from cola_megatron.evaluation.likelihood import texts_of_file
from cola_megatron.inference.protocol import Piece, Preview
from launchers.cli import app
from launchers.generate_terminal import show

FOLDER = Path(__file__).parent / "data" / "reference_tiny"
SHORT = ["--steps", 2, "--max-new-tokens", 8]
SETTINGS = {"steps": 2, "max_new_tokens": 8}


def cola(*arguments: object, given: str = "") -> str:
    """Output of `cola generate` on the golden model; its error is raised as itself."""
    command = ["generate", str(FOLDER), *map(str, arguments)]
    result = CliRunner().invoke(app, command, input=given, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def model() -> ColaDLM:
    return ColaDLM.from_published(FOLDER)


def texts(model: ColaDLM, prompts: list[str], ids: list[int] | None = None, **options) -> list[str]:
    return [output.text for output in model.generate(prompts, ids, **SETTINGS | options)]


def test_prompts_are_options_or_lines_of_a_file(model, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("the prior\n\nof noise\n")
    expected = texts(model, ["a", "the prior", "of noise"])
    answers = json.loads(cola("-p", "a", "--prompts-file", file, "--json", *SHORT))
    assert [(answer["prompt"], answer["text"]) for answer in answers] == list(
        zip(["a", "the prior", "of noise"], expected, strict=True)
    )
    assert cola("-p", "a", *SHORT) == f"a{expected[0]}\n\n"


def test_a_jsonl_file_names_ids_and_lengths_and_results_come_in_its_order(model, tmp_path):
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "found.jsonl"
    lines = [{"prompt": "the prior carries", "id": 7, "note": 1}, {"prompt": "a", "max_new_tokens": 4}, {"prompt": ""}]
    prompts.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    for batch_size in (1, 2, 32):
        assert cola("--prompts-file", prompts, "--output", output, "--batch-size", batch_size, *SHORT) == ""
        found = [json.loads(line) for line in output.read_text().splitlines()]
        assert [(line["prompt"], line["id"]) for line in found] == [("the prior carries", 7), ("a", 1), ("", 2)]
        expected = texts(model, [line["prompt"] for line in lines], [7, 1, 2], max_new_tokens=[8, 4, 8])
        assert [line["text"] for line in found] == expected
        assert [len(line["token_ids"]) for line in found] == [8, 4, 8]


@pytest.mark.parametrize(
    ("options", "settings"),
    [
        (["--temperature", 0.9, "--top-k", 40, "--top-p", 0.9, "--noise-seed", 3],
         {"temperature": 0.9, "top_k": 40, "top_p": 0.9, "noise_seed": 3}),
        (["--solver", "heun", "--guidance-scale", 3, "--guidance-interval", 0.2, 0.8],
         {"solver": "heun", "guidance_scale": 3.0, "guidance_interval": (0.2, 0.8)}),
        (["--noise", "hashed"], {"noise": "hashed"}),
        (["--first-block", "partial_repaint", "--repaint-until", 0.3, "--repaint-rounds", 2],
         {"first_block": "partial_repaint", "repaint_until": 0.3, "repaint_rounds": 2}),
        (["--repetition-penalty", 1, "--stop", "0", "--stop", "M", "--end-of-text", "<|pad|>"],
         {"repetition_penalty": 1.0, "stop": ["0", "M"], "end_of_text": [2]}),
    ],
)  # fmt: skip
def test_every_setting_is_an_option(model, options, settings):
    (answer,) = json.loads(cola("-p", "the prior", "--json", *SHORT, *options))
    (expected,) = model.generate(["the prior"], **SETTINGS | settings)
    assert (answer["text"], answer["finish_reason"]) == (expected.text, expected.finish_reason)
    assert answer["token_ids"] == expected.token_ids.tolist()


def test_bf16_generates():
    (answer,) = json.loads(cola("-p", "the prior", "--json", "--precision", "bf16", *SHORT))
    assert len(answer["token_ids"]) == 8


def test_interactive_without_a_terminal_is_line_by_line(model):
    lines = "the prior\n\na\n"
    expected = [texts(model, ["the prior"], [0])[0], texts(model, ["a"], [1])[0]]
    answers = [json.loads(line) for line in cola("-i", "--json", *SHORT, given=lines).splitlines()]
    for prompt in (0, 1):
        pieces = [answer for answer in answers if answer["prompt"] == prompt]
        assert "".join(piece["text"] for piece in pieces) == expected[prompt]
        assert [piece["finish_reason"] for piece in pieces] == [None, "length"]
    assert cola("-i", *SHORT, given=lines) == "".join(answer["text"] + "\n" for answer in answers)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], r"give --prompt TEXT, --prompts-file FILE or --interactive"),
        (["-i", "-p", "a"], "--interactive reads prompts from standard input"),
        (["-p", "a", "--solver", "rk4"], "solver=rk4 must be one of euler, heun, adams_bashforth"),
        (["-p", "a", "--guidance-interval", 0.9, 0.1], "guidance_interval=0.9,0.1 must be low,high"),
        (["-p", "a", "--top-p", 1.5], "top_p=1.5 must be above 0"),
        (["-p", "a", "--stop", ""], "must be texts that are not empty"),
        (["-p", "a", "--end-of-text", "nothing"], "end_of_text=nothing is no token of this model's tokenizer"),
        (["-p", "a", "--precision", "fp8"], "precision=fp8 must be fp32 or bf16"),
        (["-i", "--steps", 0], "steps=0 must be at least 1"),
        (["-p", "a", "--tensor-parallel-size", 2], "does not divide the 1 processes"),
    ],
)
def test_wrong_use_is_one_line(arguments, message):
    with pytest.raises(ConfigError, match=message) as raised:
        cola(*arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"prompts.jsonl:2: not JSON"),
        ('{"text": "a"}', r'prompts.jsonl:2: must be an object with a text under "prompt"'),
        ('{"prompt": "a", "id": "x"}', r'prompts.jsonl:2: "id" must be an integer, not "x"'),
        ('{"prompt": "a", "max_new_tokens": true}', r'"max_new_tokens" must be an integer, not true'),
        ('{"prompt": "a", "max_new_tokens": 0}', r"max_new_tokens=0 must be at least 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text(f'{{"prompt": "a"}}\n{line}\n')
    with pytest.raises(ConfigError, match=message):
        cola("--prompts-file", file)


class Screen(io.StringIO):
    """As much of a terminal as `show` uses: a window of few lines that scrolls."""

    def __init__(self, columns: int, lines: int):
        super().__init__()
        self.columns, self.height, self.row, self.column, self.full = columns, lines, 0, 0, False
        self.rows = [[" "] * columns for _ in range(lines)]
        self.scrolled: list[str] = []

    def write(self, text: str) -> int:
        for command, number, name, character in re.findall(r"(\033\[(\d*)([A-Za-z]))|([\s\S])", text):
            if command:
                self._command(name, int(number or 1))
            elif character == "\n":
                self._down()
                self.column, self.full = 0, False
            elif character == "\r":
                self.column, self.full = 0, False
            else:
                self._put(character)
        return len(text)

    def _command(self, name: str, number: int) -> None:
        if name == "A":
            self.row = max(0, self.row - number)
        elif name == "C":
            self.column = min(self.columns - 1, self.column + number)
        elif name == "K":
            self.rows[self.row][self.column :] = [" "] * (self.columns - self.column)

    def _put(self, character: str) -> None:
        if self.full:
            self._down()
            self.column, self.full = 0, False
        self.rows[self.row][self.column] = character
        self.full = self.column == self.columns - 1
        self.column += not self.full

    def _down(self) -> None:
        self.row += 1
        if self.row == self.height:
            self.scrolled.append("".join(self.rows.pop(0)))
            self.rows.append([" "] * self.columns)
            self.row -= 1

    @property
    def text(self) -> str:
        """All lines ever shown, as they last were."""
        return "\n".join(line.rstrip() for line in [*self.scrolled, *map("".join, self.rows)]).rstrip()


def wrapped(text: str, columns: int) -> str:
    lines = [line[at : at + columns] for line in text.split("\n") for at in range(0, max(1, len(line)), columns)]
    return "\n".join(line.rstrip() for line in lines).rstrip()


def piece(text: str) -> Piece:
    return Piece(0, text, [], None, 0, None)


@pytest.mark.parametrize("height", [3, 30])
@pytest.mark.parametrize("columns", [7, 10, 80])
def test_a_terminal_ends_with_the_settled_text_alone(columns, height):
    settled = ["lo, wor", "ld, of ", "", "many\nlines of text", " and more", "\n\nend."]
    events = []
    for text in settled:
        events += [Preview(0, 0, 1.0, "guess " * 9), Preview(0, 1, 0.5, f"{text}\nbetter"), piece(text)]
    screen = Screen(columns, height)
    show("hel", events, screen, columns)
    assert screen.text == wrapped("hel" + "".join(settled), columns)


def test_a_preview_stands_dim_below_what_is_settled():
    screen = Screen(20, 10)
    show(
        "once",
        [
            piece(" upon"),
            Preview(0, 3, 0.5, " a time\nthere"),
        ],
        screen,
        20,
    )
    assert screen.text == "once upon\n a time\u23cethere"
    written = io.StringIO()
    show("once", [Preview(0, 3, 0.5, "dim")], written, 20)
    assert "\033[2mdim\033[0m" in written.getvalue()


def test_what_a_terminal_would_obey_is_not_written():
    screen = Screen(20, 5)
    show("a", [piece("\033[2J\x07\tb\r")], screen, 20)
    assert screen.text == "a\ufffd[2J\ufffd    b"


# ---- lines and bytes -----------------------------------------------------------------------------------------------


def test_a_prompt_ends_at_a_line_feed_alone_and_its_results_are_lines_for_every_reader(tmp_path):
    prompts = ["of\u2028noise", "the\u0085prior", "a\x1eb"]
    file, output = tmp_path / "prompts.txt", tmp_path / "found.jsonl"
    file.write_bytes(("\ufeff" + "\r\n".join(prompts) + "\r\n").encode())
    answers = json.loads(cola("--prompts-file", file, "--json", *SHORT))
    assert [(answer["prompt"], answer["id"]) for answer in answers] == list(zip(prompts, range(3), strict=True))
    cola("--prompts-file", file, "--output", output, *SHORT)
    lines = output.read_text().splitlines()  # ends lines at every one of them
    assert [json.loads(line)["prompt"] for line in lines] == prompts
    again = json.loads(cola("--prompts-file", output, "--json", *SHORT))
    assert [answer["text"] for answer in again] == [answer["text"] for answer in answers]


def test_a_byte_order_mark_is_no_part_of_a_text_that_is_scored(tmp_path):
    file = tmp_path / "texts.txt"
    file.write_bytes("\ufeffthe prior\r\nof noise\r\n".encode())
    assert texts_of_file(file, "text", None, None).texts == ["the prior", "of noise"]


def test_a_prompt_that_is_not_utf_8_is_one_line():
    with pytest.raises(ConfigError, match=r"prompts\[0\] is not text: its character 1 is no UTF-8"):
        cola("-p", "a\udcff", *SHORT)


def test_a_line_that_is_not_utf_8_does_not_end_an_interactive_session(model):
    command = ["generate", str(FOLDER), "-i", "--json", *map(str, SHORT)]
    result = CliRunner().invoke(app, command, input=b"the prior\n\xff\xfe\na\n", catch_exceptions=False)
    answers = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert {answer["prompt"] for answer in answers} == {0, 1}
    assert result.output.count("this line is not UTF-8 and is passed over") == 1


def test_results_do_not_overwrite_the_prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a"}\n')
    with pytest.raises(ConfigError, match="would overwrite the prompts"):
        cola("--prompts-file", file, "--output", tmp_path / "." / "prompts.jsonl")
    assert file.read_text() == '{"prompt": "a"}\n'
