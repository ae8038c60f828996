"""What this library asks of a base's processor and of the tokenizer inside it.

Both are transformers' objects. A language model's processor is its tokenizer itself.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

ChatTemplate = str | Mapping[str, str] | None  # one, or several by name
Turn = Mapping[str, object]  # of a conversation


class AddedToken(Protocol):
    """A token beside the vocabulary that was learned from text."""

    content: str
    special: bool


class Tokenizer(Protocol):
    """A tokenizer of transformers."""

    bos_token: str | None
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    pad_token: str | None
    pad_token_id: int | None
    chat_template: ChatTemplate

    @property
    def special_tokens_map(self) -> Mapping[str, str]:
        """The special tokens, by their names."""
        ...

    @property
    def added_tokens_decoder(self) -> Mapping[int, AddedToken]:
        """The added tokens, by id."""
        ...

    def __call__(
        self,
        text: str,
        **options: object,
    ) -> Mapping[str, Any]:
        """Return the ids of a text's tokens, and what `options` ask for beside them."""
        ...

    def decode(self, ids: Sequence[int], **options: object) -> str:
        """Return the text of some tokens."""
        ...

    def apply_chat_template(
        self,
        turns: Sequence[Turn],
        **options: object,
    ) -> str:
        """Return a conversation as the template writes it."""
        ...

    def add_tokens(self, tokens: Sequence[object], special_tokens: bool = False) -> int:
        """Add tokens that are not there yet; return how many."""
        ...

    def get_vocab(self) -> Mapping[str, int]:
        """Return the ids of all tokens."""
        ...

    def convert_tokens_to_ids(self, tokens: Sequence[str]) -> list[int]:
        """Return the ids of some tokens."""
        ...

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of some ids."""
        ...


class Processor(Protocol):
    """A processor of transformers: texts and images in, model inputs out.

    The attributes about images are missing where it is a language model's tokenizer.
    """

    chat_template: ChatTemplate
    image_token: str
    image_token_id: int
    image_processor: object

    def __call__(
        self,
        *,
        text: str | Sequence[str],
        **options: object,
    ) -> Mapping[str, Any]:
        """Return the inputs of texts, and of the images among `options`."""
        ...


def tokenizer_of(processor: Processor) -> Tokenizer:
    """Return the tokenizer inside a processor; a language model's processor is its tokenizer."""
    either: Any = processor
    return getattr(either, "tokenizer", either)


def is_text_only(processor: Processor) -> bool:
    """Return whether a processor is a language model's: its tokenizer itself."""
    return processor is tokenizer_of(processor)


def pad_token_of(tokenizer: Tokenizer) -> int:
    """Return the id of the padding token, or of the end token where a tokenizer has none.

    Without either it is 0: what is padded is masked.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return token_id
    return 0
