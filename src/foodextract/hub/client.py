"""The Hub client with a timeout, and its errors in plain words."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import HfApi, get_session, get_token, set_client_factory
from huggingface_hub.errors import HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled

TIMEOUT = 60  # seconds without a byte; huggingface_hub has no limit, or 10 s for downloads
LOGIN = "run `hf auth login`, or set HF_TOKEN"
ADVICE = {
    401: f"the Hub does not know the token: {LOGIN}",
    403: "the token may not write there: use one with write permission for this owner, or another name with --to",
    404: "the Hub does not find it: check the name and what the token may read",
    409: "somebody else is changing it: look at the change, then rerun the command",
    412: "somebody else has changed it in the meantime: look at the change, then rerun the command",
    429: "the Hub limits the rate: wait some minutes, then rerun the command",
}


class PublishError(ValueError):
    """Something cannot be published, or the Hub refused it; the message says what to do."""


def client(endpoint: str | None = None, token: str | None = None) -> HfApi:
    """Return the official client and set TIMEOUT for this process. Raises PublishError for a malformed token."""
    session = get_session()
    set_client_factory(lambda: type(session)(event_hooks=session.event_hooks, follow_redirects=True, timeout=TIMEOUT))
    if not re.fullmatch("[!-~]*", token or get_token() or ""):  # the HTTP client would quote it in its error
        raise PublishError(f"the token contains a character that no token has: {LOGIN}")
    return HfApi(endpoint=endpoint, token=token)


@contextmanager
def explained(what: str, state: str, token: str | None = None) -> Iterator[None]:
    """Turn client errors about `what` into a PublishError with a remedy and the `state` that readers see.

    There is no chained traceback, and the token is masked: an error of the client or the Hub may quote a request.
    """
    try:
        yield
    except PublishError:
        raise
    except LocalTokenNotFoundError:
        message = ADVICE[401]
    except OfflineModeIsEnabled:
        message = "HF_HUB_OFFLINE is set, so nothing can be sent: HF_HUB_OFFLINE=0 foodextract publish …"
    except (HTTPError, OSError, RuntimeError) as error:  # a RuntimeError wraps the failure of one large file
        message = f"{_reason(error)}. {state}"
    except ValueError as error:  # an invalid repository name or card
        message = str(error)
    else:
        return
    secret = token or get_token()
    raise PublishError(f"{what}: {message.replace(secret, 'hf_…') if secret else message}") from None


def _reason(error: BaseException) -> str:
    """Summarize the Hub's answer, or what failed before there was one."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    for one in chain:
        if (response := getattr(one, "response", None)) is not None:
            status = response.status_code
            text = " ".join((getattr(one, "server_message", None) or response.reason_phrase).split())
            refused = f"the Hub refuses this (HTTP {status}: {text}): fix what it names, then rerun the command"
            failed = f"the Hub fails (HTTP {status}): rerun the command later"
            return ADVICE.get(status, refused if status < 500 else failed)
    last = f"{type(chain[-1]).__name__}: {next(iter(str(chain[-1]).splitlines()), '')}"
    first = next((one for one in chain if isinstance(one, HTTPError) or getattr(one, "errno", None)), error)
    if isinstance(first, OSError) and first.errno and not isinstance(first, ConnectionError | TimeoutError):
        return f"this machine cannot read or write a file ({last}): free space or fix it, then rerun the command"
    return f"the connection broke ({last}): rerun the command"
