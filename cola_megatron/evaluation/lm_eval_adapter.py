"""Any `EvaluationModel` as a model of lm-eval, so that its whole catalogue of tasks runs.

Hand an `EvaluationLM` to `lm_eval.simple_evaluate(model=...)`, or call `evaluate_catalogue`. lm-eval is optional:
importing this module without it raises one `UserError`.
"""

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from cola_megatron.errors import UserError
from cola_megatron.evaluation.decoding import Decoding, cut_at
from cola_megatron.evaluation.harness import batches_by_length
from cola_megatron.evaluation.model import NO_LIKELIHOOD, EvaluationModel
from cola_megatron.parallel import ProcessGroups
from cola_megatron.records.json_files import to_json

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table
except ImportError as error:
    raise UserError(f"lm-eval is not installed ({error}): make setup EXTRAS=eval") from error

# lm-eval's own default, for requests that name no length.
DEFAULT_NEW_TOKENS = 256
LENGTH_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
BATCH_SIZE = 20
# A request's repetitions draw other noise: sample ids of one prompt lie this far apart.
REPETITION_STRIDE = 2**32


class EvaluationLM(LM):
    """Requests of lm-eval, answered by an `EvaluationModel`; lm-eval shares the items out over data-parallel ranks."""

    def __init__(self, model: EvaluationModel, groups: ProcessGroups, batch_size: int = BATCH_SIZE):
        super().__init__()
        self.model, self.groups, self.batch_size = model, groups, batch_size
        self._rank, self._world_size = groups.data_parallel_rank, groups.data_parallel_size
        self._device = groups.device

    @property
    def tokenizer_name(self) -> str:
        """Part of lm-eval's cache keys."""
        return self.model.name

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Texts cut at the first of each request's `until` strings, and at the end of a text, as lm-eval's own models.

        Raises:
            UserError: a request wants a way of sampling that is none of ours.
        """
        prompts = [request.args[0] for request in requests]
        decodings = [replace(read_decoding(request.args[1]), until_end_of_text=True) for request in requests]
        ids = _sample_ids(prompts)
        answers: dict[int, str] = {}
        with self._progress("generate", len(requests)) as bar:
            for decoding in dict.fromkeys(decodings):
                alike = [index for index, own in enumerate(decodings) if own == decoding]
                alike.sort(key=lambda index: -len(prompts[index]))  # what does not fit in memory shows at once
                for place, text in self.model.generate(
                    [prompts[index] for index in alike], [ids[index] for index in alike], decoding, self.batch_size
                ):
                    index = alike[place]
                    answers[index] = cut_at(text, decoding.stop)
                    self.cache_hook.add_partial("generate_until", requests[index].args, answers[index])
                    bar.update()
        return [answers[index] for index in range(len(requests))]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """log p(continuation | context) in nats, and whether greedy decoding gives the continuation.

        Raises:
            UserError: the model gives no log-likelihoods.
        """
        pairs = [_with_its_space(*request.args) for request in requests]
        answers: dict[int, tuple[float, bool]] = {}
        with self._progress("log-likelihood", len(requests)) as bar:
            # By the contexts' lengths: the options of one question stay together.
            for batch in self._batches([len(context) for context, _ in pairs]):
                nats = self._likelihoods([pairs[index] for index in batch])
                for index, value in zip(batch, nats, strict=True):
                    answers[index] = value, self.model.is_greedy(*pairs[index])
                    self.cache_hook.add_partial("loglikelihood", requests[index].args, answers[index])
                    bar.update()
        return [answers[index] for index in range(len(requests))]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """log p(text) in nats, of whole texts: there are no windows, and nothing goes before a text.

        Raises:
            UserError: the model gives no log-likelihoods.
        """
        texts = [request.args[0] for request in requests]
        answers: dict[int, float] = {}
        with self._progress("log-likelihood of texts", len(requests)) as bar:
            for batch in self._batches([len(text) for text in texts]):
                nats = self._likelihoods([("", texts[index]) for index in batch])
                for index, value in zip(batch, nats, strict=True):
                    answers[index] = value
                    self.cache_hook.add_partial("loglikelihood_rolling", requests[index].args, value)
                bar.update(len(batch))
        return [answers[index] for index in range(len(requests))]

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """One small tensor of every data-parallel rank, stacked."""
        if self.world_size == 1:
            return tensor
        gathered = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(gathered, tensor, group=self.groups.data_group)
        return torch.stack(gathered)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of every data-parallel rank on rank `dst` of them, None on the others."""
        if self.world_size == 1:
            return [obj]
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, obj, group=self.groups.data_group)
        return gathered if self.rank == dst else None

    def barrier(self) -> None:
        """Waits for every process of the job."""
        self.groups.barrier()

    def _batches(self, lengths: Sequence[int]) -> Iterator[list[int]]:
        return batches_by_length(range(len(lengths)), lengths, self.batch_size)

    def _likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        estimate = getattr(self.model, "loglikelihood", None)
        if estimate is None:
            raise UserError(f"{self.model.name} {NO_LIKELIHOOD}")
        return estimate([context for context, _ in pairs], [continuation for _, continuation in pairs])

    def _progress(self, what: str, total: int) -> tqdm:
        return tqdm(total=total, desc=what, unit="request", disable=not self.groups.is_main)


