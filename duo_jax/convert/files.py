"""Files of weights: reads those of the reference and the hub, reads and writes our own folders.

A folder holds `model.safetensors` (or `pytorch_model.bin`), with the reference's names, and `config.json`. In our folders,
`config.json` also describes the whole network under `duo_jax`, and the tokenizer is in `tokenizer/`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from duo_jax.config import ALGORITHMS
from duo_jax.convert import arrays, card, infer, pickled
from duo_jax.errors import UserError, first_line
from duo_jax.models.network import Network, Params, Weights

log = logging.getLogger(__name__)

FORMAT = 1
_CONFIG, _WEIGHTS, _TOKENIZER = "config.json", "model.safetensors", "tokenizer"
_FOLDER_FILES = (_WEIGHTS, "pytorch_model.bin")
_PICKLED = (".ckpt", ".pt", ".pth", ".bin")
# Networks that come with the package, by name.
SHIPPED = Path(__file__).parents[1] / "shipped"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def local(path: str | Path) -> Path:
    """Returns a path with `~` expanded, whether or not it exists.

    Raises:
        UserError: it cannot be accessed.
    """
    try:
        found = Path(path).expanduser()
        if found.is_dir():
            next(found.iterdir(), None)
        return found
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def place(path_or_name: str | Path) -> Path:
    """Returns the path itself, or the path of the network of this name that comes with the package.

    Raises:
        UserError: it cannot be accessed.
    """
    path = local(path_or_name)
    shipped = SHIPPED / str(path_or_name)
    return shipped if not path.exists() and (shipped / _WEIGHTS).is_file() else path


def is_folder(path: str | Path) -> bool:
    """Whether a path is a folder of weights and their config, ours or from the hub."""
    path = local(path)
    return (path / _CONFIG).is_file() and any((path / name).is_file() for name in _FOLDER_FILES)


def _config(folder: Path) -> dict[str, Any]:
    """Returns a folder's `config.json`, empty if there is none."""
    path = folder / _CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no settings; get the file again.")
    return config


def step(folder: str | Path) -> int:
    """Returns the training step of a folder's weights, 0 if its config does not state it."""
    ours = _config(local(folder)).get("duo_jax")
    stated = ours.get("step") if isinstance(ours, dict) else None
    return stated if isinstance(stated, int) else 0


def _safetensors(path: Path) -> dict[str, np.ndarray]:
    from safetensors import SafetensorError
    from safetensors.flax import load_file  # the NumPy loader does not know bfloat16

    try:
        path.open("rb").close()  # its error says why the file cannot be read
        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return {key: np.asarray(value) for key, value in load_file(path).items()}
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (
        SafetensorError,
        AttributeError,
        KeyError,
        TypeError,
    ) as error:  # the last three for a type that NumPy lacks
        raise UserError(
            f"{path} is not a safetensors file, or is damaged, or has arrays of an unknown type: {error}."
        ) from error


def _averaged(path: Path, state: dict[str, Any], ema: Any) -> dict[str, Any]:
    """Returns the state with its parameters replaced by their averages.

    The file lists the averages without names, in the order of the parameters in the state dict.
    """
    shadow = ema.get("shadow_params") if isinstance(ema, dict) else None
    if not isinstance(shadow, (list, tuple)):
        raise UserError(f"{path} holds no averaged weights; give --no-ema (in Python: ema=False) for the last ones.")
    names = [name for name in state if name != arrays.INVERSE_FREQUENCY]
    alike = len(names) == len(shadow) and all(
        getattr(state[name], "shape", None) == getattr(value, "shape", ())
        for name, value in zip(names, shadow, strict=True)
    )
    if not alike:
        raise UserError(
            f"{path}: its {len(shadow)} averaged arrays do not match its {len(names)} parameters; give --no-ema (in Python: "
            "ema=False) for the last weights."
        )
    return state | dict(zip(names, shadow, strict=True))


