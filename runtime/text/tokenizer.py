"""Text to tokens and back, as the checkpoint's ``tokenizer.json`` says.

Owns the tokenizer's files and what its special tokens are. It must not know the engine or the model: on a request's way
it stands first, and under the detokenizer last.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from ...sdk.errors import CheckpointError, InvalidRequest
from .byte_pieces import BytePieces
from .chat_template import ChatTemplate, StrftimeNow
from .json_file import read_json_object

_TOKENIZER_FILE = "tokenizer.json"
_CONFIG_FILE = "tokenizer_config.json"
_OLD_SPECIAL_TOKENS_FILE = "special_tokens_map.json"
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """A Hugging Face tokenizer. Safe to use from several threads.

    ``special_tokens`` maps names such as ``"bos_token"`` to the tokens' texts.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        # Some checkpoints were saved with the limits of a training run; a prompt must never be cut or padded silently.
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self._chat_template = chat_template
        added = backend.get_added_tokens_decoder().values()
        self._special_texts = frozenset(token.content for token in added if token.special)
        self.decoder_kinds = tuple(_decoder_kinds(_decoder_description(backend)))
        self._all_pieces = BytePieces(self.id_to_token)
        self._shown_pieces = BytePieces(self._shown_token)
        self.vocab_size = backend.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self._id_of("bos_token")
        self.eos_token_id = self._id_of("eos_token")

    @classmethod
    def from_directory(cls, path: str | Path, *, strftime_now: StrftimeNow | None = None) -> Tokenizer:
        """Load the tokenizer of a checkpoint directory, with its special tokens and chat templates.

        ``strftime_now`` formats the present moment, for chat templates that write the date; without it they see no
        such function and use the date that they were written with, if they have one.

        Raises: CheckpointError naming the file.
        """
        directory = Path(path)
        file = directory / _TOKENIZER_FILE
        if not file.is_file():
            raise CheckpointError(str(file), _missing_problem(directory))
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises bare Exception
            raise CheckpointError(str(file), f"is no tokenizer that can be read: {error}") from error
        special_tokens = _special_tokens(directory)
        chat_template = ChatTemplate.from_directory(directory, variables=special_tokens, strftime_now=strftime_now)
        return cls(backend, special_tokens=special_tokens, chat_template=chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text; special tokens written out in it count as such.

        Raises: InvalidRequest naming ``prompt``, when it is no valid Unicode text.
        """
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # a lone surrogate cannot be handed to tokenizers
            raise InvalidRequest("prompt", "is not valid Unicode text") from error

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens; ids outside the vocabulary are left out."""
        return self._backend.decode(token_ids, skip_special_tokens=skip_special_tokens)

    def id_to_token(self, token_id: int) -> str | None:
        """Return a token as the vocabulary writes it, None outside the vocabulary."""
        return self._backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary writes it, None when it has none."""
        return self._backend.token_to_id(token)

    def is_special(self, token: str) -> bool:
        """Return whether ``skip_special_tokens`` leaves out a token, given as the vocabulary writes it."""
        return token in self._special_texts

    def byte_pieces(self, skip_special_tokens: bool) -> BytePieces:
        """Return what each token is in bytes, for a byte-level vocabulary; special tokens are none when skipped."""
        return self._shown_pieces if skip_special_tokens else self._all_pieces

    @property
    def has_chat_template(self) -> bool:
        """Whether ``apply_chat_template`` can be used."""
        return self._chat_template is not None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **template_variables: Any,
    ) -> str:
        """Render a chat to text. Encode it with ``add_special_tokens=False``: the template has put them in.

        Raises: InvalidRequest naming ``messages``, ``tools`` or ``chat_template_kwargs``.
        """
        if self._chat_template is None:
            raise InvalidRequest("messages", "this model has no chat template: give a prompt instead")
        return self._chat_template.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            tools=tools,
            extra_variables=template_variables,
        )

    def _shown_token(self, token_id: int) -> str | None:
        token = self._backend.id_to_token(token_id)
        return None if token in self._special_texts else token

    def _id_of(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)


def _missing_problem(directory: Path) -> str:
    if not directory.is_dir():
        return "does not exist, nor does its directory"
    if (directory / "tokenizer.model").is_file():
        return "does not exist; convert tokenizer.model with transformers: AutoTokenizer, then save_pretrained"
    return "does not exist"


def _special_tokens(directory: Path) -> dict[str, str]:
    named: dict[str, str] = {}
    for file in (directory / _OLD_SPECIAL_TOKENS_FILE, directory / _CONFIG_FILE):
        values = read_json_object(file)
        for name in _NAMED_TOKENS:
            match values.get(name):
                case None:
                    pass
                case str(text) | {"content": str(text)}:
                    named[name] = text
                case other:
                    raise CheckpointError(str(file), f"{name} must be a string or have a content, got {other!r}")
    return named


def _decoder_description(backend: tokenizers.Tokenizer) -> Any:
    # The same JSON as in tokenizer.json, without the vocabulary, which takes a second to write out.
    return None if backend.decoder is None else json.loads(backend.decoder.__getstate__())


def _decoder_kinds(decoder: Any) -> Iterator[str]:
    """Yield the kinds of a decoder's parts, in order; none at all without a decoder."""
    if decoder is not None and decoder["type"] == "Sequence":
        for part in decoder["decoders"]:
            yield from _decoder_kinds(part)
    elif decoder is not None:
        yield str(decoder["type"])
