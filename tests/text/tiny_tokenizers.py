"""Small tokenizers of every family, trained in a moment on a few sentences."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

CORPUS = [
    "The quick brown fox jumps over the lazy dog; it isn't tired.",
    "def add(a, b):\n    return a + b\n\n\nclass Sum:\n        pass\n",
    "Grüße aus Köln, ça va? 你好,世界 — naïve café, 12,345 €.",
    "for i in range(10):\n    print(i, '=>', i ** 2)  # squares",
]
SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
ADDED = ["<tool call>", "é\u2192", "\t\t"]


def _add_tokens(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in ADDED])
    return tokenizer


def id_of(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token that must be there."""
    token_id = tokenizer.token_to_id(token)
    assert token_id is not None, token
    return int(token_id)


@cache
def byte_level() -> Tokenizer:
    """GPT-2, Llama 3, Qwen: bytes as printable characters."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=alphabet)
    )
    return _add_tokens(tokenizer)


@cache
def byte_fallback(strip: int = 1) -> Tokenizer:
    """Llama 2, Mistral (``strip`` 1) and Gemma (0): spaces as underlines, unknown characters as byte tokens."""
    trained = Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    # The ASCII of the corpus and no more: among characters of equal count the trainer would choose by chance.
    alphabet = ["▁", *sorted({char for text in CORPUS for char in text if char.isascii() and char != " "})]
    trainer = trainers.BpeTrainer(
        vocab_size=150, show_progress=False, initial_alphabet=alphabet, limit_alphabet=len(alphabet)
    )
    trained.train_from_iterator(CORPUS, trainer)
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    for piece in sorted(trained.get_vocab(), key=lambda piece: trained.get_vocab()[piece]):
        vocabulary.setdefault(piece, len(vocabulary))
    model = models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = trained.normalizer
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*parts, decoders.Strip(" ", strip, 0)] if strip else parts)
    return _add_tokens(tokenizer)


@cache
def metaspace() -> Tokenizer:
    """T5 and the like: a Unigram model whose decoder drops the first space."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, show_progress=False, unk_token="<unk>", special_tokens=["<unk>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _add_tokens(tokenizer)


@cache
def word_piece() -> Tokenizer:
    """BERT: spaces between words are the decoder's invention."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, show_progress=False, special_tokens=["[UNK]"])
    )
    return _add_tokens(tokenizer)


@cache
def word_ends() -> Tokenizer:
    """GPT-1: the end of a word is marked, and a mark turns into a space only when another token follows."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=200, show_progress=False, special_tokens=["<unk>"], end_of_word_suffix="</w>"
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _add_tokens(tokenizer)


@cache
def no_decoder() -> Tokenizer:
    """No decoder at all: tokens are joined by spaces."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=150, show_progress=False))
    return _add_tokens(tokenizer)


FAMILIES: dict[str, Callable[[], Tokenizer]] = {
    "byte level": byte_level,
    "byte fallback": byte_fallback,
    "byte fallback, nothing stripped": lambda: byte_fallback(0),
    "byte fallback, two stripped": lambda: byte_fallback(2),
    "metaspace": metaspace,
    "word piece": word_piece,
    "word ends": word_ends,
    "no decoder": no_decoder,
}


def with_bos(tokenizer: Tokenizer) -> Tokenizer:
    """A copy that puts <s> before every text."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", copy.token_to_id("<s>"))]
    )
    return copy
