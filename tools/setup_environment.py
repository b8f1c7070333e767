"""Create or update the project's virtual environment from a bare Python 3.11 or 3.12, with pip alone.

    python3 -m tools.setup_environment --venv .venv --extras dev,report

A plain `pip install -e .` is a bad start, and this script exists for it: whoever asks for torch loosely gets the newest
CUDA build, gigabytes that a machine without a GPU cannot use, so everything is held to one torch: the one that is
there, or the pinned one. And mosaicml-streaming has to come without its dependencies (pyproject.toml says why).
docs/install.md is the same story for users.

A stamp in the environment holds a hash of all that decides its contents, and the extras it has. It is removed before
anything changes and written last, so a setup that failed or was interrupted is never taken for a finished one.
"""

from __future__ import annotations

import argparse
import fcntl
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

if __name__ == "__main__" and not __package__:
    # Run as a file, Python looks for `tools` beside this file.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tools.environment.packages import check_compiled_extra, choose_torch, install, step
from tools.environment.project import Options, Project, SetupError, check_python, fingerprint, read_project
from tools.environment.virtual_environment import Environment


def set_up(project: Project, options: Options) -> bool:
    """Bring the environment up to date; returns False where it already was.

    Raises SetupError with one line for the user where a step fails. No stamp is left then.
    """
    environment = Environment(options.venv)
    digest = fingerprint(project, options)
    if environment.is_current(digest, options.extras):
        return False
    with exclusive(project):
        if environment.is_current(digest, options.extras):  # another command finished it while we waited
            return False
        # An extra that was asked for once stays: `make test` after `make setup EXTRAS=prep` must not undo it.
        kept = environment.stamped()[1] & project.extras.keys()
        options = replace(options, extras=tuple(sorted(kept.union(options.extras))))
        print(f"Setting up {options.venv} ({', '.join(('base', *options.extras))})", flush=True)
        try:
            with step("virtual environment"):
                environment.create(options.system_site_packages)
            environment.log.unlink(missing_ok=True)
            torch = choose_torch(environment, project)
            check_compiled_extra(environment, options, torch)
            environment.stamp.unlink(missing_ok=True)
            install(environment, project, options, torch)
            environment.finish(digest, options.extras)
        except OSError as error:
            raise SetupError(f"cannot write {error.filename or options.venv}: {error.strerror}") from error
    return True


@contextmanager
def exclusive(project: Project) -> Iterator[None]:
    """Hold the checkout's setup lock: two commands that start at once must not install over each other."""
    # A file that is there anyway; opened for writing because NFS gives exclusive locks on no other.
    with project.constraints.open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("Another setup of this checkout is running: waiting for it", flush=True)
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            print(f"note: no lock on this file system ({error.strerror}): run one setup at a time", flush=True)
        yield  # closing the file releases the lock


def parse(arguments: list[str] | None, project: Project) -> Options:
    """The command line; exits with 2 for a wrong use."""
    parser = argparse.ArgumentParser(
        prog="python3 -m tools.setup_environment",
        description="Create or update the project's virtual environment with pip.",
        epilog="example: python3 -m tools.setup_environment --extras dev,report,prep",
    )
    parser.add_argument("--venv", type=Path, default=Path(".venv"), help="where it lives (default: %(default)s)")
    parser.add_argument(
        "--extras",
        default="dev,report",
        help=f"comma-separated, of {', '.join(sorted(project.extras))} (default: %(default)s)",
    )
    parser.add_argument(
        "--system-site-packages",
        action="store_true",
        help="let the environment see this Python's own packages, to use a torch that is installed there",
    )
    given = parser.parse_args(arguments)
    extras = tuple(dict.fromkeys(filter(None, (name.strip() for name in given.extras.split(",")))))
    unknown = [name for name in extras if name not in project.extras]
    if unknown:
        parser.error(f"unknown extra {', '.join(unknown)}: choose from {', '.join(sorted(project.extras))}")
    return Options(given.venv.absolute(), extras, given.system_site_packages)


def main(arguments: list[str] | None = None, root: Path | None = None) -> int:
    """The command: 0 done or nothing to do, 1 failed, 2 wrong use, 130 interrupted."""
    try:
        check_python(tuple(sys.version_info[:3]), sys.executable)
        project = read_project(root or Path(__file__).resolve().parents[1])
        options = parse(arguments, project)
        if set_up(project, options):
            print(f"Done: {options.venv / 'bin' / 'cola'}", flush=True)
    except SetupError as error:
        print(f"setup failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup interrupted: run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
