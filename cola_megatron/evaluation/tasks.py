"""The eight published tasks. A task names its prompt template, its matching rule, its decoding and its dataset."""

from dataclasses import dataclass, field

from cola_megatron.config import ConfigError
from cola_megatron.evaluation import columns, prompts, scoring
from cola_megatron.evaluation.decoding import Decoding


@dataclass(frozen=True)
class Dataset:
    """Where a task's items come from, and how a row of the original becomes a question."""

    hub_name: str
    """Its name on the Hugging Face hub."""
    split: str
    read: columns.Reader
    config: str | None = None
    """The dataset's configuration (subset), where it has several."""
    id_column: str | None = None
    """The column that identifies a row; without it a row is known by its position, counted from `first_id`."""
    first_id: int = 0

    def __str__(self) -> str:
        return f"{self.hub_name} ({f'{self.config}, ' if self.config else ''}split {self.split})"


@dataclass(frozen=True)
class Task:
    """One benchmark, as published."""

    name: str
    template: prompts.PromptTemplate
    rule: scoring.Rule
    dataset: Dataset
    decoding: Decoding = field(default_factory=Decoding)


# Story Cloze is given out on request; the ids of LAMBADA and Story Cloze count from 1 in the published files.
_TASKS = (
    Task(
        "lambada",
        prompts.LAMBADA,
        scoring.match_first_word,
        Dataset("EleutherAI/lambada_openai", "test", columns.lambada, config="default", first_id=1),
    ),
    Task("mmlu", prompts.MMLU, scoring.match_option, Dataset("cais/mmlu", "test", columns.mmlu, config="all")),
    Task(
        "obqa", prompts.OBQA, scoring.match_option, Dataset("allenai/openbookqa", "test", columns.obqa, config="main")
    ),
    Task(
        "hellaswag",
        prompts.HELLASWAG,
        scoring.match_text,
        Dataset("Rowan/hellaswag", "validation", columns.hellaswag),
    ),
    Task("race", prompts.RACE, scoring.match_option, Dataset("ehovy/race", "test", columns.race, config="all")),
    Task("siqa", prompts.SIQA, scoring.match_option, Dataset("allenai/social_i_qa", "validation", columns.siqa)),
    Task(
        "squad",
        prompts.SQUAD,
        scoring.match_text,
        Dataset("rajpurkar/squad", "validation", columns.squad, id_column="id"),
    ),
    Task(
        "story_cloze",
        prompts.STORY_CLOZE,
        scoring.match_text,
        Dataset("LSDSem/story_cloze", "test", columns.story_cloze, config="2016", first_id=1),
    ),
)
TASKS = {task.name: task for task in _TASKS}


def task_named(name: str) -> Task:
    """Raises ConfigError for a name that is none."""
    if name not in TASKS:
        raise ConfigError(f"task {name!r} is unknown; the tasks are {', '.join(TASKS)}")
    return TASKS[name]


def tasks_named(names: str) -> list[Task]:
    """The tasks of a comma-separated list, or all of them for "all"; raises ConfigError for a name that is none."""
    if names == "all":
        return list(TASKS.values())
    return [task_named(name) for name in dict.fromkeys(part.strip() for part in names.split(","))]
