"""What the harness asks of a model, and a generator of text seen that way."""

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import torch

from cola_megatron.errors import UserError
from cola_megatron.evaluation.decoding import Decoding
from cola_megatron.inference.protocol import Generator
from cola_megatron.inference.settings import MAX_SAMPLE_ID, CommonSettings
from cola_megatron.inference.text_generation import finished

NO_LIKELIHOOD = "gives no log-likelihoods: choose tasks that generate (output_type: generate_until)"

# How far greedy decoding is followed to see whether it gives a continuation; doubled from the first to the last.
FIRST_GREEDY_TOKENS, MOST_GREEDY_TOKENS = 16, 4096


class EvaluationModel(Protocol):
    """A model of any family, as the harness sees it.

    `loglikelihood` and `is_greedy` may be left out together, and `prompt_tokens` by what has no tokens.
    """

    name: str
    """What results call it; two names of the same weights make no difference."""

    def describe(self) -> dict[str, Any]:
        """What results depend on, as JSON: weights and settings. A resumed evaluation must find the same."""

    def generate(
        self, prompts: Sequence[str], sample_ids: Sequence[int], decoding: Decoding, batch_size: int
    ) -> Iterator[tuple[int, str]]:
        """Continues all prompts, `batch_size` of them at once: (its place, its text) of each as soon as it has ended.

        A text depends on its prompt and sample id, not on its neighbours.
        """

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        """How long each prompt is to the model, in tokens."""

    def loglikelihood(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        """log p(continuation | context) of each pair, in nats. It does not depend on the others of the batch."""

    def is_greedy(self, context: str, continuation: str) -> bool:
        """Whether the text that greedy decoding writes after the context begins with the continuation."""


def sample_id(item_id: int | str) -> int:
    """The number that an item's noise is drawn from, as published: its id, or the CRC-32 of an id that is no number."""
    try:
        number = int(item_id)
    except ValueError:
        number = None
    if number is None or abs(number) > MAX_SAMPLE_ID:
        return zlib.crc32(str(item_id).encode(errors="surrogatepass"))
    return number


class GeneratorModel:
    """A model that generates text (`inference.protocol.Generator`), of any family, as an `EvaluationModel`.

    A generator that offers `log_likelihood(texts, contexts, ids, **options)`, as `ColaDLM` does, has a likelihood: the
    `elbo` of each result, which is a bound or an estimate where the family knows no exact one.

    Args:
        settings: the family's, such as `FlowSettings`; a request's `Decoding` goes before it.
        likelihood: options of the generator's `log_likelihood`.
    """

    def __init__(
        self, generator: Generator, name: str, settings: CommonSettings, likelihood: dict[str, Any] | None = None
    ):
        self.generator, self.name, self.settings = generator, name, settings
        self.likelihood = likelihood or {}
        # The last greedy text: (context, tokens asked for, text). The options of one question share their context.
        self._greedy = ("", 0, "")

    @property
    def block_tokens(self) -> int:
        """Tokens that are generated at once; 1 for a generator that does not say."""
        return getattr(self.generator, "block_tokens", 1)

    def describe(self) -> dict[str, Any]:
        """The family, a fingerprint of the weights, their precision, and the settings."""
        asked_for = asdict(Decoding())
        settings = {name: value for name, value in asdict(self.settings).items() if name not in asked_for}
        weights = {"weights": _fingerprint(self.generator), **_precision(self.generator)}
        return {"family": type(self.generator).__name__, **weights, **settings}

    def generate(
        self, prompts: Sequence[str], sample_ids: Sequence[int], decoding: Decoding, batch_size: int
    ) -> Iterator[tuple[int, str]]:
        """See `EvaluationModel`.

        Raises:
            UserError: the model cannot write text, or a setting is out of range.
        """
        options = asdict(self.settings) | asdict(decoding)
        if options.pop("until_end_of_text"):
            options["end_of_text"] = (*self.settings.end_of_text, *getattr(self.generator, "end_of_text_ids", ()))
        try:
            pieces = self.generator.stream(list(prompts), ids=list(sample_ids), batch_size=batch_size, **options)
            for index, generation in finished(pieces, len(prompts)):
                yield index, generation.text
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from error

    def prompt_tokens(self, prompts: Sequence[str]) -> list[int]:
        """See `EvaluationModel`; raises UserError where the model came without a tokenizer."""
        tokenizer = getattr(self.generator, "tokenizer", None)
        if tokenizer is None:
            raise UserError(f"{self.name} has no tokenizer.json, and prompts are texts: put it beside the weights")
        return [len(tokenizer.encode(prompt, add_special_tokens=False).ids) for prompt in prompts]

    def loglikelihood(self, contexts: Sequence[str], continuations: Sequence[str]) -> list[float]:
        """See `EvaluationModel`. Pairs with one context share their noise: they differ by their continuations alone.

        Raises:
            UserError: the model offers no likelihood, or cannot read a text.
        """
        estimate = getattr(self.generator, "log_likelihood", None)
        if estimate is None:
            raise UserError(f"{self.name} {NO_LIKELIHOOD}")
        nats = [0.0] * len(continuations)  # of an empty continuation
        asked = [index for index, continuation in enumerate(continuations) if continuation]
        try:
            results = estimate(
                [continuations[index] for index in asked],
                [contexts[index] for index in asked],
                [sample_id(contexts[index]) for index in asked],
                **self.likelihood,
            )
        except ValueError as error:
            raise UserError(f"{self.name}: {error}") from error
        for index, result in zip(asked, results, strict=True):
            nats[index] = result.elbo
        return nats

    def is_greedy(self, context: str, continuation: str) -> bool:
        """See `EvaluationModel`; decoding is greedy in the tokens, with the settings of generation."""
        if self._greedy[0] != context:
            self._greedy = (context, 0, "")
        _, tokens, text = self._greedy
        # Most continuations part from the greedy text at once; the others are followed for as long as they are.
        while len(text) < len(continuation) and continuation.startswith(text) and tokens < MOST_GREEDY_TOKENS:
            tokens = max(FIRST_GREEDY_TOKENS, 2 * tokens)
            ((_, text),) = self.generate([context], [sample_id(context)], Decoding(max_new_tokens=tokens), 1)
        self._greedy = (context, tokens, text)
        return text.startswith(continuation)


def _precision(generator: Generator) -> dict[str, str]:
    """{"precision": such as "fp32"}; nothing for a generator without weights of its own."""
    modules = [module for module in vars(generator).values() if isinstance(module, torch.nn.Module)]
    found = sorted({str(tensor.dtype) for module in modules for tensor in module.parameters()})
    names = {"torch.float32": "fp32", "torch.bfloat16": "bf16"}
    return {"precision": ", ".join(names.get(dtype, dtype) for dtype in found)} if found else {}


def _fingerprint(generator: Generator) -> str:
    """A short hash over names, shapes, types and the first values of every tensor: other weights differ in it."""
    digest = hashlib.sha256()
    for network, module in sorted(vars(generator).items()):
        for name, tensor in sorted(module.state_dict().items()) if isinstance(module, torch.nn.Module) else ():
            first = tensor.flatten()[:16].to("cpu", torch.float64)
            digest.update(f"{network}.{name} {tuple(tensor.shape)} {tensor.dtype} {first.tolist()}\n".encode())
    return digest.hexdigest()[:16]
