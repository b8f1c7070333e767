"""The import of mosaicml-streaming beside broken and working packages."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run_python(code: str, *extra_paths: Path) -> str:
    paths = os.pathsep.join(map(str, [*extra_paths, ROOT]))
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": paths}
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


def make_package(parent: Path, files: dict[str, str]) -> None:
    for name, content in files.items():
        path = parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in path.relative_to(parent).parents[:-1]:
            (parent / folder / "__init__.py").touch()
        path.write_text(content)


def test_a_broken_torchvision_does_not_matter_and_nobody_sees_a_placeholder(tmp_path: Path) -> None:
    make_package(
        tmp_path,
        {
            "torchvision/__init__.py": "import torchvision.early\nraise RuntimeError('torchvision::nms is absent')",
            "torchvision/early.py": "",
            "transformers/__init__.py": "raise ImportError('built for another Python')",
        },
    )
    code = (
        "import sys, importlib\n"
        "from cola_megatron.data.streaming_backend import MDSReader, MDSWriter\n"
        "for name in ('torchvision', 'transformers'):\n"
        "    assert name not in sys.modules\n"
        "    try:\n"
        "        importlib.import_module(name)\n"
        "    except (RuntimeError, ImportError) as error:\n"
        "        print(error)\n"
        "print(MDSWriter.__module__)\n"
    )
    lines = run_python(code, tmp_path).splitlines()
    assert lines == [
        "torchvision::nms is absent",
        "built for another Python",
        "streaming.base.format.mds.writer",
    ]


def test_working_packages_are_used_as_they_are(tmp_path: Path) -> None:
    make_package(
        tmp_path,
        {
            "torchvision/datasets.py": "class VisionDataset: pass",
            "torchvision/transforms/functional.py": "to_tensor = None",
            "transformers/feature_extraction_utils.py": "class BatchFeature: pass",
            "transformers/tokenization_utils_base.py": "class BatchEncoding: pass",
            "transformers/models/auto/tokenization_auto.py": "class AutoTokenizer: pass",
        },
    )
    code = (
        "import cola_megatron.data.streaming_backend, streaming.base.dataloader as dataloader, sys\n"
        "print(dataloader.BatchEncoding is sys.modules['transformers.tokenization_utils_base'].BatchEncoding)\n"
        "print(sys.modules['torchvision'].__file__)\n"
    )
    assert run_python(code, tmp_path).splitlines() == ["True", str(tmp_path / "torchvision" / "__init__.py")]
