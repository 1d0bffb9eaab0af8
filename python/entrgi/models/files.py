"""Which files a checkpoint consists of, and which of them holds a tensor. Only safetensors and text are read."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor

from entrgi.models.errors import loading
from entrgi.models.fields import read_json

HUB_OPTIONS = ("cache_dir", "local_files_only", "revision", "token")
# Configuration and tokenizer; never code.
_SMALL_FILES = ["*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken", "*.codes", "*.bpe", "*.vocab"]
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# What torch.compile, data parallelism, checkpointing and peft put before and into names.
_WRAPPERS = re.compile(
    r"^(?:_orig_mod\.|module\.|base_model\.model\.)+|(?<=\.)(?:_orig_mod|_checkpoint_wrapped_module)\."
)
_DISTRIBUTED = re.compile(r"shard-\d{5}-model-\d{5}-of-\d{5}\.safetensors")  # transformers would read all of a folder


@dataclass(frozen=True)
class Stored:
    """One tensor of a checkpoint: where it is, its shape and its safetensors dtype, such as ``BF16``."""

    file: Path
    key: str
    shape: list[int]
    kind: str


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint.

    Attributes:
        tensors: by their names without wrappers.
        is_plain: reading every file that the checkpoint names, whole, gives just these under these names.
    """

    tensors: Mapping[str, Stored]
    is_plain: bool

    @property
    def numel(self) -> int:
        """How many numbers they hold."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())


def check_checkpoint(argument: str, name: str | Path, subfolder: str = "") -> None:
    """Raise ValueError where ``name`` is a path without a checkpoint, before anything asks a hub for it."""
    if not isinstance(name, str | Path) or not str(name):
        raise ValueError(f"{argument}: got {name!r}, expected a checkpoint folder or a hub id")
    with loading(argument, name):
        path = Path(name)
        if path.is_dir():
            path = path / subfolder
            _check_config(argument, name, path, f"folder {str(path)!r}")
            return
        if path.exists() or not is_hub_id(name):
            raise ValueError(f"{argument}: no folder {str(name)!r}, expected a checkpoint folder or a hub id")


def _check_config(argument: str, name: str | Path, folder: Path, shown: str) -> None:
    if (folder / "config.json").is_file():
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{argument}: {str(name)!r} is an adapter; expected its base model, and the adapter as adapter="
        )
    raise ValueError(f"{argument}: {shown} has no config.json")


def is_hub_id(name: str | Path) -> bool:
    """Whether ``name`` can only be one of a hub's."""
    return not (Path(name).is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1)


def checkpoint_folder(
    argument: str,
    name: str | Path,
    variant: str | None = None,
    subfolder: str = "",
    *,
    with_weights: bool = True,
    **hub_options: Any,
) -> Path:
    """The folder of a checkpoint: ``name`` itself, or the local copy of a hub id, fetched where it is missing.

    Args:
        argument: what to call the model in an error.
        name: a folder, or a hub id.
        variant: of the weights' files, such as ``fp16``.
        subfolder: where in ``name`` the checkpoint lies.
        with_weights: fetch them, too.
        hub_options: ``revision``, ``cache_dir``, ``token``, ``local_files_only``, as for ``snapshot_download``.

    Raises:
        ValueError: for a hub id that cannot be had.
    """
    if Path(name).is_dir():
        return Path(name) / subfolder
    with loading(argument, name):
        snapshot = _fetched(name, _SMALL_FILES, hub_options)
        folder = snapshot / subfolder
        _check_config(argument, name, folder, repr(str(name)))
        if not with_weights:
            return folder
        inside = f"{subfolder}/" if subfolder else ""
        index, single = _weight_files(variant)
        # All files of one commit, also where the repository moves on meanwhile.
        if snapshot.parent.name == "snapshots":
            hub_options = {**hub_options, "revision": snapshot.name}
        folder = _fetched(name, [inside + single], hub_options) / subfolder
        if (folder / single).exists() or not (folder / index).is_file():
            return folder
        files = sorted({inside + file for file in _weight_map(argument, folder / index).values()})
        return _fetched(name, files, hub_options) / subfolder


def _fetched(name: str | Path, files: list[str], hub_options: Mapping[str, Any]) -> Path:
    return Path(snapshot_download(str(name), allow_patterns=files, **hub_options))


def _weight_files(variant: str | None) -> tuple[str, str]:
    """Names of the index and of the single file."""
    part = f".{variant}" if variant else ""
    return f"model.safetensors.index{part}.json", f"model{part}.safetensors"


