"""`cola prep`: raw text to token shards, and their verification."""

from pathlib import Path

import typer

from launchers.output import fail, print_json

app = typer.Typer(help="Turn text into sharded token data sets, and check them.", no_args_is_help=True)


@app.command("run")
def run(
    inputs: list[str] = typer.Argument(
        ..., help="Text files, JSONL (.jsonl, .jsonl.gz), folders of those, or `embedded` for the Python documentation."
    ),
    output: Path = typer.Option(..., help="Folder to write."),
    sequence_length: int = typer.Option(512, help="Tokens per sequence."),
    tokenizer: Path = typer.Option(None, help="A tokenizer.json; without it a byte-level BPE is trained."),
    vocab_size: int = typer.Option(4096, help="Vocabulary of a trained tokenizer."),
    held_out_fraction: float = typer.Option(0.02, help="Share of documents that are held out, by hash of the text."),
    text_field: str = typer.Option("text", help="JSONL field that holds the text."),
    max_tokens: int = typer.Option(None, help="Stop after this many tokens."),
    force: bool = typer.Option(False, help="Replace a data set made with other settings."),
) -> None:
    """Tokenise, pack and write shards with a manifest; a finished folder is left as it is.

    Example: `cola prep run embedded --output data/embedded --vocab-size 2048 --sequence-length 128`
    """
    from pydantic import ValidationError

    from cola_megatron.config import ConfigError
    from cola_megatron.data import read_manifest
    from cola_megatron.errors import UserError
    from data_prep.prepare import PrepSettings, prepare

    try:
        settings = PrepSettings(
            inputs=inputs,
            output=output,
            sequence_length=sequence_length,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            held_out_fraction=held_out_fraction,
            text_field=text_field,
            max_tokens=max_tokens,
        )
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{'.'.join(map(str, problem['loc']))}={problem['input']!r}: {problem['msg']}") from None
    folder = prepare(settings, force=force)
    for split, record in read_manifest(folder).splits.items():
        if record.sequences == 0:
            raise UserError(
                f"{folder}: no document fell into {split}, so nothing can be trained on this. Documents are split by "
                "hash: give more documents (one per line of a JSONL), or a larger --held-out-fraction, with --force"
            )
    print(folder)


@app.command("verify")
def verify(
    folder: Path = typer.Argument(..., help="A prepared folder."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Read everything again and compare it with the manifest; names each bad file.

    Example: `cola prep verify data/embedded`
    """
    from data_prep.verify import verify as check

    report = check(folder)
    if as_json:
        print_json({"ok": report.ok, "problems": list(report.problems), "files": report.files, "bytes": report.bytes})
    elif report.ok:
        print(
            f"{folder}: {report.files} files, {report.sequences:,} sequences, {report.bytes:,} bytes, all as recorded"
        )
    if not report.ok:
        for problem in report.problems:
            fail(problem, 1)
        raise typer.Exit(1)
