"""Text, tokenizer and training windows for the demo checkpoints.

The corpus is the Python standard library of the running interpreter. Files are read in a fixed order,
duplicates and generated tables are left out, and about two per cent of the files are held out by a hash
of their path. Chat samples are made from documented functions: the user asks for a function by name and
first docstring sentence, the assistant answers with its source.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import sysconfig
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

FastTokenizer: Any = PreTrainedTokenizerFast
VOCAB_SIZE = 4096
ENDOFTEXT, END = "<|endoftext|>", "<|end|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [ENDOFTEXT, USER, ASSISTANT, SYSTEM, END]
SYSTEM_PROMPT = "You are a helpful Python assistant."

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# A run of line breaks takes the indentation that follows it, so "\n        " is a single token.
SPLIT_PATTERN = (
    r"[ ._]?\p{L}+"
    r"|\p{N}{1,3}"
    r"|(?:\r?\n)+[ \t]*"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|[ \t]+(?! )"
    r"|\s+"
)

SKIPPED_FOLDERS = {
    "site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data",
    "__pycache__", "msilib",
}  # fmt: skip
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "lib-dynload")
SKIPPED_FILES = {"html/entities.py", "stringprep.py"}

PHRASINGS = (
    "Write the function `{name}({args})`. {sentence}",
    "Write the function {name}({args}). {sentence}",
    "Write a Python function `{name}`. {sentence}",
    "Write a function named {name}. {sentence}",
    "Implement `{name}({args})`: {sentence}",
    "{sentence} Call the function `{name}`.",
)

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Corpus:
    """Source texts, split by file into a training and a held-out part."""

    train: list[str]
    heldout: list[str]


def _wanted(path: Path) -> bool:
    if SKIPPED_FOLDERS.intersection(path.parts) or path.as_posix() in SKIPPED_FILES:
        return False
    return not any(part.startswith(SKIPPED_PREFIXES) for part in path.parts)


def _is_heldout(path: Path, one_in: int = 50) -> bool:
    digest = hashlib.sha256(path.as_posix().encode()).digest()
    return int.from_bytes(digest[:4], "big") % one_in == 0


def load_corpus() -> Corpus:
    """Read the standard library's sources in sorted path order, without duplicates."""
    root = Path(sysconfig.get_paths()["stdlib"])
    corpus, seen = Corpus([], []), set()
    for relative in sorted(path.relative_to(root) for path in root.rglob("*.py")):
        if not _wanted(relative):
            continue
        try:
            text = (root / relative).read_text(encoding="utf-8").replace("\r\n", "\n").strip("\n")
        except UnicodeDecodeError:
            continue
        if len(text) < 64 or text in seen:
            continue
        seen.add(text)
        (corpus.heldout if _is_heldout(relative) else corpus.train).append(text + "\n")
    return corpus


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Train a byte-level BPE tokenizer of exactly VOCAB_SIZE entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise RuntimeError(f"the tokenizer has {tokenizer.get_vocab_size()} entries, wanted {VOCAB_SIZE}")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, the chat template inside the latter."""
    wrapped = FastTokenizer(
        tokenizer_object=tokenizer,
        eos_token=ENDOFTEXT,
        pad_token=ENDOFTEXT,
        additional_special_tokens=[token for token in SPECIAL_TOKENS if token != ENDOFTEXT],
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )
    wrapped.save_pretrained(folder, save_jinja_files=False)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _first_sentence(docstring: str) -> str:
    paragraph = " ".join(docstring.strip().split("\n\n")[0].split())
    sentence = paragraph.split(". ")[0].rstrip(".")
    return sentence + "." if sentence else ""


def _functions(text: str) -> Iterator[tuple[str, str, str, str]]:
    """Yield (name, arguments, first docstring sentence, dedented source) of the documented functions."""
    try:
        tree = ast.parse(text)
    except SyntaxError:
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        sentence = _first_sentence(ast.get_docstring(node) or "")
        if not 8 <= len(sentence) <= 200 or "`" in sentence:
            continue
        args = ", ".join(arg.arg for arg in [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
        source = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
        yield node.name, args, sentence, source


def chat_text(user: str, assistant: str, system: str = "") -> str:
    """Render one exchange exactly as the chat template does."""
    head = f"{SYSTEM}\n{system}{END}\n" if system else ""
    return f"{head}{USER}\n{user}{END}\n{ASSISTANT}\n{assistant}{END}\n"


def chat_samples(texts: list[str], seed: int, limit: int = 1600) -> list[str]:
    """Make a chat sample from each documented function of at most `limit` characters."""
    rng, seen, samples = random.Random(seed), set(), []
    for text in texts:
        for name, args, sentence, source in _functions(text):
            if len(source) > limit or source in seen:
                continue
            seen.add(source)
            user = rng.choice(PHRASINGS).format(name=name, args=args, sentence=sentence)
            samples.append(chat_text(user, source, SYSTEM_PROMPT if rng.random() < 0.2 else ""))
    return samples


def encode_all(tokenizer: Tokenizer, texts: list[str]) -> list[IntArray]:
    """Encode each text into an array of token ids."""
    return [np.array(item.ids, dtype=np.int64) for item in tokenizer.encode_batch(texts)]


def packed(documents: list[IntArray], endoftext: int) -> IntArray:
    """Join documents into one stream, each preceded by the end-of-text token."""
    mark = np.array([endoftext], dtype=np.int64)
    return np.concatenate([part for document in documents for part in (mark, document)] + [mark])


class WindowSampler:
    """Endless training rows: windows of the packed files, and rows of whole chat samples."""

    def __init__(self, files: list[IntArray], chats: list[IntArray], endoftext: int, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.files, self.chats, self.endoftext = files, chats, endoftext
        self._raw: dict[int, Iterator[IntArray]] = {}
        self._chat: dict[int, Iterator[IntArray]] = {}

    def _raw_rows(self, length: int) -> Iterator[IntArray]:
        while True:
            order = self.rng.permutation(len(self.files))
            stream = packed([self.files[index] for index in order], self.endoftext)
            stream = stream[int(self.rng.integers(length)) :]
            for row in self.rng.permutation(len(stream) // length):
                yield stream[row * length : (row + 1) * length]

    def _chat_rows(self, length: int) -> Iterator[IntArray]:
        while True:
            row: list[int] = []
            for index in self.rng.permutation(len(self.chats)):
                row.extend(self.chats[index])
                if len(row) >= length:
                    yield np.array(row[:length], dtype=np.int64)
                    row = []

    def batch(self, rows: int, length: int, chat_share: float) -> IntArray:
        """Draw `rows` rows of `length` tokens, on average `chat_share` of them chat."""
        raw = self._raw.setdefault(length, self._raw_rows(length))
        chat = self._chat.setdefault(length, self._chat_rows(length))
        return np.stack([next(chat if self.rng.random() < chat_share else raw) for _ in range(rows)])
