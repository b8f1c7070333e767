"""The one place that imports mosaicml-streaming.

``import streaming`` imports torchvision (for ``streaming.vision``) and transformers (for ``streaming.text`` and
``streaming.base.dataloader``), although reading and writing MDS shards needs neither. Beside a CPU build of torch,
torchvision is absent or broken ("operator torchvision::nms does not exist"). Where one of the two cannot be
imported, this module puts placeholders for it into ``sys.modules`` for just the duration of the import and takes
them out again, so that no other library ever finds a false torchvision or transformers. Where both work, it does
nothing.

Besides torch and numpy, importing streaming 0.13.0 needs: Brotli, python-snappy, zstd, xxhash, catalogue, tqdm,
filelock, Pillow and typing_extensions. Its cloud clients (boto3, google-cloud-storage, oci, azure-*, paramiko, ...)
are imported only when a remote path of their kind is opened; this project hands it local paths only.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Iterator
from types import ModuleType

# torch looks for neither package after its own import: imported first, it cannot meet a placeholder.
import torch  # noqa: F401

from cola_megatron.errors import UserError

__all__ = ["FileInfo", "MDSReader", "MDSWriter", "compress", "decompress"]

logger = logging.getLogger(__name__)

# Every name that streaming 0.13.0 takes from the two packages at import, by module.
IMPORTED_NAMES: dict[str, dict[str, tuple[str, ...]]] = {
    "torchvision": {
        "torchvision.datasets": ("VisionDataset",),
        "torchvision.transforms.functional": ("to_tensor",),
    },
    "transformers": {
        "transformers.feature_extraction_utils": ("BatchFeature",),
        "transformers.tokenization_utils_base": ("BatchEncoding",),
        "transformers.models.auto.tokenization_auto": ("AutoTokenizer",),
    },
}


def _is_usable(package: str) -> bool:
    """Whether every name that streaming takes from `package` can really be imported."""
    try:
        return all(
            hasattr(importlib.import_module(module), name)
            for module, names in IMPORTED_NAMES[package].items()
            for name in names
        )
    except Exception as error:  # a torchvision built for another torch raises RuntimeError, OSError, ...
        logger.debug("%s cannot be imported (%s); streaming gets placeholders for it", package, error)
        return False


def _placeholder_class(package: str, name: str) -> type:
    """A class that can be inherited from and named in `isinstance`, but not instantiated."""

    def refuse(self: object, *args: object, **kwargs: object) -> None:
        raise ImportError(f"{name} needs {package}, which cannot be imported here")

    return type(name, (), {"__init__": refuse})


def _placeholder_modules(package: str) -> dict[str, ModuleType]:
    """The modules of `package` that streaming imports, with their parents, by full name."""
    modules: dict[str, ModuleType] = {}
    for module, names in IMPORTED_NAMES[package].items():
        parts = module.split(".")
        for depth in range(1, len(parts) + 1):
            full_name = ".".join(parts[:depth])
            placeholder = modules.setdefault(full_name, ModuleType(full_name))
            placeholder.__path__ = []
        for name in names:
            setattr(modules[module], name, _placeholder_class(package, name))
    return modules


def _take_out(package: str) -> dict[str, ModuleType]:
    """Remove `package` and its submodules from ``sys.modules``; returns what was there."""
    names = [name for name in sys.modules if name == package or name.startswith(package + ".")]
    return {name: sys.modules.pop(name) for name in names}


@contextlib.contextmanager
def _placeholders(package: str) -> Iterator[None]:
    """Have placeholders for `package` in ``sys.modules`` inside the block, and what was there before after it."""
    before = _take_out(package)
    sys.modules.update(_placeholder_modules(package))
    try:
        yield
    finally:
        _take_out(package)
        sys.modules.update(before)


def _import_streaming() -> None:
    """Import streaming, with placeholders for whichever of its two heavy needs cannot be imported.

    Raises:
        UserError: streaming itself, or one of its small needs, is not installed.
    """
    if "streaming" in sys.modules:
        return
    with contextlib.ExitStack() as stack:
        for package in IMPORTED_NAMES:
            if not _is_usable(package):
                stack.enter_context(_placeholders(package))
        try:
            importlib.import_module("streaming")
        except ModuleNotFoundError as error:
            raise UserError(
                f"mosaicml-streaming cannot be imported: {error}; make setup, or "
                "pip install --no-deps mosaicml-streaming==0.13.0 (docs/install.md)"
            ) from error


_import_streaming()

from streaming.base.compression import compress, decompress  # noqa: E402
from streaming.base.format.base.reader import FileInfo  # noqa: E402
from streaming.base.format.mds import MDSReader, MDSWriter  # noqa: E402
