"""Which files of a folder hold a task's items."""

import re
from pathlib import Path

from cola_megatron.evaluation.errors import EvaluationError
from cola_megatron.evaluation.files import READERS, read_rows
from cola_megatron.evaluation.tasks import Dataset, Task

# Other words for a split in file names.
SPLIT_WORDS = {"validation": ("validation", "val", "dev"), "test": ("test",)}
# What `datasets` writes beside the data: descriptions, and results of transformations.
_BESIDE_THE_DATA = re.compile(r"state\.json|dataset_(dict|infos?)\.json|cache-.*")
_SHARD_NUMBER = re.compile(r"-?\d{4,}(-of-\d+)?$")


def find_files(data: Path, task: Task) -> list[Path]:
    """The files of a task below `data`: DATA/TASK.jsonl (or another suffix), else those of the split in DATA/TASK/.

    DATA/TASK/ is what `datasets` saved to disk, a clone of the hub's repository, or the original files.

    Raises:
        EvaluationError: there is none, or more than one set of files fits.
    """
    single = [path for suffix in READERS if (path := data / f"{task.name}{suffix}").is_file()]
    if single:
        return single[:1]
    folder = data / task.name
    if not folder.is_dir():
        raise EvaluationError(
            f"{data} holds no data for {task.name}: put {task.name}.jsonl (id, prompt, ground_truth, choices) there, "
            f"or a copy of the dataset {task.dataset} as {folder}; cola downloads nothing"
        )
    files = _of_config(_of_split(folder, task), folder, task.dataset)
    # MMLU comes as one folder per subject when it has no "all": together they are the task.
    kinds = {_SHARD_NUMBER.sub("", path.stem) for path in files}
    folders = {path.parent for path in files}
    if len(kinds) > 1 or (len(folders) > 1 and task.name != "mmlu"):
        names = ", ".join(str(path.relative_to(folder)) for path in files[:3])
        raise EvaluationError(f"{folder}: several files may be {task.dataset} ({names}); leave the one that is meant")
    return files


def _of_split(folder: Path, task: Task) -> list[Path]:
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix in READERS and path.is_file() and not _BESIDE_THE_DATA.fullmatch(path.name)
    )
    words = "|".join(SPLIT_WORDS[task.dataset.split])
    named = re.compile(rf"(^|[/_.-])({words})([/_.-]|$)")
    files = [path for path in found if named.search(str(path.relative_to(folder)))]
    if files:
        return files
    if _saved_split(folder) in (task.dataset.split, ""):
        return [path for path in found if path.parent == folder and path.suffix == ".arrow"]
    raise EvaluationError(
        f"{folder}: none of its {len(found)} data files names the split {task.dataset.split}; "
        f"a copy of {task.dataset} is needed"
    )


def _saved_split(folder: Path) -> str | None:
    """The split that `datasets` saved by itself in this folder ("" where it does not say), None where it did not."""
    state = folder / "state.json"
    if not state.is_file():
        return None
    ((_, row),) = read_rows(state)
    return row.get("_split") or ""


def _of_config(files: list[Path], folder: Path, dataset: Dataset) -> list[Path]:
    """The files of the dataset's configuration, where the folder is sorted by configuration."""
    chosen = [path for path in files if dataset.config in path.relative_to(folder).parts]
    return chosen or files
