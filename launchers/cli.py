"""The `cola` command. Each command parses, calls the library, and prints; what it does lives below.

How it ends is in `cola_megatron.errors`.
"""

import contextlib
import io
import sys
import traceback

import typer

from launchers import (
    compare_command,
    config_command,
    convert_command,
    doctor_command,
    eval_command,
    generate_command,
    launch_command,
    plan_command,
    prep_command,
    report_command,
    status_command,
    submit_command,
    sweep_command,
    sync_command,
    train_command,
)
from launchers.output import fail

app = typer.Typer(
    name="cola",
    help="Pretrain continuous latent diffusion language models: prepare, train, convert, generate, evaluate.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(prep_command.app, name="prep")
app.command("config")(config_command.config)
app.command("train")(train_command.train)
# What follows the first word of COMMAND is its own, options too.
app.command("launch", context_settings={"allow_interspersed_args": False})(launch_command.launch)
app.add_typer(submit_command.app, name="submit")
app.command("status")(status_command.status)
app.command("cancel")(status_command.cancel)
app.command("sync")(sync_command.sync)
app.add_typer(sweep_command.app, name="sweep")
app.add_typer(convert_command.app, name="convert")
app.command("generate")(generate_command.generate)
app.add_typer(eval_command.app, name="eval")
app.command("report")(report_command.report)
app.command("compare")(compare_command.compare)
app.command("plan")(plan_command.plan)
app.command("doctor")(doctor_command.doctor)


@app.command("quickstart")
def quickstart(
    runs_folder: str = typer.Option("runs", help="Folder of all runs; the quickstart lives in RUNS_FOLDER/quickstart."),
) -> None:
    """The main job on the embedded corpus: prepare, stage 1, stage 2, export, generate, evaluate, report.

    Finished parts are skipped, so that a second call ends at once.

    Example: `cola quickstart`
    """
    from launchers.quickstart import run_quickstart

    run_quickstart(runs_folder)


def main() -> None:
    """Entry point of the console script."""
    from cola_megatron.cuda_environment import set_allocator
    from cola_megatron.errors import ExitCode, UserError
    from cola_megatron.records.output import Output

    set_allocator()  # no command has imported torch yet
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a locale may lack the characters of a name
            stream.reconfigure(errors="backslashreplace")
    sys.stdout, sys.stderr = Output(sys.stdout, ends=True), Output(sys.stderr)
    try:
        app()
    except UserError as error:
        sys.exit(fail(str(error), error.exit_code))
    except OSError as error:
        message = f"{error.filename}: {error.strerror}" if error.filename is not None else str(error)
        sys.exit(fail(message, ExitCode.FAILED))
    except Exception:
        traceback.print_exc()
        sys.exit(ExitCode.CRASHED)
    finally:
        with contextlib.suppress(SystemExit):  # the code that it ends with is known
            sys.stdout.flush()


if __name__ == "__main__":
    main()
