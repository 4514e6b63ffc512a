"""The typed settings that every run shares. No torch here: a bad file must fail before anything heavy.

Each field's description is what `opd config --explain KEY` prints. A method's own settings stand in its
file under `trainers/`; `opd.launch.settings.config` joins the two and reads YAML.
"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict


class Strict(BaseModel):
    """A section of the settings: unknown keys are errors, values are frozen once checked."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _address(url: str) -> str:
    """An address of a server and nothing else. Raises ValueError for what cannot be asked."""
    wanted = "a server's address is like http://127.0.0.1:8000, with nothing behind the port"
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError as error:  # of the port, or of the brackets of an IPv6 address
        raise ValueError(f"{url!r}: {error}; {wanted}") from None
    if not named or url.rstrip("/") != f"{parts.scheme}://{parts.netloc}" or "@" in url or not url.isprintable():
        raise ValueError(f"{url!r}: {wanted}")
    return url


ServerAddress = Annotated[str, AfterValidator(_address)]
