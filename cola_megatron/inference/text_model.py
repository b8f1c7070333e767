"""A trained model of any family in one process, for whoever wants text of it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from cola_megatron.config import ModelConfig
from cola_megatron.config.families import check_tensor_parallel
from cola_megatron.data import read_tokenizer
from cola_megatron.errors import UserError
from cola_megatron.inference import text_generation
from cola_megatron.inference.likelihood_terms import Progress, TextLikelihood
from cola_megatron.inference.protocol import Generation, Piece, Preview, Request, Session
from cola_megatron.inference.requests import read_requests, read_settings
from cola_megatron.inference.scored_texts import ScoredText, read_texts
from cola_megatron.inference.settings import CommonSettings
from cola_megatron.interop.weight_source import ModelSource
from cola_megatron.parallel import ProcessGroups, initialize_parallel

PADDING_TOKENS = ("<|pad|>", "<|endoftext|>")
END_OF_TEXT_TOKENS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")


class TextModel(ABC):
    """Networks and tokenizer in evaluation mode. It is an `inference.protocol.Generator`.

    A family's class builds its networks, and says how a batch starts.

    Args:
        config: its model section.
        weights: whole tensors by their names in a checkpoint.
        tokenizer: tokenizer.json; None: prompts are token ids, and there is no text.
        device: by default the GPU of this process, or the CPU.
        dtype: of the weights and of the activations between them.
        tensor_parallel_size: processes that share each matrix. Under torchrun every one of them makes the same calls
            and gets the same answers.
    """

    settings_class: ClassVar[type[CommonSettings]]
    """How to generate."""
    config: ModelConfig
    groups: ProcessGroups
    device: torch.device

    def __init__(
        self,
        config: ModelConfig,
        weights: dict[str, torch.Tensor],
        tokenizer: Path | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        tensor_parallel_size: int = 1,
    ):
        check_tensor_parallel(config, tensor_parallel_size)
        self.groups = initialize_parallel(tensor_parallel_size)
        self.config, self.vocab_size = config, config.vocab_size
        self.device = torch.device(device) if device is not None else self.groups.device
        self.tokenizer_path = tokenizer
        self.tokenizer = read_tokenizer(tokenizer) if tokenizer is not None else None
        self.build(weights, dtype)

    @classmethod
    def from_source(cls, source: ModelSource, **options: Any) -> Self:
        """From weights of any form; `options` are the arguments of the class from `device` on."""
        return cls(source.config, {name: source.read(name) for name in source.shapes}, source.tokenizer, **options)

    @abstractmethod
    def build(self, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
        """Makes the networks of `config` on `device`, in evaluation mode and without gradients, and fills them."""

    @property
    def block_tokens(self) -> int:
        """Tokens that are generated at once: a prompt that ends inside such a block needs padding."""
        return 1

    def require_generation(self) -> None:
        """Raises UserError where this model cannot generate; by default it can."""
        return

    @abstractmethod
    def start(self, requests: Sequence[Request], settings: Any, padding_id: int) -> Session:
        """Begins a batch."""

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        ids: Sequence[int] | None = None,
        *,
        padding_id: int | None = None,
        batch_size: int | None = None,
        **options: Any,
    ) -> list[Generation]:
        """Continues each prompt. Without a tokenizer prompts are token ids, and the texts of the answers are empty.

        Args:
            prompts: texts, or token ids where they are known.
            ids: one integer per prompt; a sample's draws depend on (noise_seed, id, block) alone. Default 0, 1, ...
            padding_id: fills a prompt's last block, or stands for an empty prompt; by default the tokenizer's
                `<|pad|>`, else `<|endoftext|>`.
            batch_size: prompts that are continued at once; default all. No result depends on it.
            options: any fields of the settings of the family. `max_new_tokens` counts tokens in whole blocks (a
                prompt that ends inside a block has its last tokens in the first of them) and may be a list, one number
                per prompt.

        Raises:
            ValueError: settings, ids or token ids out of range, ids that do not match the prompts, no tokenizer.
            UserError: a model that cannot generate.
        """
        return text_generation.collect(
            self.stream(prompts, ids, padding_id=padding_id, batch_size=batch_size, **options), len(prompts)
        )

    def stream(
        self,
        prompts: Sequence[str | Sequence[int]],
        ids: Sequence[int] | None = None,
        *,
        padding_id: int | None = None,
        batch_size: int | None = None,
        preview_steps: Sequence[int] = (),
        **options: Any,
    ) -> Iterator[Piece | Preview]:
        """The same block by block: each block's text as soon as it is settled.

        Args:
            preview_steps: steps of the solver, 0 the first, at which the estimate z - t v of the clean block is decoded
                and shown. This costs a pass of the decoder each and changes nothing.

        Raises:
            ValueError, UserError: as `generate`, at the call.
        """
        self.require_generation()
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        lengths = options.pop("max_new_tokens", self.settings_class.max_new_tokens)
        settings = read_settings(self.settings_class, options)
        requests = read_requests(self.settings_class, prompts, ids, lengths, self._encode_text, self.vocab_size)
        if self.tokenizer is None and settings.stop:
            raise ValueError("stop texts need a tokenizer, and this model came without a tokenizer.json")
        needs_none = padding_id is None and not any(self.needs_padding(request) for request in requests)
        padding = 0 if self.tokenizer is None and needs_none else self._checked_padding(padding_id)
        return text_generation.stream(
            lambda batch: self.start(batch, settings, padding),
            requests,
            self._decode_ids,
            settings,
            batch_size,
            preview_steps,
        )

    @abstractmethod
    def log_likelihood(
        self,
        texts: Sequence[str | Sequence[int]],
        contexts: Sequence[str | Sequence[int]] | None = None,
        ids: Sequence[int] | None = None,
        *,
        padding_id: int | None = None,
        batch_size: int = 16,
        progress: Progress | None = None,
        **options: Any,
    ) -> Sequence[TextLikelihood]:
        """log p(text), or log p(text | context), of each text, or what the family knows of it, in nats.

        Args:
            texts: texts, or token ids where they are known.
            contexts: what goes before each text; None or an empty one: nothing.
            ids: one integer per text; a text's draws depend on (noise_seed, id, draw) alone. Default 0, 1, ...
            batch_size: texts that are computed at once. No result depends on it.
            progress: told (texts done, texts in all).
            options: any fields of the family's settings of a likelihood.

        Raises:
            ValueError: a text without tokens; settings, ids or token ids out of range; numbers that do not match.
        """

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Of a network that reads tokens: ids (L,) -> (L, V), float32; raises UserError where none does."""
        raise UserError(
            f"{type(self).__name__} has no logits of token ids: its network reads latents or noisy embeddings; "
            "log_likelihood scores a text"
        )

    @abstractmethod
    def fixed_outputs(self) -> dict[str, torch.Tensor]:
        """What the model computes from inputs that its config alone decides: two that are the same agree in it."""

    def needs_padding(self, request: Request) -> bool:
        """Whether a prompt has to be filled up: it is empty, or ends inside a block."""
        return not request.token_ids if self.block_tokens == 1 else len(request.token_ids) % self.block_tokens != 0

    @property
    def end_of_text_ids(self) -> tuple[int, ...]:
        """Of the tokens that end a text in the tokenizers that we know, those that this one has."""
        found = [self.tokenizer.token_to_id(token) for token in END_OF_TEXT_TOKENS] if self.tokenizer else []
        return tuple(token for token in found if token is not None)

    def _read_texts(
        self,
        texts: Sequence[str | Sequence[int]],
        contexts: Sequence[str | Sequence[int]] | None,
        ids: Sequence[int] | None,
        batch_size: int,
    ) -> list[ScoredText]:
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        decode = self.tokenizer.decode if self.tokenizer is not None else None
        return read_texts(texts, contexts, ids, self._encode_text, decode, self.vocab_size)

    def _encode_text(self, text: str) -> list[int]:
        if self.tokenizer is None:
            raise ValueError("this model came without a tokenizer.json: give token ids")
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _decode_ids(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=False) if self.tokenizer is not None else ""

    def _padding_of_texts(self, padding_id: int | None) -> int | None:
        """None: without a tokenizer there is none, and texts that fill whole blocks need none."""
        return None if padding_id is None and self.tokenizer is None else self._checked_padding(padding_id)

    def _checked_padding(self, padding_id: int | None) -> int:
        padding = self._padding_id() if padding_id is None else padding_id
        if not 0 <= padding < self.vocab_size:
            raise ValueError(f"padding_id={padding} must lie in 0 .. {self.vocab_size - 1}")
        return padding

    def _padding_id(self) -> int:
        if self.tokenizer is None:
            raise ValueError("prompts that end inside a block need padding_id, and this model came without a tokenizer")
        for token in PADDING_TOKENS:
            found = self.tokenizer.token_to_id(token)
            if found is not None:
                return found
        raise ValueError(f"the tokenizer has none of {', '.join(PADDING_TOKENS)}; give padding_id")
