"""The Hub's client, patient but not for ever, and what goes wrong with it in plain words."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_token, set_client_factory
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from huggingface_hub.utils._http import default_client_factory  # private, but the version is pinned

__all__ = ["PublishError", "client", "explained"]

SILENCE = 60  # seconds without a byte after which a Hub counts as gone; huggingface_hub itself waits for ever, or 10 s in downloads
ADVICE = {
    401: "the Hub does not know the token: run `hf auth login`, or set HF_TOKEN",
    403: "the token may not write there: take one with write permission for this owner, or another name with --to",
    404: "the Hub does not find it: check the name and what the token may see",
    409: "somebody else is changing it: look at it, then run this again",
    412: "somebody else has changed it in the meantime: look at it, then run this again",
    429: "the Hub asks for a pause: wait some minutes, then run this again",
}


class PublishError(ValueError):
    """Something that cannot be published, or a Hub that refused it; the message says what to do."""


def client(endpoint: str | None = None, token: str | None = None) -> HfApi:
    """The official client, for this process with a limit to how long it waits. Raises PublishError for what cannot be a token."""
    set_client_factory(_impatient)
    if not re.fullmatch("[!-~]*", token or get_token() or ""):  # the client would quote it in its error
        raise PublishError(f"the token holds a character that no token has: {ADVICE[401].partition(': ')[2]}")
    return HfApi(endpoint=endpoint, token=token)


def _impatient():
    made = default_client_factory()
    made.timeout = SILENCE
    return made


@contextmanager
def explained(what: str, state: str, token: str | None = None) -> Iterator[None]:
    """Turn what the client raises about `what` into a PublishError that says what to do, and the `state` in which everything is left.

    No chained traceback, and no `token`: an error of the client, or the Hub's answer, may quote what was sent.
    """
    try:
        yield
    except PublishError:
        raise
    except LocalTokenNotFoundError:
        message = ADVICE[401]
    except OfflineModeIsEnabled:
        message = "HF_HUB_OFFLINE is set, so nothing can be sent: HF_HUB_OFFLINE=0 foodextract publish …"
    except (HTTPError, OSError, RuntimeError) as error:  # a RuntimeError wraps what went wrong with one large file
        message = f"{_reason(error)}. {state}"
    except ValueError as error:  # a name that the Hub does not allow, a card whose front matter it does not understand
        message = str(error)
    else:
        return
    secret = token or get_token()
    raise PublishError(f"{what}: {message.replace(secret, 'hf_…') if secret else message}") from None


def _reason(error: BaseException) -> str:
    """What the Hub said, or what happened on the way there."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    last = f"{type(chain[-1]).__name__}: {next(iter(str(chain[-1]).splitlines()), '')}"
    answered = next((one for one in chain if getattr(one, "response", None) is not None), None)
    if answered:
        status = answered.response.status_code
        said = " ".join((getattr(answered, "server_message", None) or answered.response.reason_phrase).split())
        refused = f"the Hub refuses this (HTTP {status}: {said}): mend what it names, then run this again"
        fault = f"the Hub has a fault (HTTP {status}): run this again later"
        return ADVICE.get(status, refused if status < 500 else fault)
    first = next((one for one in chain if isinstance(one, HTTPError) or getattr(one, "errno", None)), error)
    if isinstance(first, OSError) and first.errno and not isinstance(first, ConnectionError | TimeoutError):
        return f"this machine cannot read or write a file ({last}): make room or mend it, then run this again"
    return f"the connection broke ({last}): run this again"