def _weight_map(argument: str, index: Path) -> dict[str, str]:
    """The file of each tensor. Raises ValueError where there is none, or is not beside the index."""
    places = read_json(argument, index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{argument}: {str(index)!r} has no 'weight_map', expected the file of each weight")
    return _plain_names(argument, index, places)


def _plain_names(argument: str, index: Path, places: object) -> dict[str, str]:
    """``places``. Raises ValueError unless all are plain names of safetensors files."""
    places = places if isinstance(places, dict) else {}
    for key, place in places.items():
        if (
            not isinstance(place, str)
            or re.search(r"[/\\:\0]", place)
            or not re.fullmatch(r"[^.].*\.safetensors", place)
        ):
            raise ValueError(
                f"{argument}: {str(index)!r} has {place!r:.200} for {key!r:.200}, expected the plain name of a "
                ".safetensors file beside it"
            )
    return places


def stored_weights(argument: str, folder: Path, variant: str | None = None) -> Weights:
    """Every tensor of a checkpoint, from the files' headers alone.

    Where there is a single file, it is the checkpoint; an index beside it that names others is stale, which is
    worth a warning. Otherwise each tensor is read from the file that the index names for it, copies elsewhere are
    not, and one that the index does not name from wherever it is. Wrappers' prefixes of names are taken off.
    Rotary frequencies, which old exports store, are left out: they follow from the config.

    Raises:
        ValueError: for files that are missing or cannot be read, and for tensors that are not where the index
            says, or in two places.
    """
    index, single = _weight_files(variant)
    places: dict[str, str] = {}
    if (folder / single).exists():
        files = [single]
        if (folder / index).is_file():
            _warn_of_stale(argument, folder, index, single)
    elif (folder / index).is_file():
        places = _weight_map(argument, folder / index)
        files = sorted(set(places.values()))
    else:
        files = [single]
    for file in files:
        if not (folder / file).is_file():
            raise ValueError(
                f"{argument}: {str(folder)!r} has no {file}, expected {single}, or {index} and the files it names"
                f"{pickles_beside(folder)}"
            )
    stored: dict[str, Stored] = {}
    # With these beside the weights transformers reads more than them.
    is_plain = not any(
        _DISTRIBUTED.fullmatch(path.name) or path.name == "adapter_config.json" for path in folder.iterdir()
    )
    for file in files:
        for tensor in _header(argument, folder / file):
            if places.get(tensor.key, file) != file:
                is_plain = False
                continue
            name = _WRAPPERS.sub("", tensor.key)
            is_plain = is_plain and name == tensor.key
            if name in stored:
                other = stored[name]
                raise ValueError(
                    f"{argument}: {str(folder)!r} holds {name!r} twice: {other.key!r} in {other.file.name} and "
                    f"{tensor.key!r} in {file}"
                )
            stored[name] = tensor
    held = {tensor.key for tensor in stored.values()}
    lost = sorted(key for key in places.keys() - held if not _is_derived(key))
    if lost:
        raise ValueError(
            f"{argument}: {str(folder)!r} lacks {len(lost)} weights, such as {lost[0]!r}, which its index places in "
            f"{places[lost[0]]}"
        )
    return Weights(stored, is_plain)


def _warn_of_stale(argument: str, folder: Path, index: str, single: str) -> None:
    try:
        places = read_json(argument, folder / index).get("weight_map")
    except ValueError as error:
        warnings.warn(f"{error}; {single} beside it is read", stacklevel=3)
        return
    others = {place for place in _plain_names(argument, folder / index, places).values() if place != single}
    if others:
        warnings.warn(
            f"{argument}: {str(folder)!r} holds {single}, which is read, and an index that names {len(others)} other "
            f"files, such as {min(others)}, which are not",
            stacklevel=3,
        )


def _header(argument: str, file: Path) -> list[Stored]:
    with opened(argument, file) as reader:
        parts = {key: reader.get_slice(key) for key in reader.keys() if not _is_derived(key)}  # noqa: SIM118
        return [Stored(file, key, part.get_shape(), part.get_dtype()) for key, part in parts.items()]


def opened(argument: str, file: Path, device: str = "cpu") -> safe_open:
    """A safetensors file. Raises ValueError where it cannot be read."""
    try:
        return safe_open(file, framework="pt", device=device)
    except Exception as error:
        raise ValueError(f"{argument}: cannot read {str(file)!r}: {error}") from error


def read_tensors(argument: str, tensors: Mapping[str, Stored], device: str = "cpu") -> Iterator[tuple[str, Tensor]]:
    """Each of ``tensors`` with its name, file by file. Raises ValueError where a file cannot be read."""
    for file in sorted({tensor.file for tensor in tensors.values()}):
        with opened(argument, file, device) as reader:
            for name, tensor in tensors.items():
                if tensor.file == file:
                    yield name, reader.get_tensor(tensor.key)


def _is_derived(key: str) -> bool:
    return key.endswith("rotary_emb.inv_freq")


def pickles_beside(folder: Path) -> str:
    """The end of an error for a folder without safetensors: the pickle that it holds instead, if any."""
    found = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    return f"; {found[0]} is a pickle, which can run code and is never read: convert it to safetensors" if found else ""
