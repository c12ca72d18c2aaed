"""The one error of the server: an HTTP status with a reason."""

from pydantic import BaseModel


class Problem(BaseModel):
    """The body of an error: a reason for programs, a message for people."""

    status: int
    reason: str
    message: str


class RequestError(Exception):
    """A request, or one image of it, without an answer."""

    def __init__(self, status: int, reason: str, message: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.problem, self.headers = Problem(status=status, reason=reason, message=message), headers
