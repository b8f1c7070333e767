"""Draws docs/parallelism.svg: how a stage-2 step is cut into pipeline stages, and the timetable of its micro-batches.

python -m tools.parallelism_figure           write the picture
python -m tools.parallelism_figure --check   exit code 1 where the picture is not current
python -m tools.parallelism_figure --table   print what crosses a cut at each place of the chain

Nothing in it is written down by hand: what it shows comes from `tools/pipeline_facts.py`.
"""

import argparse
import sys
from pathlib import Path
from xml.sax.saxutils import escape

from cola_megatron.config import RunConfig
from cola_megatron.families import family_of
from cola_megatron.families.cola.chain import Cola
from cola_megatron.planning.split import pipeline_split
from tools.pipeline_facts import (
    BACKWARD_LENGTH,
    Box,
    Crossing,
    boxes,
    crossings,
    crossings_by_place,
    most_in_flight,
    stages_of_a_preset,
    timetable,
)

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "parallelism.svg"
PRESET, STAGES, MICRO_BATCHES = "paper-2b", 4, 8

_STYLE = """
    text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; fill: #1f2933; }
    .heading { font-size: 17px; font-weight: 600; }
    .name { font-size: 14px; font-weight: 600; }
    .note { font-size: 12.5px; fill: #52606d; }
    .file { font-size: 12px; fill: #52606d; font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
    .crosses { font-size: 12px; font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
    .small { font-size: 11.5px; fill: #52606d; }
    .mid { text-anchor: middle; }
    .card { fill: #ffffff; stroke: #cbd2d9; }
    .row { fill: #f5f7fa; stroke: #cbd2d9; }
    .net { fill: #e3f0fb; stroke: #4a90c9; }
    .latent { fill: #e8f5e9; stroke: #57a05b; }
    .loss { fill: #fdecea; stroke: #c9655b; }
    .back { fill: #eee6f8; stroke: #8d6bb8; }
    .way { fill: none; stroke: #52606d; stroke-width: 1.6; marker-end: url(#tip); }
  """

_LEFT, _RIGHT, _BOX_WIDTH, _TOP = 36, 964, 154, 88
_GAP = (_RIGHT - _LEFT - STAGES * _BOX_WIDTH) / (STAGES - 1)


def picture() -> str:
    """The whole SVG."""
    config, model, stages = stages_of_a_preset(PRESET, STAGES)
    contents = [boxes(stage) for stage in stages]
    height = 40 + max(sum(_height(box) + 8 for box in content) for content in contents)
    lines = [*_chain(config, contents, crossings(config, stages), height), *_under(model, _TOP + height)]
    top = _TOP + height + 100
    lines += [f'  <line x1="{_LEFT}" y1="{top}" x2="{_RIGHT}" y2="{top}" stroke="#cbd2d9"/>', *_schedule(top + 34)]
    end = top + 34 + 38 * STAGES + 86
    return "\n".join([*_head(end), *lines, "</svg>", ""])


def table() -> str:
    """Rows of Markdown: what crosses a cut at each place of the chain."""
    lines = ["| cut before | crosses | MB |", "|---|---|---|"]
    for part, crossing in crossings_by_place(PRESET).items():
        names = ", ".join(f"`{each.name}` ({', '.join(map(str, each.shape))})" for each in crossing)
        lines.append(f"| `{part}` | {names} | {sum(each.megabytes for each in crossing):.1f} |")
    return "\n".join(lines)


def _head(height: int) -> list[str]:
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1000 {height}" role="img" '
        'aria-labelledby="title summary">',
        '  <title id="title">A stage-2 step on a pipeline</title>',
        '  <desc id="summary">Above, the chain of a stage-2 step of the published model, cut into stages, with the',
        "    tensors that cross each cut. Below, when each stage runs the forward and the backward pass of each",
        "    micro-batch.</desc>",
        f"  <style>{_STYLE}</style>",
        "  <defs>",
        '    <marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">',
        '      <path d="M0,0.5 L7.5,4 L0,7.5 z" fill="#52606d"/>',
        "    </marker>",
        "  </defs>",
        f'  <rect class="card" x="0.5" y="0.5" width="999" height="{height - 1}" rx="12"/>',
    ]


def _chain(config: RunConfig, contents: list[list[Box]], crossing: list[list[Crossing]], height: int) -> list[str]:
    split, parts = pipeline_split(config), family_of(config).parts(config)
    total = sum(part.flops for part in parts)
    lines = [
        _text("heading", _LEFT, 40, f"The chain of a stage-2 step, cut into {len(contents)} stages"),
        _text("note", _LEFT, 64, f"preset {PRESET}, micro-batches of {config.training.micro_batch_size} sequences"),
    ]
    for css, label, at in (("net", "network", 640), ("latent", "latents", 740), ("loss", "term of the loss", 834)):
        lines += [_rect(css, at, 27, 16, 16, 3), _text("note", at + 23, 40, label)]
    for stage, content in enumerate(contents):
        x, y = _LEFT + stage * (_BOX_WIDTH + _GAP), _TOP + 36
        own = parts[sum(split[:stage]) : sum(split[: stage + 1])]
        lines.append(_rect("row", x, _TOP, _BOX_WIDTH, height, 8))
        lines.append(_text("name mid", x + _BOX_WIDTH / 2, _TOP + 22, f"stage {stage}"))
        for box in content:
            lines.append(_rect(box.css, x + 6, y, _BOX_WIDTH - 12, _height(box), 6))
            lines.append(_text("name mid" if box.css == "net" else "note mid", x + _BOX_WIDTH / 2, y + 18, box.name))
            if box.detail:
                lines.append(_text("small mid", x + _BOX_WIDTH / 2, y + 36, box.detail))
            y += _height(box) + 8
        share, held = sum(part.flops for part in own) / total, sum(part.parameters for part in own) / 1e9
        lines.append(_text("note mid", x + _BOX_WIDTH / 2, _TOP + height + 19, f"{share:.0%} of the FLOPs"))
        lines.append(_text("note mid", x + _BOX_WIDTH / 2, _TOP + height + 36, f"{held:.2f} B parameters"))
        if stage < len(crossing):
            lines += _cut(x + _BOX_WIDTH, crossing[stage])
    return lines