@dataclass(frozen=True)
class CatalogueResults:
    """What lm-eval found."""

    document: dict[str, Any]
    """Its own result: `results`, `groups`, `configs`, `samples`, ..."""

    @property
    def metrics(self) -> dict[str, Any]:
        """Metrics by task."""
        return self.document["results"]

    @property
    def table(self) -> str:
        """lm-eval's tables of tasks and groups."""
        tables = [make_table(self.document)]
        if self.document.get("groups"):
            tables.append(make_table(self.document, "groups"))
        return "\n".join(tables)

    def as_json(self) -> str:
        """The whole document."""
        return to_json(self.document, indent=1, default=handle_non_serializable) + "\n"


def evaluate_catalogue(
    model: EvaluationModel,
    tasks: Sequence[str],
    groups: ProcessGroups,
    batch_size: int = BATCH_SIZE,
    include_path: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
) -> CatalogueResults | None:
    """Runs tasks of lm-eval by name; `include_path` is a folder with further task files.

    Returns:
        The results on the main process, None on the others.

    Raises:
        UserError: a name is none of its tasks, its data are not here, or the model lacks what a task asks for.
    """
    catalogue = TaskManager(include_path=str(include_path) if include_path is not None else None)
    for name in tasks:
        if not catalogue.match_tasks([name]):
            raise UserError(f"lm-eval has no task {name!r}: `lm-eval ls tasks` lists them")
    try:
        document = lm_eval.simple_evaluate(
            model=EvaluationLM(model, groups, batch_size),
            tasks=list(tasks),
            task_manager=catalogue,
            num_fewshot=shots,
            limit=limit,
        )
    except (ConnectionError, FileNotFoundError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"the data of {', '.join(tasks)} are not here ({reason}); --download fetches them") from error
    return CatalogueResults(document) if document is not None else None


def read_batch_size(given: int | str) -> int:
    """A batch size as lm-eval's users write it: "auto" (or "auto:4") is the default here, no result depends on it.

    Raises:
        UserError: it is no number.
    """
    if str(given).partition(":")[0] == "auto":
        return BATCH_SIZE
    try:
        size = int(given)
    except ValueError:
        size = 0
    if size < 1:
        raise UserError(f"batch_size={given} must be a number of prompts, at least 1, or auto")
    return size


def read_decoding(arguments: dict[str, Any]) -> Decoding:
    """A request's generation arguments in our terms.

    As in lm-eval, greedy unless `do_sample` or a temperature says otherwise.

    Raises:
        UserError: it samples in a way that is none of ours.
    """
    arguments = dict(arguments)
    lengths = [arguments.pop(name) for name in LENGTH_NAMES if name in arguments]
    stop = arguments.pop("until", None) or ()
    temperature, top_k, top_p = (arguments.pop(name, None) for name in ("temperature", "top_k", "top_p"))
    samples = arguments.pop("do_sample", temperature is not None and float(temperature) > 0)
    if samples and arguments:
        name, value = next(iter(arguments.items()))
        raise UserError(f"{name}={value}: sampling here knows temperature, top_k and top_p alone")
    greedy = Decoding(
        max_new_tokens=int(next((length for length in lengths if length is not None), DEFAULT_NEW_TOKENS)),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
    )
    if not samples:
        return greedy
    return replace(
        greedy,
        temperature=1.0 if temperature is None else float(temperature),
        top_k=0 if top_k is None else int(top_k),
        top_p=1.0 if top_p is None else float(top_p),
    )


def _with_its_space(context: str, continuation: str) -> tuple[str, str]:
    """White space at the end of a context belongs to the continuation, as in lm-eval: tokens begin with it."""
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _sample_ids(prompts: Sequence[str]) -> list[int]:
    """By prompt, so that an answer depends neither on the order nor on the number of requests."""
    seen: Counter[str] = Counter()
    ids = []
    for prompt in prompts:
        ids.append(zlib.crc32(prompt.encode(errors="surrogatepass")) + REPETITION_STRIDE * seen[prompt])
        seen[prompt] += 1
    return ids
