"""The interface of all tokenizers: text to token ids and back, and saving to a folder.

The ids are `0 .. vocab_size - 1`, including the special ones: `vocab_size` is the K of the diffusion. Encoding never gives
special ids: "<|endoftext|>" or "[EOS]" inside a document is ordinary text.
"""

import abc
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duo_jax.errors import UserError

SPECIAL_IDS = ("bos_id", "eos_id", "pad_id", "mask_id")
CONFIG_FILE = "tokenizer_config.json"


def clean_unicode(text: str) -> str:
    """Returns the text with lone surrogates, which no UTF-8 encoder takes, replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # Pairs of surrogates, which some JSON writers leave, become the character that they stand for.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer(abc.ABC):
    """A tokenizer.

    Attributes:
        name: one of `tokenizers.NAMES`, or `wordpiece` for a Hugging Face tokenizer.json of that kind.
        vocab_size: K, the number of ids, including the special ones.
        bos_id, eos_id, pad_id, mask_id: the special ids; some may be the same number.
        special_names: how `decode(..., special=True)` shows each special id.
    """

    def __init__(self, name: str, vocab_size: int, special: dict[str, int], special_names: dict[int, str]) -> None:
        self.name = name
        self.vocab_size = vocab_size
        self.bos_id, self.eos_id = special["bos_id"], special["eos_id"]
        self.pad_id, self.mask_id = special["pad_id"], special["mask_id"]
        self.special_names = special_names

    def encode(self, text: str) -> list[int]:
        """Returns the ids of one text, without special ids."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, without special ids; uses all cores that the process may run on."""
        return self._encode_batch([clean_unicode(text) for text in texts])

    def decode(self, ids: Sequence[int] | np.ndarray, special: bool = False) -> str:
        """Returns the text of a sequence of ids (a list or an integer array [L]).

        Leaves out special ids, except that an EOS between two pieces of text, the boundary of two documents, becomes a
        blank line. With `special`, shows each special id by its name instead.

        Raises:
            UserError: an id is outside `0 .. vocab_size - 1`.
        """
        ids = np.asarray(ids).astype(np.int64).reshape(-1).tolist()
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise UserError(
                f"Ids from {min(ids)} to {max(ids)} are not ids of the tokenizer {self.name} (0 to "
                f"{self.vocab_size - 1}); decode them with the tokenizer that made them."
            )
        documents: list[list[int]] = [[]]
        pieces: list[str] = []
        for token in ids:
            if token not in self.special_names:
                documents[-1].append(token)
            elif special:
                pieces += [self._decode(documents.pop()), self.special_names[token]]
                documents.append([])
            elif token == self.eos_id:
                documents.append([])
        if special:
            return "".join([*pieces, self._decode(documents[-1])])
        return "\n\n".join(self._decode(document) for document in documents if document)

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer to a folder, created if missing, from which `tokenizers.load` reads it.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_FILE).write_text(json.dumps(self.facts(), indent=2) + "\n", encoding="utf-8")
        for name, content in self._files().items():
            (folder / name).write_bytes(content)

    def digest(self) -> str:
        """Returns the SHA-256 of all that the tokenizer consists of."""
        digest = hashlib.sha256(json.dumps(self.facts()).encode())
        for content in self._files().values():
            digest.update(content)
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """Returns the name, the number of ids and the special ids, as JSON types."""
        return {key: getattr(self, key) for key in ("name", "vocab_size", *SPECIAL_IDS)}

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether two tokenizers decode every id alike, and encode a probe of prose, digits and symbols alike."""
        probe = "The quick brown fox jumps over the lazy dog;  0123456789 (naïve: 東京!)\n"
        ids = range(self.vocab_size)
        return (
            (self.name, self.vocab_size) == (other.name, other.vocab_size)
            and self.encode(probe) == other.encode(probe)
            and all(self.decode([i], special=True) == other.decode([i], special=True) for i in ids)
        )

    @abc.abstractmethod
    def _encode_batch(self, texts: list[str]) -> list[list[int]]: ...

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...

    @abc.abstractmethod
    def _files(self) -> dict[str, bytes]:
        """Returns the files that `save` writes besides the facts: {name: content}."""
        ...
