"""Loads a tokenizer as its own tokenizer.json says, whatever class its tokenizer_config.json names.

transformers builds many classes from parts of the file alone: a byte-level file under `LlamaTokenizerFast` loses its
spaces. Where what is loaded cuts or joins a hard text otherwise than the file, the file is loaded as it stands.
"""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

logger = logging.getLogger(__name__)

FILE = "tokenizer.json"
SAMPLE = "Hello, world!  Two  spaces, don't: it 's 3.14 \u00e9t\u00e9\n\n\tif x <= 2: \u4f60\u597d \U0001f642 A\u0301."
"""Text in which tokenizers that are built otherwise than their files say lose spaces, accents or line breaks."""
_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token")


def read_tokenizer(source: str, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder, a hub id or, with the option `gguf_file`, of a file in a folder.

    It is what its tokenizer.json says, with the special tokens and the chat template of its tokenizer_config.json.
    Raises what transformers raises where there is none.
    """
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(source, **options)
    file = None if "gguf_file" in options else find_tokenizer_file(source)
    if file is None or "auto_map" in tokenizer.init_kwargs or is_as_file_says(tokenizer, file):
        return tokenizer
    plain = PreTrainedTokenizerFast.from_pretrained(source)
    if not is_as_file_says(plain, file):
        return tokenizer  # the check of a model's text says so, and refuses it
    for name in _SPECIAL:
        token = getattr(tokenizer, name)
        if getattr(plain, name) is None and token is not None and token in plain.get_vocab():
            setattr(plain, name, token)
    _tell(source, type(tokenizer).__name__)
    setattr(plain, "_opd_in_place_of", type(tokenizer).__name__)  # noqa: B010  no attribute of the class
    return plain


def misbuilt_class(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the class in whose place a tokenizer was loaded as its file says; None where the class was right."""
    return getattr(tokenizer, "_opd_in_place_of", None)


def find_tokenizer_file(source: str) -> Path | None:
    """Return the tokenizer.json of a folder or a hub id; None where there is none."""
    try:
        found = cached_file(source, FILE, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)


def is_as_file_says(tokenizer: PreTrainedTokenizerBase, file: Path) -> bool:
    """True if a tokenizer cuts a hard text as its file says, and joins it again as the file says."""
    own = list(tokenizer(SAMPLE, add_special_tokens=False)["input_ids"])
    told = Tokenizer.from_file(str(file))
    ids = told.encode(SAMPLE, add_special_tokens=False).ids
    if own != ids:
        return False
    joined = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return bool(joined == told.decode(ids, skip_special_tokens=False))


@functools.cache
def _tell(source: str, kind: str) -> None:
    """Say once which tokenizer is not loaded as the class that its settings name."""
    logger.warning(
        "the tokenizer of %r is loaded as its %s says: as %s, which its tokenizer_config.json names, transformers "
        "would build another one",
        source,
        FILE,
        kind,
    )