def _cut(x: float, crossing: list[Crossing]) -> list[str]:
    middle, y = x + _GAP / 2, _TOP + 22
    lines = [f'  <path class="way" d="M{x + 4:g},{y} H{x + _GAP - 4:g}"/>']
    for each in crossing:
        lines += [
            _text("crosses mid", middle, y + 22, each.name),
            _text("small mid", middle, y + 38, " x ".join(map(str, each.shape))),
            _text("small mid", middle, y + 54, f"{each.megabytes:.1f} MB"),
        ]
        y += 56
    if any(each.has_gradient for each in crossing):
        y += 22
        lines.append(f'  <path class="way" d="M{x + _GAP - 4:g},{y} H{x + 4:g}"/>')
        names = "their gradients" if all(each.has_gradient for each in crossing) else "gradients"
        lines.append(_text("note mid", middle, y + 18, names))
    return lines


def _under(model: Cola, y: float) -> list[str]:
    given = ", ".join(sorted(model.batch_names))
    return [
        _text("note", _LEFT, y + 64, "Every stage reads its own batch, and what follows from it alone crosses no cut:"),
        _text("file", _LEFT, y + 82, given),
    ]


def _schedule(y: float) -> list[str]:
    table = timetable(STAGES, MICRO_BATCHES)
    end = max(passes[-1].end for passes in table)
    idle = 1 - sum(each.end - each.start for each in table[0]) / end
    unit, left = (_RIGHT - _LEFT - 112) / end, _LEFT + 64
    lines = [
        _text("heading", _LEFT, y, f"One forward, one backward: {MICRO_BATCHES} micro-batches"),
        _rect("net", 506, y - 13, 16, 16, 3),
        _text("note", 529, y, "forward pass"),
        _rect("back", 626, y - 13, 16, 16, 3),
        _text("note", 649, y, f"backward pass, {BACKWARD_LENGTH} times as long"),
        _right(y, "held at most"),
    ]
    for stage, passes in enumerate(table):
        top = y + 18 + 38 * stage
        lines.append(_text("note", _LEFT, top + 20, f"stage {stage}"))
        lines.append(_rect("row", left, top, unit * end, 30, 4))
        for each in passes:
            x, width = left + unit * each.start, unit * (each.end - each.start)
            lines.append(_rect("net" if each.forward else "back", x, top, width, 30, 4))
            lines.append(_text("note mid", x + width / 2, top + 20, str(each.micro_batch)))
        lines.append(_right(top + 20, str(most_in_flight(passes))))
    notes = (
        f"Time runs to the right. Each stage waits for {idle:.0%} of it: (P - 1) / (m + P - 1) for P stages of equal "
        "length and m micro-batches.",
        "Held at most: micro-batches whose activations a stage keeps at once.",
    )
    return [*lines, *(_text("note", _LEFT, y + 42 + 38 * STAGES + 18 * row, note) for row, note in enumerate(notes))]


def _height(box: Box) -> int:
    return 46 if box.detail else 27


def _rect(css: str, x: float, y: float, width: float, height: float, corner: int) -> str:
    return f'  <rect class="{css}" x="{x:.4g}" y="{y:.4g}" width="{width:.4g}" height="{height:.4g}" rx="{corner}"/>'


def _text(css: str, x: float, y: float, text: str) -> str:
    return f'  <text class="{css}" x="{x:.4g}" y="{y:.4g}">{escape(text)}</text>'


def _right(y: float, text: str) -> str:
    return f'  <text class="note" text-anchor="end" x="{_RIGHT}" y="{y:.4g}">{escape(text)}</text>'


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 done or current, 1 not current, 2 wrong use."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.parallelism_figure",
        description="Draw docs/parallelism.svg.",
        epilog="example: python -m tools.parallelism_figure --check",
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where it is not current")
    parser.add_argument("--table", action="store_true", help="print what crosses a cut at each place of the chain")
    options = parser.parse_args(arguments)
    if options.table:
        print(table())
        return 0
    drawn = picture()
    if not options.check:
        PICTURE.write_text(drawn, encoding="utf-8")
        print(PICTURE)
    elif not PICTURE.is_file() or PICTURE.read_text(encoding="utf-8") != drawn:
        print(f"{PICTURE.name} is not current: run `python -m tools.parallelism_figure`", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