def _pickled(path: Path, ema: bool) -> tuple[dict[str, np.ndarray], dict[str, Any], bool | None]:
    """Returns the arrays in a file of `torch.save`, its config (empty if it has none), and whether they are averaged."""
    with contextlib.closing(pickled.Archive(path)) as archive:
        root = archive.root
        whole = root if isinstance(root, dict) else {}
        lightning = isinstance(whole.get("state_dict"), dict)
        state = arrays.unprefixed(whole["state_dict"] if lightning else whole)
        strange = [key for key, value in state.items() if not isinstance(value, pickled.Tensor)]
        if strange or not state:
            listed = f"{', '.join(map(str, strange[:8]))} are not tensors" if strange else "it is empty"
            raise UserError(f"{path} holds no state dict: {listed}.")
        arrays.check({key: value.shape for key, value in state.items()})
        if lightning and ema:
            state = _averaged(path, state, whole.get("ema"))
        try:
            config = pickled.plain(whole.get("hyper_parameters"))
        except RecursionError:
            config = None
        config = config.get("config", config) if isinstance(config, dict) else {}
        config = config if isinstance(config, dict) else {}
        return {key: archive.array(value) for key, value in state.items()}, config, ema if lightning else None


def _fetched(name: str) -> Path:
    """Returns the local folder of a model of the Hugging Face hub."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[_CONFIG, *_FOLDER_FILES, f"{_TOKENIZER}/*"]))
    except (OSError, ValueError) as error:  # the library's own errors derive from these
        reason = first_line(error)
        raise UserError(f"{name} is not a file or folder here, and the hub does not give it: {reason}") from error


def _open(path_or_name: str | Path) -> tuple[Path, Path]:
    """Returns the file of weights for a path or a hub id, and the folder of its config."""
    path = place(path_or_name)
    if not path.exists():
        # What looks like a local path is a typing mistake, not a model on the hub.
        here = path.suffix in (*_PICKLED, ".safetensors") or path.parent.is_dir()
        if here or not _HUB_ID.fullmatch(str(path_or_name)):
            shipped = " or ".join(sorted(folder.name for folder in SHIPPED.iterdir()))
            raise UserError(
                f"{path} does not exist; give a run's workdir, a file or folder of weights, a hub id, or {shipped} (comes "
                "with the package)."
            )
        path = _fetched(str(path_or_name))
    if path.is_file():
        return path, path.parent
    for name in _FOLDER_FILES:
        if (path / name).is_file():
            return path / name, path
    if any(path.glob("*.index.json")):
        raise UserError(f"{path} holds weights that are split over several files; save them as one model.safetensors.")
    raise UserError(
        f"{path} holds no checkpoint of a run, and none of {', '.join(_FOLDER_FILES)}; give a run's workdir, or a file or "
        "folder of weights."
    )


def read(path_or_name: str | Path, *, ema: bool = True, **asked: Any) -> Params:
    """Returns the network of a file, a folder or a hub id, or one that comes with the package, on the default device.

    Args:
        path_or_name: a file `.ckpt`, `.pt`, `.pth`, `.bin` or `.safetensors`, a folder that holds one, `owner/name`, or the
            name of one of `SHIPPED`.
        ema: the averaged weights of a Lightning checkpoint rather than the last ones; other files hold one set only.
        asked: `algo`, `heads`, `length`, `tokenizer`, for facts that the file does not state.

    Raises:
        UserError: there is nothing, its layout is unknown, or a fact is neither stated nor given.
    """
    path, folder = _open(path_or_name)
    # The config beside another file may be another model's.
    config = _config(folder) if path.name in _FOLDER_FILES else {}
    averaged = None
    if path.suffix == ".safetensors":
        state = arrays.unprefixed(_safetensors(path))
    elif path.suffix in _PICKLED:
        state, inside, averaged = _pickled(path, ema)
        config = inside or config
    else:
        raise UserError(f"{path} is of an unknown kind; give a file {', '.join(_PICKLED)} or .safetensors.")
    if odd := [key for key, value in state.items() if not jnp.issubdtype(value.dtype, jnp.floating)]:
        raise UserError(f"{path} is quantised or not a network: {', '.join(odd[:8])} are not of a floating-point type.")
    state = {key: value.astype(np.float32, copy=False) for key, value in state.items()}
    params = arrays.from_torch(state)
    if broken := [key for key, value in state.items() if not np.isfinite(value).all()]:
        raise UserError(f"{path} holds a network that has diverged: {', '.join(broken[:8])} are not finite.")
    ours = config.get("duo_jax")
    if ours is None:
        network, tokenizer = infer.network(state, infer.facts(config, Path(path_or_name).name), asked)
    else:
        network, tokenizer, averaged = _recorded(folder, ours, ema, asked)
        _check_recorded(folder, network, params, state)
    weights = jax.device_put(params, jax.local_devices()[0])
    return Params(weights=weights, network=network, tokenizer=tokenizer, averaged=averaged)


def _recorded(folder: Path, ours: Any, ema: bool, asked: Mapping[str, Any]) -> tuple[Network, str, bool | None]:
    """Returns the network and the tokenizer that one of our folders records, and whether its weights are averaged."""
    given = [name for name, value in asked.items() if value is not None]
    if given:
        raise UserError(f"{folder} describes its network itself; leave out {', '.join(given)}.")
    try:
        if ours["format"] != FORMAT:
            raise UserError(f"{folder} has format {ours['format']}; this version of duo_jax reads format {FORMAT}.")
        if ours["ema"] and not ema:
            raise UserError(f"{folder} holds the averaged weights only; leave out --no-ema (in Python: ema=False).")
        if ours["ema"] is False and ema:
            log.warning("%s holds the last weights of a run, not the averaged ones.", folder)
        return Network(**ours["network"]), str(folder / _TOKENIZER), ours["ema"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / _CONFIG} is damaged: {error}; export the network again.") from error


def _check_recorded(folder: Path, network: Network, params: Weights, state: Mapping[str, np.ndarray]) -> None:
    """Raises UserError if the config of one of our folders does not fit its weights."""
    try:
        described = jax.eval_shape(network.init, jax.random.key(0))
    except Exception as error:  # impossible sizes may raise anything
        raise UserError(f"{folder / _CONFIG} describes no network: {error}; export the network again.") from error
    shapes = [jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (described, params)]
    heads = network.dim // (2 * state[arrays.INVERSE_FREQUENCY].size) if arrays.INVERSE_FREQUENCY in state else 0
    if shapes[0] != shapes[1] or heads != network.heads or network.algo not in ALGORITHMS:
        raise UserError(
            f"{folder}: {_CONFIG} describes another network than the one in {_WEIGHTS}; export the network again."
        )


def check_new(folder: str | Path) -> Path:
    """Returns the absolute path of a folder that is to be created.

    Raises:
        UserError: it exists and is not an empty folder, or it is named like a file of weights.
    """
    try:
        folder = Path(folder).expanduser().absolute()
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except (OSError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}.") from error
    if folder.suffix in (*_PICKLED, ".safetensors"):
        raise UserError(f"{folder} is the name of a file; give a folder, which will hold {_WEIGHTS}, or a file .ckpt.")
    if taken:
        raise UserError(f"{folder} exists and is not empty; give a new folder.")
    return folder


def write(params: Params, folder: str | Path, save_tokenizer: Callable[[Path], None], *, step: int = 0) -> None:
    """Writes a network to a new folder, from which `read` returns the same bits; writes all of it or nothing.

    Args:
        params: the network.
        folder: created here; it must be missing or empty.
        save_tokenizer: a function that writes the tokenizer's files to a folder.
        step: the training step of the weights, if known.

    Raises:
        UserError: the folder is not empty, or cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    folder, net = check_new(folder), params.network
    state = arrays.to_torch(params)
    config = {
        "model_type": net.algo,
        "vocab_size": net.vocab_size,
        "model_length": net.length,
        "hidden_dim": net.dim,
        "cond_dim": net.cond_dim,
        "n_blocks": net.blocks,
        "n_heads": net.heads,
        "dropout": net.dropout,
        "causal": net.algo == "ar",
        "duo_jax": {"format": FORMAT, "step": step, "ema": params.averaged, "network": dataclasses.asdict(net)},
    }
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        save_file({f"backbone.{key}": value for key, value in state.items()}, aside / _WEIGHTS, {"format": "pt"})
        (aside / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (aside / _WEIGHTS).chmod((aside / _CONFIG).stat().st_mode)  # the library lets only the owner read it
        (aside / "README.md").write_text(card.text(net, folder.name, step), encoding="utf-8")
        save_tokenizer(aside / _TOKENIZER)
        if folder.exists():
            folder.rmdir()
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder} cannot be written: {getattr(error, 'strerror', None) or error}.") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
