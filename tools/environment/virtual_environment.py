"""A virtual environment on disk: making it, the pip inside it, and the stamp of a finished setup."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tools.environment.project import SetupError, check_python

STAMP_NAME = ".cola-setup"
LOG_NAME = "setup.log"


class Environment:
    """A virtual environment on disk and the pip inside it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.python = path / "bin" / "python"
        self.log = path / LOG_NAME
        self.stamp = path / STAMP_NAME

    def stamped(self) -> tuple[str, frozenset[str]]:
        """The fingerprint and the extras of the last finished setup; an empty fingerprint where there is none."""
        try:
            digest, *extras = self.stamp.read_text(encoding="utf-8").split()
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return "", frozenset()
        return digest, frozenset(extras)

    def is_current(self, digest: str, extras: tuple[str, ...]) -> bool:
        """Whether a finished setup with this fingerprint, and at least these extras, is in place."""
        stamped, present = self.stamped()
        return self.python.exists() and stamped == digest and present.issuperset(extras)

    def finish(self, digest: str, extras: tuple[str, ...]) -> None:
        """Write the stamp, whole or not at all."""
        draft = self.stamp.with_suffix(".tmp")
        draft.write_text("\n".join((digest, *extras)) + "\n", encoding="utf-8")
        draft.replace(self.stamp)

    def create(self, system_site_packages: bool) -> None:
        """Make the environment, or check that the present one can be used.

        Raises SetupError where the folder is something else, was made with the other choice of
        `system_site_packages`, holds an unsupported Python, or Python cannot make environments.
        """
        if self._has_pip():
            self._check(system_site_packages)
            return
        is_precious = not self.path.is_dir() or any(self.path.iterdir())
        if self.path.exists() and is_precious and not self._settings():
            raise SetupError(f"{self.path} is not a virtual environment: remove it, or name another place with --venv")
        # --clear: whatever is here has no working pip, so an earlier try was cut off or its Python is gone.
        command = [sys.executable, "-m", "venv", "--clear", str(self.path)]
        if system_site_packages:
            command.append("--system-site-packages")
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode != 0:
            raise SetupError(f"cannot make {self.path} with {sys.executable}: {reason(made.stdout + made.stderr)}")

    def version(self, package: str) -> str | None:
        """The installed version of a package as the environment sees it, or None."""
        code = (
            "import importlib.metadata as m, sys\n"
            "try: print(m.version(sys.argv[1]))\n"
            "except m.PackageNotFoundError: pass"
        )
        # -P here and for pip: the working directory's own *.egg-info must not pass for something installed.
        answer = subprocess.run(
            [str(self.python), "-P", "-c", code, package], capture_output=True, text=True, check=True
        )
        return answer.stdout.strip() or None

    def pip(self, step: str, *arguments: str) -> None:
        """Run pip, its output going to the log.

        Raises SetupError naming `step` and pip's own reason where pip fails.
        """
        command = [str(self.python), "-P", "-m", "pip", *arguments]
        settings = os.environ | {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
        with self.log.open("a+", encoding="utf-8", errors="replace") as log:
            print(f"$ pip {' '.join(arguments)}", file=log, flush=True)
            start = log.tell()
            done = subprocess.run(
                command, env=settings, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, check=False
            )
            if done.returncode != 0:
                log.seek(start)
                raise SetupError(f"pip failed at {step}: {reason(log.read())} (all of it: {self.log})")

    def _settings(self) -> dict[str, str]:
        """pyvenv.cfg's keys and values; empty where the folder is no virtual environment."""
        try:
            lines = (self.path / "pyvenv.cfg").read_text(encoding="utf-8").splitlines()
        except (FileNotFoundError, NotADirectoryError):
            return {}
        return {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}

    def _has_pip(self) -> bool:
        if not self._settings() or not self.python.exists():
            return False
        probe = [str(self.python), "-c", "import pip"]
        try:
            return subprocess.run(probe, capture_output=True, check=False).returncode == 0
        except OSError:
            return False

    def _check(self, system_site_packages: bool) -> None:
        """Raises SetupError where the present environment is not what was asked for."""
        code = "import sys; print(*sys.version_info[:3])"
        answer = subprocess.run([str(self.python), "-c", code], capture_output=True, text=True, check=True)
        check_python(tuple(int(part) for part in answer.stdout.split()), str(self.python))
        sees_system = self._settings().get("include-system-site-packages") == "true"
        if sees_system != system_site_packages:
            made = "with" if sees_system else "without"
            raise SetupError(f"{self.path} was made {made} --system-site-packages: remove it, or choose as it was made")


def reason(output: str) -> str:
    """The one line of a failed command's output that says why."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    if any("No space left on device" in line for line in lines):
        return "no disk space (No space left on device)"
    # pip's last ERROR line names the package, but for conflicts, where it names a page about them.
    errors = [line for line in lines if line.startswith(("ERROR:", "Error:")) and "ResolutionImpossible" not in line]
    return (errors or lines or ["no message"])[-1]
